"""What must be true of a run however often it was interrupted, told from what it left behind.

O1: it is the run that was never interrupted, to the bit (`assert_same_run`). O2: every row was
trained on exactly once per epoch (`assert_every_row_once`). Nothing here starts a process.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from peft_dist.config import load_recipe
from peft_dist.data.order import RowOrder, StepPlan
from peft_dist.data.token_cache import tokenize_rows

Record = dict[str, Any]


def records(run_dir: Path, event: str | None = None) -> list[Record]:
    """Return the whole lines of a run's ledger, of one event or of all, in the order written.

    All but those of the machine, which come whenever their time has come.
    """
    path = run_dir / "ledger.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    found = [json.loads(line) for line in lines]
    wanted = [record for record in found if event or record["event"] != "system"]
    return [record for record in wanted if event in (None, record["event"])]


def last_step(run_dir: Path) -> int:
    """Return the step of the newest `step` record, which a restart may have set back; or 0."""
    steps = records(run_dir, "step")
    return int(steps[-1]["step"]) if steps else 0


def final_steps(run_dir: Path) -> dict[int, Record]:
    """Return the record of every step that counts in the end: that of its latest attempt."""
    found: dict[int, Record] = {}
    for record in records(run_dir, "step"):
        before = found.get(record["step"])
        if before is None or record.get("attempt", 1) >= before.get("attempt", 1):
            found[record["step"]] = record
    return found


def losses(run_dir: Path) -> dict[int, str]:
    """Return the loss of every step that counts, to the bit."""
    return {step: record["loss"].hex() for step, record in sorted(final_steps(run_dir).items())}


def sha256(path: Path) -> str:
    """Return the sha256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def adapter_sha256(run_dir: Path) -> str:
    """Return the sha256 of the finished adapter."""
    return sha256(run_dir / "adapter" / "adapter_model.safetensors")


def checkpoint_steps(run_dir: Path) -> list[int]:
    """Return the steps of the checkpoints that are there."""
    folder = run_dir / "checkpoints"
    return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*"))


def optimizer_sha256(run_dir: Path) -> tuple[int, str] | None:
    """Return step and sha256 of the newest optimizer state, if the run keeps any."""
    found = sorted((run_dir / "checkpoints").glob("step-*/optimizer.safetensors"))
    if not found:
        return None
    return int(found[-1].parent.name.removeprefix("step-")), sha256(found[-1])


def assert_same_run(run: Path, undisturbed: Path) -> None:
    """Hold a finished run against one of the same recipe that nothing has happened to (O1)."""
    ours, theirs = final_steps(run), final_steps(undisturbed)
    assert theirs, f"{undisturbed} has no steps"
    assert sorted(ours) == sorted(theirs), f"steps {sorted(ours)} are not {sorted(theirs)}"
    for step, record in sorted(theirs.items()):
        for name in ("loss", "grad_norm", "lr", "rows", "cursor", "tokens"):
            found, expected = _exact(ours[step].get(name)), _exact(record.get(name))
            assert found == expected, f"step {step}: {name} is {found}, not {expected}"
    evaluations = _last_evaluations(run), _last_evaluations(undisturbed)
    assert evaluations[0] == evaluations[1], "held-out losses differ"
    assert adapter_sha256(run) == adapter_sha256(undisturbed), "the adapters differ"
    optimizers = optimizer_sha256(run), optimizer_sha256(undisturbed)
    assert optimizers[0] == optimizers[1], f"optimizer states differ: {optimizers}"


def _exact(value: object) -> object:
    return value.hex() if isinstance(value, float) else value


def _last_evaluations(run: Path) -> dict[int, object]:
    return {int(r["step"]): _exact(r["eval_loss"]) for r in records(run, "evaluation")}


def assert_every_row_once(run: Path, cache: Path, packed: Iterable[Path] = ()) -> None:
    """See that a finished run took every row exactly once per epoch, in the plan's order (O2).

    Args:
        run: The run's folder, whose ledger says after how many rows each step ended.
        cache: Its PEFT_DIST_CACHE.
        packed: Folders of `hooks.record_rows`, one per group in the order they ran: what the ranks
            did, to be held against what the ledger says.
    """
    recipe = load_recipe(run / "recipe.yaml", [])
    rows = tokenize_rows(recipe, "train", cache / "rows")
    order = RowOrder(rows.n_rows, recipe.train.seed)
    plan = StepPlan.of(recipe.train, rows.lengths)
    steps = final_steps(run)
    assert sorted(steps) == list(range(1, plan.total_steps + 1)), sorted(steps)
    did = trained_rows(packed)
    taken, cursor = [], 0
    for step, record in sorted(steps.items()):
        ids = order.rows(cursor, record["cursor"])
        assert len(ids) == record["rows"], f"step {step} ends at row {record['cursor']}"
        if did:
            assert did.get(step) == sorted(ids.tolist()), f"step {step} took {did.get(step)}"
        taken.append(ids)
        cursor = record["cursor"]
    consumed = np.concatenate(taken)
    for start in range(0, len(consumed), rows.n_rows):
        epoch = consumed[start : start + rows.n_rows]
        counts = np.bincount(epoch, minlength=rows.n_rows)
        assert counts.max() == 1, f"row {counts.argmax()} twice in epoch {start // rows.n_rows}"
        assert len(epoch) < rows.n_rows or counts.min() == 1


def trained_rows(packed: Iterable[Path]) -> dict[int, list[int]]:
    """Return the rows of every step, sorted, as the ranks of its latest group packed them."""
    found: dict[int, list[int]] = {}
    for folder in packed:
        of_group: dict[int, list[int]] = {}
        for path in sorted(folder.glob("rank-*.jsonl")):
            for line in path.read_text(encoding="utf-8").splitlines():
                record = json.loads(line)
                of_group.setdefault(record["step"], []).extend(record["rows"])
        found |= of_group
    return {step: sorted(ids) for step, ids in found.items()}


def hidden_files(folder: Path) -> list[Path]:
    """Return what hidden and temporary files and folders are below one."""
    return sorted(
        path for path in folder.rglob("*") if path.name.startswith(".") or ".tmp" in path.name
    )


def processes_below(folder: Path) -> list[int]:
    """Return the processes that work in a folder or were told of it when they were started.

    Ranks of the nursery and what they fork work in it; what they execute has it in its
    environment.
    """
    mark = f"PEFT_DIST_TEST={folder}".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            at = (entry / "cwd").readlink()
            if at.is_relative_to(folder) or mark in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:  # ended meanwhile, or somebody else's
            continue
    return found
