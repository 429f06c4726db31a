"""The shipped recipes of real size: each says what the plan says of it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from peft_dist.cli.main import main
from peft_dist.config import load_recipe
from peft_dist.data.token_cache import tokenize_rows
from peft_dist.distributed.world import World
from peft_dist.ledger.events import LedgerEvent, StepEvent
from peft_dist.model.source import find_base
from peft_dist.model.tiny_config import tiny_config
from peft_dist.model_setup import set_up_model
from peft_dist.objective.reference import reference_scores
from peft_dist.trainer import Trainer
from tests.configs import CONFIGS, model_folder
from tests.processes import ROOT
from tests.tiny import VOCABULARY, tiny_tokenizer
from tests.unit.slurm_desk import Capture

HEADER = re.compile(r"# Plan, (\d+) x (\d+) ([a-z0-9-]+)(?:, with ([^:]+))?: .*")
RECIPES = {
    path.stem: path
    for path in sorted((ROOT / "configs" / "recipes").glob("*.yaml"))
    if HEADER.search(path.read_text(encoding="utf-8"))
}


def plan_line(found: dict[str, Any], strategy: str, stated: re.Match[str]) -> str:
    """Return what a recipe says of its plan: the beginning of `stated`, with the plan's figures."""
    offload = "parallel.offload=cpu" in (stated[4] or "").split()
    way = {"strategy": strategy, "offload": offload}
    (row,) = [row for row in found["rows"] if way.items() <= row["candidate"].items()]
    assert row["fits"]
    tensors, in_all, limit = (
        size / 2**30
        for size in (row["bytes"]["allocated"], row["device_bytes"], row["limit_bytes"])
    )
    step_s, speed = row["seconds"]["total"], row["tokens_per_s"]
    return (
        f"{stated[0].partition(': ')[0]}: {tensors:.1f} GiB of tensors, "
        f"{in_all:.1f} of {limit:.1f} in all; {step_s:.1f} s a step, {speed:,.0f} tokens/s."
    )


def test_the_recipes_of_real_size_are_these() -> None:
    assert set(RECIPES) == {
        "gemma-2-27b-qlora", "gemma-3-27b-qlora", "gpt-oss-120b-qlora", "gpt-oss-20b-qlora",
        "llama-2-7b-lora", "llama-3.1-405b-qlora", "llama-3.1-8b-dpo", "llama-3.1-8b-qlora",
        "llama-3.3-70b-qlora", "mistral-small-24b-qlora", "phi-4-qlora", "qwen3-235b-a22b-qlora",
        "qwen3-30b-a3b-qlora", "qwen3-32b-qlora",
    }  # fmt: skip


STATED = [
    pytest.param(name, stated, id=f"{name} {stated[1]} x {stated[2]}")
    for name, path in RECIPES.items()
    for stated in HEADER.finditer(path.read_text(encoding="utf-8"))
]


@pytest.mark.parametrize(("name", "stated"), STATED)
def test_a_recipe_says_what_its_plan_says(
    name: str, stated: re.Match[str], tmp_path: Path, capsys: Capture
) -> None:
    nodes, gpus, gpu = int(stated[1]), int(stated[2]), stated[3]
    words = (stated[4] or "").split()
    config = next(key for key in CONFIGS if name.startswith(key))
    model = model_folder(tmp_path / "model", config)
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text(f"gpus_per_node: {gpus}\ngpu: {gpu}\n")
    code = main(["plan", str(RECIPES[name]), f"model.name={model}", *words, "--cluster",
                 str(cluster), "--nodes", str(nodes), "--json"])  # fmt: skip
    found = json.loads(capsys.readouterr().out)
    assert code == 0
    text = RECIPES[name].read_text(encoding="utf-8")
    strategy = re.search(r"strategy: (\w+)", " ".join(words).replace("=", ": ") + text)
    assert strategy is not None
    assert stated[0] == plan_line(found, strategy[1], stated)


class Events(list[LedgerEvent]):
    """A tracker that keeps what it is told."""

    def write(self, event: LedgerEvent) -> None:
        """Keep one."""
        self.append(event)

    def close(self) -> None:
        """Nothing is held back."""


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains_a_tiny_model_of_its_architecture(
    name: str, tmp_path: Path, alone: World
) -> None:
    kind = next(config["model_type"] for key, config in CONFIGS.items() if name.startswith(key))
    config = tiny_config(kind)
    config.vocab_size = VOCABULARY
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tiny_tokenizer(tmp_path / "model")
    own = load_recipe(RECIPES[name], check_paths=False)
    rows = Path(own.data.sources("train")[0].path).read_text(encoding="utf-8").splitlines()
    (tmp_path / "rows.jsonl").write_text("\n".join(rows[:8]) + "\n", encoding="utf-8")
    sharded = own.parallel.strategy in ("fsdp", "hsdp")
    recipe = load_recipe(
        RECIPES[name],
        [f"model.name={tmp_path / 'model'}", f"data.train={tmp_path / 'rows.jsonl'}",
         "data.eval=null", "data.max_length=48", "train.epochs=null", "train.steps=1",
         "train.global_batch_size=2", "train.micro_batch_size=1", "parallel.processes=1",
         f"parallel.strategy={'fsdp' if sharded else 'ddp'}", "parallel.shard_size=null"],
    )  # fmt: skip
    setup = set_up_model(recipe, alone, find_base(recipe, tmp_path / "cache"))
    before = setup.engine.adapter_state()
    tokenized = tokenize_rows(recipe, "train", tmp_path / "cache")
    scores = None
    if recipe.objective.has_reference:
        scores = reference_scores(setup, tokenized, tmp_path / "reference")
    trainer = Trainer(setup, tokenized, None, reference=scores)
    trainer.trackers = [events := Events()]
    assert trainer.run().step == 1
    assert [event.step for event in events if isinstance(event, StepEvent)] == [1]
    after = setup.engine.adapter_state()
    assert any(not torch.equal(before[name], after[name]) for name in before)
