"""Rows 15 and 17: recipes and rows that are not what they should be, also between attempts."""

import contextlib
import io
import json
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peft_dist.cli.main import main
from peft_dist.common.errors import DataError
from peft_dist.config import load_recipe
from peft_dist.data.order import RowOrder
from peft_dist.data.rows import BadRows, read_rows
from peft_dist.data.sources import open_source
from peft_dist.run.directory import RunDir
from peft_dist.run.lease import Attempt
from tests.faults.conftest import Undisturbed
from tests.faults.harness import Group, Harness, Project, fault
from tests.faults.long import cases
from tests.faults.oracles import assert_every_row_once, assert_same_run, losses, records
from tests.tiny import completion_rows, write_jsonl
from tests.unit.test_recipe_fuzz import FIELDS, SECTIONS, values, yaml_pieces

pytestmark = pytest.mark.distributed

SHORT = ("train.steps=60", "evaluate.every_steps=null", "checkpoint.every_steps=10")
KEYS = SECTIONS + [f"{section}.{field}" for section in SECTIONS for field in FIELDS]


def said(arguments: list[str]) -> tuple[int, list[str]]:
    """Run a command in this process; return its exit code and the lines of its errors."""
    errors, output = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(output):
        code = main(arguments)
    return code, errors.getvalue().splitlines()


@settings(max_examples=cases(150, 5000), deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from(KEYS),
    values.map(json.dumps) | st.text(max_size=20) | yaml_pieces,
    st.sampled_from([["train", "--dry-run"], ["validate"]]),
)
def test_an_override_gives_a_recipe_or_one_line_that_names_its_field(
    project: Project, tmp_path: Path, key: str, text: str, command: list[str]
) -> None:
    run = tmp_path / "run"
    where = ["--run-dir", str(run)] if command[0] == "train" else []
    code, errors = said([*command, str(project.recipe), *where, f"{key}={text}"])
    assert code in (0, 2), errors
    if code == 2:
        (line,) = errors
        assert line.startswith("peft-dist: error: ")
        assert key.partition(".")[0] in line, (key, text, line)
    assert not run.exists()
    assert not list(tmp_path.glob(".run*"))


def spoil(text: bytes, rng: random.Random) -> bytes:
    """Return the bytes of a text file after one accident."""
    at, to = sorted((rng.randrange(len(text)), rng.randrange(len(text))))
    lines = text.splitlines(keepends=True)
    line = rng.randrange(len(lines))
    match rng.randrange(7):
        case 0:
            return text[:at]
        case 1:
            return text[:at] + bytes([text[at] ^ 1 << rng.randrange(8)]) + text[at + 1 :]
        case 2:
            return text[:at] + rng.randbytes(rng.randint(1, 8)) + text[at:]
        case 3:
            return text[:at] + text[to:]
        case 4:
            return b"".join([*lines[:line], *lines[line + 1 :]])
        case 5:
            return b"".join([*lines[: line + 1], *lines[line:]])
        case _:
            return text[:at] + bytes(to - at) + text[to:]


def test_a_spoiled_recipe_of_a_run_is_told_before_anything_starts(
    project: Project, tmp_path: Path
) -> None:
    run = RunDir.create(tmp_path / "run", load_recipe(project.recipe, []))
    # A spoiled recipe may still be one; then the holder of the run is in the way.
    attempt = Attempt.begin(run.attempts)
    whole, told = run.recipe.read_bytes(), 0
    for seed in range(cases(150, 3000)):
        spoiled = spoil(whole, random.Random(seed))
        run.recipe.write_bytes(spoiled)
        code, errors = said(["resume", str(run.path)])
        (line,) = errors
        assert code == 2, (seed, line)
        assert line.startswith("peft-dist: error: "), (seed, line)
        if "in use by attempt 1" not in line:
            told += 1
            known = [key for key in (*SECTIONS, "recipe.yaml") if key in line]
            assert known, (seed, line)
        assert not run.launcher_log.exists()
        assert len(list(run.attempts.glob("*.json"))) == 1
    assert told > 50
    attempt.end("done")


def test_rows_after_any_accident_are_rows_or_are_named_and_always_the_same(tmp_path: Path) -> None:
    whole = write_jsonl(tmp_path / "whole.jsonl", completion_rows(20)).read_bytes()
    for seed in range(cases(300, 10_000)):
        path = tmp_path / f"rows-{seed % 2}.jsonl"
        path.write_bytes(spoil(whole, random.Random(seed)))
        first, again = outcome(path), outcome(path)
        assert first == again, seed
        if isinstance(first, str):
            assert first.startswith(f"{path}: "), (seed, first)
            continue
        rows, reports = first
        lines = [line for line in path.read_bytes().split(b"\n") if line.strip()]
        assert len(rows) + len(reports) == len(lines), (seed, reports)
        assert all(report.startswith(f"{path}:") and "\n" not in report for report in reports)


def outcome(path: Path) -> tuple[list[Any], tuple[str, ...]] | str:
    """Return rows and reports of a file, or why it has none."""
    try:
        source = open_source(str(path), split="train", field="data.train")
        bad = BadRows(source, 10**6)
        return list(read_rows(source, task="causal-lm", bad=bad)), bad.reports()
    except DataError as error:
        return str(error)


BAD_LINES = {
    "bad UTF-8": b'{"prompt": "a\xff", "completion": "b"}',
    "half a character": rb'{"prompt": "\ud800", "completion": "b"}',
    "null": b"null",
    "null text": b'{"prompt": "a", "completion": null}',
    "wrong type": b'{"prompt": ["a"], "completion": {"b": 1}}',
    "another row": b'{"question": "a", "answer": "b"}',
    "endless nesting": b"[" * 100_000,
    "endless number": b'{"prompt": "a", "completion": ' + b"9" * 100_000 + b"}",
    "zeros": bytes(4096),
    "truncated": b'{"prompt": "a", "comple',
}


def with_bad_rows(project: Project, folder: Path) -> Project:
    """Return a copy of a project in whose rows every bad line stands once, the last cut short."""
    copy = copied(project, folder)
    lines = (copy.folder / "rows.jsonl").read_bytes().splitlines(keepends=True)
    rng = random.Random(0)
    for line in list(BAD_LINES.values())[:-1]:
        lines.insert(rng.randrange(len(lines)), line + b"\n")
    (copy.folder / "rows.jsonl").write_bytes(b"".join([*lines, BAD_LINES["truncated"]]))
    return copy


def copied(project: Project, folder: Path) -> Project:
    """Return a copy of a project, to be changed."""
    shutil.copytree(project.folder, folder)
    return Project(folder)


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_row_is_told_by_every_rank_with_its_line(
    harness: Harness, project: Project, tmp_path: Path, name: str
) -> None:
    broken = copied(project, tmp_path / "project")
    with (broken.folder / "rows.jsonl").open("ab") as file:
        file.write(BAD_LINES[name])
    group = harness.start(broken, harness.run_dir(), overrides=SHORT)
    assert group.wait() == [2, 2], group.told()
    for rank in range(2):
        (line,) = [x for x in group.errors(rank).splitlines() if "peft-dist: error: " in x]
        assert "rows.jsonl:301: " in line
        assert "Traceback" not in group.errors(rank)
    failure = json.loads((group.run_dir / "failure.json").read_text(encoding="utf-8"))
    assert failure["exit_code"] == 2
    assert not records(group.run_dir)


def test_a_bad_row_ends_a_run_that_streams_when_its_step_comes(
    harness: Harness, project: Project, tmp_path: Path
) -> None:
    harness.grace_s = 25.0  # on a busy machine, what reads ahead ends some time after its rank
    broken = copied(project, tmp_path / "project")
    rows = [json.dumps(row) for row in completion_rows(300)]
    order = RowOrder(300, load_recipe(project.recipe).train.seed)
    places = order.rows(0, 300)
    place = next(at for at in range(80, 300) if places[at] >= 200)  # a start looks at first lines
    line = int(places[place]) + 1
    rows[line - 1] = '{"prompt": "the", "completion": null}'
    (broken.folder / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    group = harness.start(broken, harness.run_dir(), overrides=[*SHORT, "data.streaming=true"])
    assert group.wait() == [2, 2], group.told()
    told = f"{broken.folder}/rows.jsonl:{line}: completion is null; fix the row; to leave such out"
    said = "".join(map(group.errors, range(2)))  # whoever comes to it first
    (line_told, *_) = [x for x in said.splitlines() if "peft-dist: error: " in x]
    assert told in line_told
    assert "Traceback" not in said
    assert group.step() == place // 4, "a row of a later step ends a run no sooner"


def test_rows_that_one_machine_lacks_burn_no_restart(harness: Harness, project: Project) -> None:
    planted = [
        fault("without_rows", rank=1),
        fault("slow", rank=0, where="loading", seconds=60.0),
    ]
    group = harness.start(project, harness.run_dir(), overrides=SHORT, faults=planted)
    assert group.wait_for_end_of(1) == 2, group.told()
    (line,) = [x for x in group.errors(1).splitlines() if "peft-dist: error: " in x]
    assert "peft-dist: error: rank 1: " in line and "absent/rows.jsonl" in line
    group.kill_all(signal.SIGTERM)  # as torchrun does, before it starts all of them again
    group.wait()
    failure = json.loads((group.run_dir / "failure.json").read_text(encoding="utf-8"))
    assert failure["exit_code"] == 2
    assert failure["error"].startswith("rank 1 on host ")
    assert "absent/rows.jsonl" in failure["error"]
    again = harness.start(project, group.run_dir, overrides=SHORT, restart_count=1)
    assert again.wait() == [2, 2], again.told()
    assert len(list((group.run_dir / "attempts").glob("????????.json"))) == 1


@pytest.mark.parametrize("seed", range(cases(1, 10)))
def test_left_out_rows_change_nothing_for_the_others_before_and_after_a_restart(
    harness: Harness, project: Project, undisturbed: Undisturbed, tmp_path: Path, seed: int
) -> None:
    broken = with_bad_rows(project, tmp_path / "project")
    run = harness.run_dir()
    overrides = [*SHORT, f"data.max_bad_rows={len(BAD_LINES)}"]
    step = random.Random(seed).randrange(15, 58)
    kill = fault("signal_at", step=step, rank=1, number=signal.SIGKILL, to="group")
    first = harness.start(broken, run, overrides=overrides, faults=[kill])
    first.wait()
    assert first.output(0).count("left out ") == len(BAD_LINES)
    # Each attempt reads the rows anew, as on another machine.
    shutil.rmtree(broken.cache / "rows")
    again = harness.start(broken, run, overrides=overrides)
    assert again.wait() == [0, 0], again.told()
    left_out = [x.split(maxsplit=1)[1] for x in first.output(0).splitlines() if "left out " in x]
    told = [x.split(maxsplit=1)[1] for x in again.output(0).splitlines() if "left out " in x]
    assert told == left_out
    assert losses(run) == losses(undisturbed(2, "fsdp", *SHORT))
    assert_same_run(run, undisturbed(2, "fsdp", *SHORT))
    assert_every_row_once(run, broken.cache)


def killed_run(harness: Harness, project: Project) -> Path:
    """Return a run that was killed at step 35."""
    run = harness.run_dir()
    kill = fault("signal_at", step=35, rank=0, number=signal.SIGKILL, to="group")
    harness.start(project, run, overrides=SHORT, faults=[kill]).wait()
    return run


def change_rows(project: Project, name: str) -> None:
    """Change one word of one row."""
    path = project.folder / name
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows[3]["completion"] = " log"
    write_jsonl(path, rows)


def change_model(project: Project) -> None:
    """Flip one bit in the middle of the weights."""
    path = project.folder / "model" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-4001] ^= 1
    path.write_bytes(data)


CHANGES = {
    "data.train": lambda project: change_rows(project, "rows.jsonl"),
    "data.eval": lambda project: change_rows(project, "held.jsonl"),
    "model.name": change_model,
}


def assert_refused(group: Group, field: str) -> str:
    """See that a group has ended with the user's code and names a field; return the line."""
    assert group.wait_for_end_of(0) == 2, group.told()
    (line,) = [x for x in group.errors(0).splitlines() if "peft-dist: error: " in x]
    assert f"{field} is not what the run has been trained with: " in line
    assert " before, " in line and " now" in line
    assert f"--allow-changed {field}" in line
    assert "Traceback" not in group.errors(0)
    return line


@pytest.mark.parametrize("field", list(CHANGES)[: cases(1, len(CHANGES))])
def test_rows_or_a_model_that_changed_between_attempts_are_refused_unless_allowed(
    harness: Harness, project: Project, tmp_path: Path, field: str
) -> None:
    changed = copied(project, tmp_path / "project")
    run = killed_run(harness, changed)
    CHANGES[field](changed)
    line = assert_refused(harness.start(changed, run, overrides=SHORT), field)
    assert line.count("fingerprint") == 2
    allowed = ["--allow-changed", field]
    group = harness.start(changed, run, overrides=SHORT, arguments=allowed)
    assert group.wait() == [0, 0], group.told()
    assert records(run, "start")[-1]["step"] in (20, 30)


def test_a_start_with_other_rows_that_is_refused_leaves_the_recipe_as_it_was(
    harness: Harness, project: Project, tmp_path: Path
) -> None:
    other = write_jsonl(tmp_path / "other.jsonl", completion_rows(300, seed=7))
    run = RunDir(killed_run(harness, project))
    before = run.recipe.read_bytes()
    changed = [*SHORT, f"data.train={other}", "checkpoint.keep_last=3"]
    refused = harness.start(project, run.path, overrides=changed)
    assert_refused(refused, "data.train")
    refused.kill_all()
    assert run.recipe.read_bytes() == before
    assert not run.next_recipe.exists()
    allowed = ["--allow-changed", "data.train"]
    group = harness.start(project, run.path, overrides=changed, arguments=allowed)
    assert group.wait() == [0, 0], group.told()
    now = load_recipe(run.recipe)
    assert (now.data.train, now.checkpoint.keep_last) == (str(other), 3)
    assert not run.next_recipe.exists()


@pytest.mark.parametrize(
    ("override", "values"),
    [
        ("train.learning_rate=4e-3", "0.005 before, 0.004 now"),
        ("train.global_batch_size=8", "4 before, 8 now"),
        ("method.rank=8", "4 before, 8 now"),
        ("train.seed=7", "0 before, 7 now"),
        ("quantization=none", "nf4 before, none now"),
    ][: cases(2, 5)],
)
def test_a_recipe_that_changed_between_attempts_is_refused_by_its_field(
    harness: Harness, project: Project, override: str, values: str
) -> None:
    run = killed_run(harness, project)
    group = harness.start(project, run, overrides=[*SHORT, override])
    assert values in assert_refused(group, override.partition("=")[0])
    group.kill_all()
    again = harness.start(project, run, overrides=SHORT)
    assert again.wait() == [0, 0], again.told()


def test_a_learning_rate_that_changed_goes_on_when_that_is_allowed(
    harness: Harness, project: Project
) -> None:
    run = killed_run(harness, project)
    group = harness.start(
        project, run, overrides=[*SHORT, "train.learning_rate=1e-4"],
        arguments=["--allow-changed", "train.learning_rate"],
    )  # fmt: skip
    assert group.wait() == [0, 0], group.told()
    assert records(run, "step")[-2]["lr"] < 1e-4


def test_rows_that_change_while_a_run_trains_on_them_do_not_reach_it(
    harness: Harness, project: Project, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    changed = copied(project, tmp_path / "project")
    slow = fault("slow_rank", rank=1, seconds=0.03)
    group = harness.start(changed, harness.run_dir(), overrides=SHORT, faults=[slow])
    group.wait_for_step(10)
    (changed.folder / "rows.jsonl").write_bytes(b"")
    (changed.folder / "held.jsonl").unlink()
    assert group.wait() == [0, 0], group.told()
    assert_same_run(group.run_dir, undisturbed(2, "fsdp", *SHORT))
