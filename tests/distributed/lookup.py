"""Two processes that train alike with an embedding looked up and gathered: `lookup.py FOLDER`.

What each has lost, learned and hashed is written down by rank 0, by model and way.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as torch_dist

from peft_dist.data.token_cache import tokenize_rows
from peft_dist.distributed import process_group
from peft_dist.distributed.world import World, read_world
from peft_dist.evaluation.scoring import make_eval_set, score
from peft_dist.model.fill_base import is_columns
from peft_dist.model.fingerprint import fingerprint_rows
from peft_dist.model.source import find_base
from peft_dist.model.weights import WeightFiles
from peft_dist.model_setup import set_up_model
from peft_dist.sharding import lookup, slices
from peft_dist.trainer import Trainer
from tests.equivalence.cases import Recorder
from tests.tiny import tiny_recipe

WAYS = ("looked up", "gathered")
CASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma3_text": {},  # scales its rows
    "llama, kept over a step": {"parallel": {"reshard": "step"}},
    "llama, prompt": {"method": {"kind": "prompt", "virtual_tokens": 3, "text": "the cat"}},
    "llama, trained tokens": {"method": {"kind": "lora", "trainable_tokens": [5, 300]}},
}


def train(name: str, folder: Path, world: World, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return what a short training comes to."""
    exchanges = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal exchanges
        exchanges += 1
        return exchange(*args, **kwargs)

    exchange = torch_dist.all_to_all_single
    patch.setattr(torch_dist, "all_to_all_single", counted)
    model, rows = folder / name.partition(",")[0], folder / "rows.jsonl"
    case = CASES[name]
    recipe = tiny_recipe(
        model,
        rows,
        data={"eval": str(rows)},
        # 7 rows a step: one process has more than the other, and none in one pass.
        train={"steps": 3, "global_batch_size": 7, "micro_batch_size": 2, "learning_rate": 5e-3},
        evaluate={"max_rows": 5, "micro_batch_size": 1},
        parallel={"strategy": "fsdp", **case.get("parallel", {})},
        **({"method": case["method"]} if "method" in case else {}),
    )
    data = tokenize_rows(recipe, "train", folder / "rows")
    held = make_eval_set(recipe, tokenize_rows(recipe, "eval", folder / "rows"))
    torch.manual_seed(0)
    setup = set_up_model(recipe, world, find_base(recipe, folder / "cache"), rows=data)
    embedding = setup.peft.get_input_embeddings()
    (key,) = (key for key in setup.base if "embed_tokens" in key)
    stored = WeightFiles(model).full_tensor("model.embed_tokens.weight")
    parameter, engine = setup.base[key], setup.engine
    found = {
        "columns": is_columns(parameter),
        "as stored": torch.equal(engine.full_tensor(parameter), stored),
        "hash": setup.base_fingerprint[key] == fingerprint_rows(stored, 0),
        "bytes": engine.local_elements(parameter)[0].nbytes / stored.nbytes,
    }
    engine.copy_into(parameter, stored.flip(0))
    found["turned"] = torch.equal(engine.full_tensor(parameter), stored.flip(0))
    found["hash turned"] = engine.fingerprint({key: parameter})[key] == fingerprint_rows(
        stored.flip(0).contiguous(), 0
    )
    engine.copy_into(parameter, stored)
    recorder = Recorder()
    trainer = Trainer(setup, data, held)
    trainer.trackers = [recorder]
    exchanges = 0
    trainer.run()
    found["exchanges"] = exchanges
    setup.check_integrity()
    found["score"] = score(setup, held).loss
    found["steps"] = [[r["loss"], r["grad_norm"]] for r in recorder.records if r["event"] == "step"]
    found["adapter"] = {n: fingerprint_rows(t, 0) for n, t in engine.adapter_state().items()}
    assert "weight" not in vars(embedding)
    return found


def main(folder: Path) -> None:
    """Train every case both ways."""
    world = read_world()
    process_group.start(world)
    found: dict[str, Any] = {name: {} for name in CASES}
    for name in CASES:
        for way in WAYS:
            with pytest.MonkeyPatch.context() as patch:
                # Of the head, whose exchanges are none of rows.
                patch.setattr(slices, "scored_bytes", lambda *_, **__: 1 << 60)
                if way == "gathered":
                    patch.setattr(lookup, "exchanged_bytes", lambda *_: 1 << 60)
                found[name][way] = train(name, folder, world, patch)
    if world.is_main:
        (folder / "out.json").write_text(json.dumps(found))
    process_group.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
