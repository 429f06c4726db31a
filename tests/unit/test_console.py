"""Lines for people: a full or closed stream costs the line alone, and nothing steers a terminal."""

import ast
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from peft_dist.cli.main import main
from peft_dist.common.console import printable, say
from peft_dist.common.errors import DataError
from peft_dist.common.screen import Screen
from peft_dist.common.table import Column, print_lines, table_lines
from peft_dist.launch.run_here import _print_tail
from peft_dist.run import lease
from peft_dist.run.attempt_records import record_path
from peft_dist.run.lease import refuse_if_held
from peft_dist.status.logs import show_logs
from peft_dist.worker.process import WorkerContext, run_worker
from tests.configs import model_folder

Capture = pytest.CaptureFixture[str]

SCRIPT = """
import sys
from peft_dist.common import console
console.say("one")
console.say("two", sys.stderr)
console.flush()
"""


@pytest.mark.parametrize("full", ["stdout", "stderr", "both"])
def test_a_line_for_a_full_disk_ends_nothing_and_the_other_stream_has_its_own(full: str) -> None:
    with Path("/dev/full").open("w") as disk:
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT],
            stdout=subprocess.PIPE if full == "stderr" else disk,
            stderr=subprocess.PIPE if full == "stdout" else disk,
            cwd=Path(__file__).parents[2],
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 0
    assert (done.stdout or "") == ("one\n" if full == "stderr" else "")
    assert (done.stderr or "") == ("two\n" if full == "stdout" else "")


def test_a_line_for_a_reader_that_is_gone_ends_nothing() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", "input()\n" + SCRIPT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    process.stdout.close()
    process.stdin.write("\n")
    process.stdin.close()
    assert process.stderr.read() == "two\n"
    process.stderr.close()
    assert process.wait(timeout=60) == 0


EVIL = "\x1b[31mred\x1b]0;title\x07\x9b2J\x08\r\u202eedir\u2066\x7f"
"""Colour, window title, clear, backspace, line start, right to left, isolate, delete."""
SHOWN = "?[31mred?]0;title??2J???edir??"


DIRECT = re.compile(r"print|(.*\.)?console\.print|sys\.(__)?std(out|err)(__)?\.write")
"""Calls that reach a terminal."""


def steers(text: str) -> list[str]:
    """Return the characters of an output that a terminal would obey, or nobody would see."""
    return [one for one in text if not one.isprintable() and one not in "\n\t"]


def test_what_steers_a_terminal_becomes_a_question_mark() -> None:
    assert printable(EVIL) == SHOWN
    assert printable("half \ud83d, byte \udcff, \ufeff \u2028") == "half ?, byte ?, ? ?"
    for text in ("a\n\tb", "ä 猫 é \u0301", "\U0001f468\u200d\U0001f4bb", "10\u00a0%"):
        assert printable(text) == text


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_a_stream_has_no_bytes_for_ends_nothing(encoding: str) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    say("猫 \udcff\x1b", stream)
    stream.seek(0)
    assert stream.read() == "? ??\n"


def test_a_recipes_name_steers_nothing_where_it_is_valid_or_absent(
    tmp_path: Path, recipe_file: Path, capsys: Capture
) -> None:
    name = recipe_file.with_name(f"{EVIL}.yaml")
    name.write_bytes(recipe_file.read_bytes())
    assert main(["validate", str(name)]) == 0
    out = capsys.readouterr().out
    assert f"{SHOWN}.yaml: valid" in out and not steers(out)
    for arguments in (["validate", f"{EVIL}absent.yaml"], ["validate", str(name), f"{EVIL}=1"]):
        assert main(arguments) == 2
        told = capsys.readouterr().err
        assert "[31mred" in told and not steers(told)
    assert main(["train", str(name), "--dry-run", "--run-dir", str(tmp_path / EVIL)]) == 0
    assert not steers(capsys.readouterr().out)


def test_nothing_else_writes_to_a_terminal() -> None:
    writers = {"common/console.py", "common/screen.py", "common/table.py"}
    for_scripts = {"slurm/stage_model.py"}
    code = Path(__file__).parents[2] / "peft_dist"
    found = set()
    for path in code.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and DIRECT.fullmatch(ast.unparse(node.func)):
                found.add(str(path.relative_to(code)))
    assert found == writers | for_scripts


def test_a_plans_title_and_a_preview_of_rows_steer_nothing(tmp_path: Path, capsys: Capture) -> None:
    model = model_folder(tmp_path / EVIL, "llama-3.1-8b")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": EVIL, EVIL: 1}) + "\n")
    recipe = tmp_path / f"{EVIL}.yaml"
    data = f"data: {{train: {tmp_path}/rows.jsonl, columns: {{text: {json.dumps(EVIL)}}}}}\n"
    recipe.write_text(f"model: {{name: {json.dumps(str(model))}}}\n{data}", encoding="utf-8")
    assert main(["plan", str(recipe)]) == 0
    assert main(["validate", str(recipe)]) == 2
    told = capsys.readouterr()
    assert SHOWN in told.out and "is 1, not text" in told.err
    assert not steers(told.out + told.err)


def test_lines_of_tables_alone_may_have_colours(capsys: Capture) -> None:
    columns = [Column("who", style=lambda _text: "red"), Column("what")]
    lines = table_lines(columns, [[EVIL, "a"], EVIL], colour=True)
    print_lines([f"results of {EVIL}", *lines])
    first, title, row, note = capsys.readouterr().out.splitlines()
    assert (first, note) == (f"results of {SHOWN}", SHOWN)
    assert "\x1b[31m" in row and SHOWN in row and "\x1b[1m" in title
    assert not steers(re.sub(r"\x1b\[[0-9;]*m", "", row + title))


def test_a_hosts_name_steers_nothing(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(lease, "STALE_AFTER_S", 0.03)
    folder = tmp_path / "attempts"
    folder.mkdir()
    record = {"attempt": 1, "host": EVIL, "pid": 1, "boot_id": "x", "start_ticks": 1}
    record_path(folder, 1).write_text(json.dumps(record), encoding="utf-8")
    refuse_if_held(folder)
    told = capsys.readouterr().err
    assert f"on host {SHOWN}" in told and not steers(told)


def test_a_line_of_a_log_steers_nothing(tmp_path: Path, capsys: Capture) -> None:
    run = tmp_path / "run"
    (run / "logs").mkdir(parents=True)
    for name in ("recipe.yaml", "run.json"):
        (run / name).write_text("{}", encoding="utf-8")
    log = run / "logs" / "launcher.log"
    log.write_text(f"{EVIL}\n", encoding="utf-8")
    _print_tail(log)
    told = capsys.readouterr().err
    assert "[31mred" in told and not steers(told)
    show_logs(run)
    out = capsys.readouterr().out
    assert "edir" in out and not steers(out)


def test_a_row_steers_nothing_in_an_error_a_warning_or_a_traceback(capsys: Capture) -> None:
    def bad_row(_: WorkerContext) -> None:
        raise DataError(f"the row says {EVIL}", where="rows.jsonl:3")

    def crash(_: WorkerContext) -> None:
        raise ValueError(f"the row says {EVIL}")

    for work in (bad_row, crash):
        run_worker(work)
        told = capsys.readouterr().err
        assert "the row says ?[31mred" in told and not steers(told)


WARN = """
import logging, sys
from peft_dist.common import logs
logs.begin(1)
logging.getLogger("a").warning("a row says %s", sys.argv[1])
"""


def test_a_logged_warning_steers_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WARN, EVIL],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr.split(maxsplit=1)[1] == f"[rank 1] warning: a row says {SHOWN}\n"


def test_progress_steers_nothing() -> None:
    stream = io.StringIO()
    Screen(stream).line(f"step 1  skipped: {EVIL}")
    assert stream.getvalue() == f"step 1  skipped: {SHOWN}\n"
