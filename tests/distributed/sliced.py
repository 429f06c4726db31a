"""Processes that score alike with a head in slices and with a gathered one: `sliced.py FOLDER`.

Losses and gradients of one step, both ways from the same state, are compared where they are; rank 0
writes down by how much they differ.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from peft_dist.data.token_cache import tokenize_rows
from peft_dist.distributed import process_group
from peft_dist.distributed.collectives import Shard, gather_objects
from peft_dist.distributed.world import World, read_world
from peft_dist.evaluation.scoring import make_eval_set, score
from peft_dist.model import sliced_cross_entropy
from peft_dist.model.cross_entropy import cross_entropy
from peft_dist.model.sliced_cross_entropy import Slices
from peft_dist.model.source import find_base
from peft_dist.model.token_rows import OutputMatrix
from peft_dist.model_setup import set_up_model
from peft_dist.objective.reference import reference_scores
from peft_dist.sharding import slices
from peft_dist.trainer import Trainer
from tests.tiny import tiny_recipe

NF4 = {"quantization": "nf4"}
CASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, kept over a step": {"parallel": {"reshard": "step"}},
    "llama, dpo": {"objective": "dpo"},
    "gemma2": NF4 | {"train": {"activation_checkpointing": True}},  # squeezes its logits
}
WHOLE: dict[str, dict[str, Any]] = {
    "qwen2": {},  # ties its head to the embedding
    "llama, trained rows": {"method": {"trainable_tokens": [5, 300]}},
    "llama, trained head": {"method": {"modules_to_save": ["lm_head"]}},
}
"""Those whose head is gathered as ever."""
VOCABULARY = 320


@contextmanager
def in_slices(wanted: bool) -> Iterator[list[list[int]]]:
    """Let slices be few bytes, or too many; yields targets of this process and most of any."""
    counts: list[list[int]] = []
    scored = sliced_cross_entropy.sliced_cross_entropy

    def counted(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        counts.append([len(hidden), kwargs["most"]])
        return scored(hidden, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slices, "scored_bytes", lambda *_, **__: 1 if wanted else 1 << 60)
        patch.setattr(slices, "LEAST_SPARED_BYTES", 0)
        patch.setattr(slices, "sliced_cross_entropy", counted)
        # Several chunks of 32 targets.
        patch.setattr(sliced_cross_entropy, "LOGIT_BYTES_PER_CHUNK", 32 * 4 * VOCABULARY // 3)
        yield counts


def compared(name: str, folder: Path, world: World) -> dict[str, Any]:
    """Return what a step and an evaluation of a case differ by, and what was scored in slices."""
    sections = {**CASES, **WHOLE}[name]
    pairs = "objective" in sections
    rows = folder / ("pairs.jsonl" if pairs else "rows.jsonl")
    # 7 rows and one of a pass: in the last pass, two of three processes have none.
    shape = {"steps": 1, "global_batch_size": 7, "micro_batch_size": 1}
    parallel = {"strategy": "fsdp", **sections.get("parallel", {})}
    more = {
        "data": {"eval": str(rows)},
        "train": {**shape, **sections.get("train", {})},
        "evaluate": {"max_rows": 5, "micro_batch_size": 1},
        "parallel": parallel,
    }
    recipe = tiny_recipe(folder / name.partition(",")[0], rows, **{**sections, **more})
    data = tokenize_rows(recipe, "train", folder / "rows")
    held = make_eval_set(recipe, tokenize_rows(recipe, "eval", folder / "rows"))
    torch.manual_seed(0)
    setup = set_up_model(recipe, world, find_base(recipe, folder / "cache"), rows=data)
    reference = None
    if pairs:
        reference = reference_scores(setup, data, folder / "reference")
        held = replace(held, reference=reference_scores(setup, held.rows, folder / "reference"))
    trainer, engine = Trainer(setup, data, held, reference=reference), setup.engine
    (batch,) = trainer.rows.batches(trainer.plan.steps())
    setup.model.train()
    found = []
    with engine.disturbed_adapter():  # where a factor is zero, the other has no gradient
        for wanted in (False, True):
            with in_slices(wanted) as counts:
                sums = trainer.passes.run(batch)
                extras = torch.zeros(engine.extras)
                extras[0] = sums.loss
                loss = engine.reduce(extras)[0]
                gradient = engine.gradients.clone()
                engine.zero_gradients()
                of_step = len(counts)
                held_loss = score(setup, held).loss
                found.append((float(loss), gradient, held_loss, counts, of_step))
    (loss, gradient, held_loss, none, _), (other, others, held_other, counts, of_step) = found
    assert none == []
    return {
        "loss": abs(other / loss - 1),
        "gradient": float((others - gradient).norm() / gradient.norm()),
        "held": abs(held_other / held_loss - 1),
        "of step": gather_objects(counts[:of_step]),
        "of evaluation": len(counts) - of_step,
    }


def losses(world: World) -> list[float]:
    """Return the worst differences of losses and gradients of slices to those of a matrix.

    One process has no positions, others have several chunks; each weighs its own.
    """
    made = torch.Generator().manual_seed(world.rank)
    shared = torch.Generator().manual_seed(7)
    shard, worst = Shard(world.rank, world.size), []
    weight, bias = torch.randn(321, 16, generator=shared), torch.randn(321, generator=shared)
    start, stop = shard.rows(321)
    part = OutputMatrix(weight[start:stop], bias[start:stop])
    for after in (None, lambda products: 3 * torch.tanh(products / 3)):
        for counts in ((50, 9, 33), (7, 0, 70)):
            own = counts[world.rank]
            hidden = torch.randn(own, 16, generator=made).requires_grad_()
            targets = torch.randint(321, (own,), generator=made)
            weights = torch.randn(own, generator=made)
            whole = cross_entropy(hidden, OutputMatrix(weight, bias), targets, after)
            expected = torch.autograd.grad((whole * weights).sum(), hidden)[0]
            with in_slices(True):
                found = slices.sliced_cross_entropy(
                    hidden, part, targets, after, most=max(counts), slices=Slices(321, shard)
                )
            gradient = torch.autograd.grad((found * weights).sum(), hidden)[0]
            for one, other in ((found, whole), (gradient, expected)):
                worst.append(float((one - other).norm() / other.norm()) if own else 0.0)
    return [max(of_all) for of_all in zip(*gather_objects(worst), strict=True)]


def main(folder: Path) -> None:
    """Compare all cases."""
    world = read_world()
    process_group.start(world)
    found: dict[str, Any] = {name: compared(name, folder, world) for name in {**CASES, **WHOLE}}
    found["losses"] = losses(world)
    if world.is_main:
        (folder / "out.json").write_text(json.dumps(found))
    process_group.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
