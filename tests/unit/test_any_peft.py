"""Methods of the peft library that have no section of their own: passed through, or refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from peft_dist.checkpoint import adapter_file as adapter_file
from peft_dist.common.errors import RecipeError
from peft_dist.config import load_recipe
from peft_dist.data.tokenize import tokenize_rows
from peft_dist.distributed.world import World
from peft_dist.ledger.events import LedgerEvent, StepEvent
from peft_dist.model.source import find_base
from peft_dist.model_setup import ModelSetup, set_up_model
from peft_dist.trainer import Trainer
from tests.tiny import completion_rows, save_adapter, tiny_model, tiny_recipe, write_jsonl

WORKING: dict[str, dict[str, Any]] = {
    "IA3": {},
    "LN_TUNING": {},
    "LOHA": {"target_modules": ["q_proj", "v_proj"], "r": 4},
    "LOKR": {"target_modules": ["down_proj"], "r": 4},
    "OFT": {"oft_block_size": 16, "r": 0},
    "VERA": {"r": 8, "save_projection": False},
    "MISS": {"r": 4, "modules_to_save": ["lm_head"]},
    "C3A": {"block_size": 16},
}


def opened(folder: Path, world: World, method: dict[str, Any], **sections: Any) -> ModelSetup:
    if not (folder / "llama").exists():
        tiny_model(folder / "llama", "llama")
        write_jsonl(folder / "rows.jsonl", completion_rows(24))
    recipe = tiny_recipe(
        folder / "llama",
        folder / "rows.jsonl",
        method={"kind": "peft", **method},
        parallel={"strategy": "ddp"},
        **sections,
    )
    return set_up_model(recipe, world, find_base(recipe, folder / "cache"))


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("name", WORKING)
def test_a_passed_through_method_starts_at_the_base_and_learns(
    tmp_path: Path, alone: World, name: str, quantization: str
) -> None:
    train = {"steps": 3, "global_batch_size": 8, "learning_rate": 1e-2}
    setup = opened(
        tmp_path, alone, {"type": name, **WORKING[name]}, quantization=quantization, train=train
    )
    rows = tokenize_rows(setup.recipe, "train", tmp_path / "cache")
    before = setup.engine.adapter_state()
    found = Trainer(setup, rows, None)
    losses: list[float] = []

    class Losses:
        def write(self, event: LedgerEvent) -> None:
            assert isinstance(event, StepEvent)
            losses.append(event.loss)

        def close(self) -> None:
            """Nothing is held back."""

    found.trackers = [Losses()]
    found.run()
    setup.check_integrity()
    after = setup.engine.adapter_state()
    assert losses[-1] < losses[0]
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[n], after[n]) for n in after)
    folder = tmp_path / "adapter"
    save_adapter(folder, setup.method, setup.peft, after)
    back = adapter_file.load_adapter(folder, setup.method, setup.peft, setup.adapter)
    assert all(torch.equal(back[n], after[n]) for n in after)
    if quantization == "none":
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
        plain = PeftModel.from_pretrained(base, folder).eval()
        ids = torch.tensor([rows.tokens[: rows.offsets[1]].astype("int64").tolist()])
        setup.model.eval()
        with torch.no_grad():
            ours = setup.peft.get_base_model()(input_ids=ids, row_lengths=None).logits
            torch.testing.assert_close(plain(input_ids=ids).logits, ours, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ({"type": "IA4"}, "method.type: peft has no 'IA4'; did you mean 'IA3'?"),
        ({"type": "LORA"}, "method.type: LORA has a section of its own; write kind: lora"),
        ({"type": "IA3", "rank": 3}, "method.rank: IA3Config has no 'rank' to set"),
        ({"type": "IA3", "task_type": "X"}, "method.task_type: IA3Config has no 'task_type'"),
        ({"type": "P_TUNING"}, "P_TUNING puts learned tokens in front of rows"),
        ({"type": "ADALORA"}, "ADALORA needs a training loop of its own"),
        ({"type": "VERA"}, "VERA cannot be saved by what it trains"),
        ({"type": "ROAD"}, "ROAD cannot be put on this model (The out_features"),
        ({"type": "OSF"}, "OSF "),
        (
            {"type": "LOHA", "target_modules": ["q_proj", "lm_head"]},
            "on the output head, which the loss reads by its weight alone",
        ),
        ({"type": "ADAMSS"}, "method.type: ADAMSS does not take these settings ("),
        (
            {"type": "IA3", "target_modules": ["q_proj", "v_proj"]},
            "method.type: IA3 cannot be loaded again with these settings (`feedforward_modules`",
        ),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(
    tmp_path: Path, alone: World, method: dict[str, Any], said: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        opened(tmp_path, alone, method)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_start_follows_the_seed(tmp_path: Path, alone: World) -> None:
    method = {"type": "LOHA", "target_modules": ["q_proj"], "r": 4}
    states = [
        opened(tmp_path, alone, method, train={"seed": seed}).engine.adapter_state()
        for seed in (1, 1, 2)
    ]
    name = next(n for n, t in states[0].items() if t.abs().sum() > 0)
    assert torch.equal(states[0][name], states[1][name])
    assert not torch.equal(states[0][name], states[2][name])


def test_an_option_can_be_given_on_the_command_line(tmp_path: Path) -> None:
    recipe = {"model": {"name": "a/b"}, "data": {"train": "c/d"}}
    recipe["method"] = {"kind": "peft", "type": "IA3"}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    found = load_recipe(tmp_path / "recipe.yaml", ["method.target_modules=[q_proj]"])
    assert found.method.model_extra == {"target_modules": ["q_proj"]}
