"""Row 11: checkpoints that were damaged on the disk, found before anything is read from them."""

import json
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from peft_dist.checkpoint.directory import newest_good
from peft_dist.common.manifest import MANIFEST_FILE, seal, step_name
from peft_dist.ledger.goodput import goodput
from peft_dist.ledger.goodput_table import render
from peft_dist.ledger.reader import LedgerReader
from peft_dist.status.run_state import read_run
from tests.faults.conftest import Undisturbed
from tests.faults.harness import Group, Harness, Project, fault
from tests.faults.long import cases
from tests.faults.mutations import KINDS, mutate
from tests.faults.oracles import adapter_sha256, assert_same_run, losses, records

pytestmark = pytest.mark.distributed

SHORT = (
    "train.steps=60",
    "evaluate.every_steps=null",
    "checkpoint.every_steps=10",
    "checkpoint.keep_last=9",
)
Copy = Callable[[str], Path]


@pytest.fixture(scope="module")
def killed(
    nursery: object, project: Project, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """Return a run that was killed at step 58 and has the checkpoints 10 to 50."""
    harness = Harness(nursery, tmp_path_factory.mktemp("killed"))  # type: ignore[arg-type]
    run = harness.run_dir()
    kill = fault("signal_at", step=58, rank=0, number=signal.SIGKILL, to="group")
    saved = ["checkpoint.background=false", *SHORT]
    harness.start(project, run, overrides=saved, faults=[kill]).wait()
    assert [record["step"] for record in records(run, "saved")] == [10, 20, 30, 40, 50]
    yield run
    harness.close()


@pytest.fixture
def copy(killed: Path, harness: Harness) -> Iterator[Copy]:
    """Return a function that copies the killed run into a run directory of the test."""
    made: list[Path] = []

    def copied(name: str) -> Path:
        run = harness.run_dir(name)
        shutil.copytree(killed, run, symlinks=True)
        made.append(run)
        return run

    yield copied
    for run in made:  # what damage has left in a folder that was set aside is none of the program's
        for folder in (run / "checkpoints").glob("bad-*"):
            folder.unlink() if folder.is_symlink() else shutil.rmtree(folder)


def contents(folder: Path) -> dict[str, bytes | str]:
    """Return every file and link below a folder; a link in its own place is one of them."""
    found: dict[str, bytes | str] = {".": str(folder.readlink())} if folder.is_symlink() else {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = str(path.readlink())
        else:
            found[name] = path.read_bytes() if path.is_file() else "folder"
    return found


def whole_checkpoints(run: Path, original: Path) -> tuple[list[Path], list[Path]]:
    """Return the checkpoints that are as they were, and those that are not, oldest first."""
    whole, damaged = [], []
    for folder in sorted((run / "checkpoints").glob("step-*")):
        before = original / "checkpoints" / folder.name
        same = before.exists() and contents(folder) == contents(before)
        (whole if same else damaged).append(folder)
    return whole, damaged


def resume(harness: Harness, project: Project, run: Path) -> Group:
    group = harness.start(project, run, overrides=SHORT)
    assert group.wait() == [0, 0], group.told()
    return group


@pytest.mark.parametrize("case", range(cases(len(KINDS), 10 * len(KINDS))))
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_used(
    harness: Harness,
    project: Project,
    undisturbed: Undisturbed,
    killed: Path,
    copy: Copy,
    case: int,
) -> None:
    run = copy("run")
    kind = list(KINDS)[case % len(KINDS)]
    what = KINDS[kind](run / "checkpoints" / step_name(50), random.Random(case))
    whole, damaged = whole_checkpoints(run, killed)
    bad = [folder for folder in damaged if folder.name > whole[-1].name]
    assert bad, (kind, what)
    group = resume(harness, project, run)
    started = records(run, "start")[-1]["step"]
    assert step_name(started) == whole[-1].name, (kind, what)
    for folder in bad:
        assert f"the checkpoint {folder} is damaged: " in group.errors(0), (kind, what)
        aside = folder.with_name(f"bad-{folder.name}")
        assert aside.exists() or aside.is_symlink(), (kind, what)
    assert f"going on from {whole[-1].name}" in group.errors(0)
    assert_same_run(run, undisturbed(2, "fsdp", *SHORT))


@pytest.mark.parametrize("survivors", [0, 1, 2][: cases(2, 3)])
def test_as_many_damaged_checkpoints_as_there_are_are_passed_over(
    harness: Harness, project: Project, undisturbed: Undisturbed, copy: Copy, survivors: int
) -> None:
    run, rng = copy("run"), random.Random(survivors)
    folders = sorted((run / "checkpoints").glob("step-*"))
    for folder in folders[survivors:]:
        KINDS[rng.choice(["truncated", "bit flipped", "0 bytes", "missing"])](folder, rng)
    group = resume(harness, project, run)
    assert records(run, "start")[-1]["step"] == 10 * survivors
    going_on = step_name(10 * survivors) if survivors else "the beginning"
    assert f"going on from {going_on}" in group.errors(0)
    assert group.errors(0).count(" is damaged: ") == 5 - survivors
    assert_same_run(run, undisturbed(2, "fsdp", *SHORT))


def test_a_sealed_checkpoint_without_one_of_the_tensors_is_refused_by_its_name(
    harness: Harness, project: Project, copy: Copy
) -> None:
    run = copy("run")
    folder = run / "checkpoints" / step_name(50)
    tensors = load_file(folder / "optimizer.safetensors")
    name = sorted(tensors)[0]
    del tensors[name]
    save_file(tensors, folder / "optimizer.safetensors")
    (folder / MANIFEST_FILE).unlink()
    seal(folder, {"step": 50, "attempt": 1})
    group = harness.start(project, run, overrides=SHORT)
    assert group.wait() == [3, 3], group.told()
    assert name.partition(".")[2] in group.errors(0)
    assert str(folder) in group.errors(0)
    assert "Traceback" not in group.errors(0)


def test_every_mutation_of_a_real_checkpoint_is_detected(killed: Path, tmp_path: Path) -> None:
    last_three = sorted((killed / "checkpoints").glob("step-*"))[-3:]
    for seed in range(cases(100, 1000)):
        run = tmp_path / "run"
        for folder in last_three:
            shutil.copytree(folder, run / "checkpoints" / folder.name)
        what = mutate(run / "checkpoints" / last_three[-1].name, random.Random(seed))
        whole, damaged = whole_checkpoints(run, killed)
        chosen, bad = newest_good(run / "checkpoints")
        assert chosen == whole[-1], (seed, what)
        newer = [folder for folder in reversed(damaged) if folder.name > whole[-1].name]
        assert [folder for folder, _ in bad] == newer, (seed, what)
        assert all(why for _, why in bad), (seed, what)
        shutil.rmtree(run)


@pytest.mark.parametrize("kept_steps", [27, 0, 49][: cases(1, 3)])
def test_a_ledger_that_lost_lines_says_so_once(
    harness: Harness, project: Project, undisturbed: Undisturbed, copy: Copy, kept_steps: int
) -> None:
    run = copy("cut")
    ledger = run / "ledger.jsonl"
    lines = ledger.read_bytes().splitlines(keepends=True)
    of_step = [index for index, line in enumerate(lines) if json.loads(line)["event"] == "step"]
    ledger.write_bytes(b"".join(lines[: of_step[kept_steps]] if kept_steps else []))
    kill = fault("signal_at", step=55, rank=0, number=signal.SIGKILL, to="group")
    harness.start(project, run, overrides=SHORT, faults=[kill]).wait()
    again = harness.start(project, run, overrides=SHORT, SLURM_RESTART_COUNT="1")
    assert again.wait() == [0, 0], again.told()
    gaps = records(run, "gap")
    assert [(gap["attempt"], gap["step"]) for gap in gaps] == [(2, 50)]
    assert [(gap["from_step"], gap["to_step"]) for gap in gaps] == [(kept_steps + 1, 50)]
    starts = [record["event"] for record in records(run) if record["attempt"] == 2]
    assert starts[:2] == ["start", "gap"]
    expected = undisturbed(2, "fsdp", *SHORT)
    assert adapter_sha256(run) == adapter_sha256(expected)
    steps = {step: loss for step, loss in losses(expected).items() if not kept_steps < step <= 50}
    assert losses(run) == steps
    said = "steps" if kept_steps < 49 else "step"
    for told in ("\n".join(render(goodput(LedgerReader(ledger).all()))), read_run(run).gap):
        assert f"{said} {kept_steps + 1} " in told and "not in the ledger" in told


def test_a_ledger_that_lost_nothing_has_no_gap(
    harness: Harness, project: Project, copy: Copy
) -> None:
    run = copy("whole")
    again = harness.start(project, run, overrides=SHORT)
    assert again.wait() == [0, 0], again.told()
    assert [record["step"] for record in records(run, "start")] == [0, 50]
    assert records(run, "gap") == [] and read_run(run).gap == ""
