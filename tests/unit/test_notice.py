"""A webhook hears of stops, ends and lost nodes, and nothing else hears its address."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest

from peft_dist.run.restart_policy import Decision, Ending, Kind
from peft_dist.slurm.notice import notice, notify
from tests.processes import ROOT
from tests.unit.run_folders import make_run, result, submitted

SECRET = "T0PSECRET"


class Channel:
    """What a webhook has heard, and how it answers."""

    def __init__(self) -> None:
        self.heard: list[dict[str, str]] = []
        self.code = 200
        self.url = ""


@pytest.fixture
def channel() -> Iterator[Channel]:
    """Return a webhook on this machine."""
    made = Channel()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:  # noqa: N802
            length = int(self.headers["Content-Length"])
            made.heard.append(json.loads(self.rfile.read(length)))
            self.send_response(made.code)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        made.url = f"http://127.0.0.1:{server.server_port}/services/{SECRET}"
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield made
        server.shutdown()


@pytest.mark.parametrize(
    ("kind", "word", "line"),
    [
        (Kind.DONE, "done", "peft-dist: some (job 7) has finished"),
        (Kind.USER_ERROR, "stop", "peft-dist: some (job 7) has stopped: no rows"),
        (
            Kind.NODE_FAILED,
            "again",
            "peft-dist: some (job 7) has lost a node, or a start of it, and goes on: no rows",
        ),
        (Kind.NODES_UNFIT, "again-without", "peft-dist: some (job 7) has lost a node, or a start"),
        (Kind.INTERRUPTED, "again", ""),
        (Kind.CRASHED, "again", ""),
        (Kind.CANCELLED, "cancelled", ""),
    ],
)
def test_only_what_a_person_wants_to_know_is_said(kind: Kind, word: str, line: str) -> None:
    told = notice("some", "7", Ending(kind), Decision(word, "no rows"))
    assert told.startswith(line) and bool(told) == bool(line)


def test_the_end_of_a_run_is_told_by_its_head(tmp_path: Path, channel: Channel) -> None:
    run = make_run(tmp_path / "some")
    submitted(run, "7")
    result(run)
    secrets = tmp_path / "secrets"
    secrets.write_text(f"PEFT_DIST_WEBHOOK={channel.url}\n", encoding="utf-8")
    secrets.chmod(0o600)
    logs = run / "logs" / "7-0"
    logs.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "peft_dist.slurm.supervisor", "--run-dir", str(run),
         "--max-starts", "1", "--max-starts-without-progress", "5", "--no-preflight",
         "--secrets", str(secrets), "--", "false"],
        env={
            **os.environ, "PYTHONPATH": str(ROOT), "SLURM_NODEID": "0", "SLURM_JOB_ID": "7",
            "PEFT_DIST_HOSTS": "node1", "PEFT_DIST_PORT": "20120", "PEFT_DIST_LOGS": str(logs),
            "PEFT_DIST_NONCE": "ab",
        },
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (logs / "decision").read_text(encoding="utf-8") == "done\n"
    line = "peft-dist: some (job 7) has finished"
    assert channel.heard == [{"text": line, "content": line}]
    written = [path.read_text(errors="replace") for path in run.rglob("*") if path.is_file()]
    assert SECRET not in "".join([*written, done.stdout, done.stderr])


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"code": 404}, "the webhook answers 404"),
        ({"url": f"http://127.0.0.1:1/{SECRET}"}, "the webhook does not answer (URLError)"),
        ({"url": f"file:///{SECRET}"}, "PEFT_DIST_WEBHOOK is no https:// address"),
    ],
)
def test_a_notice_that_nobody_takes_is_one_line_without_the_address(
    tmp_path: Path, channel: Channel, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], change: dict[str, object], problem: str,
) -> None:  # fmt: skip
    for name, value in change.items():
        setattr(channel, name, value)
    monkeypatch.setenv("PEFT_DIST_WEBHOOK", channel.url)
    notify(tmp_path / "some", "7", Ending(Kind.DONE), Decision("done"), None)
    told = capsys.readouterr()
    assert told.err == f"peft-dist: warning: no notice was sent: {problem}\n"
    assert SECRET not in told.out + told.err
