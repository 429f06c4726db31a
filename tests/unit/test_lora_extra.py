"""method.extra: fields of PEFT's own configuration that have no key, passed on or refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM

from peft_dist.checkpoint.verified_save import AdapterSaver
from peft_dist.common.errors import RecipeError
from peft_dist.data.token_cache import tokenize_rows
from peft_dist.distributed.world import World
from peft_dist.methods.lora_extra import _NO_PLACE, _SET_BY_THE_RUN, OWN_KEYS
from peft_dist.model.source import find_base
from peft_dist.model_setup import ModelSetup, set_up_model
from tests.tiny import completion_rows, tiny_model, tiny_recipe, write_jsonl


def opened(folder: Path, world: World, **method: Any) -> tuple[ModelSetup, AdapterSaver]:
    if not (folder / "qwen2").is_dir():
        tiny_model(folder / "qwen2", "qwen2")
    file = write_jsonl(folder / "rows.jsonl", completion_rows(8))
    recipe = tiny_recipe(
        folder / "qwen2",
        file,
        quantization="none",
        parallel={"strategy": "ddp"},
        method={"targets": ["q_proj", "k_proj"], "rank": 4, **method},
    )
    rows = tokenize_rows(recipe, "train", folder / "cache")
    setup = set_up_model(recipe, world, find_base(recipe, folder / "cache"), rows=rows)
    return setup, AdapterSaver(setup, rows)


def test_a_field_without_a_key_is_trained_saved_and_read_by_plain_peft(
    tmp_path: Path, alone: World
) -> None:
    extra = {"lora_bias": True, "layers_pattern": "layers"}
    setup, saver = opened(tmp_path, alone, extra=extra, layers_to_transform=[1])
    saver.prove()
    assert all(".layers.1." in name for name in setup.adapter)
    biases = [name for name in setup.adapter if name.endswith("lora_B.default.bias")]
    assert len(biases) == 2
    assert not any(setup.adapter[name].any() for name in biases)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in setup.adapter.values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    saver.save(tmp_path / "adapter")
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "qwen2"), tmp_path / "adapter"
    ).eval()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        ours = setup.peft.eval().get_base_model()(input_ids=ids, row_lengths=None).logits
        torch.testing.assert_close(plain(input_ids=ids).logits, ours, atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"lora_alpha": 8}, "lora_alpha has a key of its own; set method.alpha"),
        ({"corda_config": {}}, "corda_config has a key of its own; set method.init"),
        ({"eva_config": {"rho": 2}}, "eva_config has no place here: init eva gives every layer"),
        ({"loftq_config": {"loftq_iter": 2}}, "loftq_config has no place here: init loftq makes"),
        ({"task_type": "SEQ_CLS"}, "task_type is set by the run; remove it"),
        ({"lora_biass": True}, "lora_biass is no field of PEFT's LoraConfig; did you mean 'lora_b"),
        ({"layers_pattern": "h"}, "layers_pattern is refused by PEFT (When `layers_pattern` is"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens has no place here: it looks"),
        ({"use_qalora": True}, "use_qalora has no place here: it is for a base in GPTQ; remove it"),
        ({"velora_config": {"num_groups": 8}}, "velora_config "),
        ({"kasa_config": {}}, "kasa_config "),
        ({"monteclora_config": {}}, "monteclora_config "),
    ],
)
def test_a_field_that_cannot_be_passed_on_is_refused_in_one_line(
    tmp_path: Path, alone: World, extra: dict[str, Any], said: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        opened(tmp_path, alone, extra=extra)
    assert str(caught.value).startswith(f"method.extra: {said}")
    assert "\n" not in str(caught.value)


def test_every_field_of_the_installed_peft_is_known_by_name() -> None:
    fields = LoraConfig.__dataclass_fields__.keys()
    named = {*OWN_KEYS, *_SET_BY_THE_RUN, *_NO_PLACE}
    assert named <= fields
    plain, variants = {"layers_pattern", "lora_bias"}, {"use_bdlora", "kasa_config"}
    variants |= {"velora_config", "monteclora_config"}
    assert fields - named == plain | variants
