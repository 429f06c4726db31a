"""What the end of a run says to whoever serves the adapter."""

import pytest
from peft import IA3Config, LoraConfig, PeftConfig

from peft_dist.metrics.result import serving

LORA = ["model.q_proj.lora_A.default.weight"]


@pytest.mark.parametrize(
    ("config", "trained", "said"),
    [
        (LoraConfig(r=8), LORA, "LoRA of rank 8: "),
        (LoraConfig(r=8, rank_pattern={"q_proj": 32}), LORA, "LoRA of rank 32: "),
        (LoraConfig(r=8, use_dora=True), LORA, "DoRA: servers load plain LoRA alone; `peft-dist m"),
        (LoraConfig(r=8, bias="all"), [*LORA, "model.q_proj.bias"], "more than LoRA is trained: "),
        (LoraConfig(r=8), [*LORA, "score.modules_to_save.default.weight"], "more than LoRA is "),
        (IA3Config(), ["model.q_proj.ia3_l.default"], "no plain LoRA: "),
    ],
)
def test_a_server_is_told_rank_and_what_it_cannot_load(
    config: PeftConfig, trained: list[str], said: str
) -> None:
    assert serving(config, trained).startswith(said)
