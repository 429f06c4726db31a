"""What torchrun may add to a log: what no rank has said itself, and one line at its end."""

import logging
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.api import SignalException

from peft_dist.common.env import LAUNCH_MARK
from peft_dist.distributed import launcher_output
from tests.processes import environment

FAILED = "failed (exitcode: %s) local_rank: %s (pid: %s) of binary: %s"


def record(text: str, *arguments: object) -> logging.LogRecord:
    return logging.LogRecord("torch", logging.ERROR, "api.py", 1, text, arguments, None)


@pytest.mark.parametrize(
    ("told", "is_news"),
    [
        (record(FAILED, 2, 0, 1, "python"), False),
        (record(FAILED, 75, 0, 1, "python"), False),
        (record(FAILED, 1, 0, 1, "python"), True),
        (record(FAILED, -9, 0, 1, "python"), True),
        (record("Received %s death signal, shutting down workers", 15), False),
        (record("Sending process %s closing signal %s", 1, "SIGTERM"), False),
        (record("no free port"), True),
    ],
)
def test_only_what_no_rank_could_say_is_news(told: logging.LogRecord, is_news: bool) -> None:
    assert launcher_output._is_news(told) == is_news


ENDS = """
import signal, sys
from torch.distributed.elastic.multiprocessing.api import SignalException
from peft_dist.distributed import launcher_output
launcher_output.shorten()
raise {error}
"""


@pytest.mark.slow
@pytest.mark.parametrize("ours", [True, False])
def test_a_launcher_of_ours_ends_in_one_line_and_one_by_hand_as_ever(
    tmp_path: Path, ours: bool
) -> None:
    mark = {LAUNCH_MARK: "x"} if ours else {}
    code = ENDS.format(error="SignalException('got', signal.SIGTERM)")
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(tmp_path, **mark), capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    line = "peft-dist: the launcher was ended by SIGTERM\n"
    assert done.stderr == line if ours else "SignalException" in done.stderr


def test_a_fault_of_the_launcher_itself_keeps_its_traceback(
    capsys: pytest.CaptureFixture[str],
) -> None:
    launcher_output._explain(KeyError, KeyError("a bug"), None)
    assert "KeyError: 'a bug'" in capsys.readouterr().err
    launcher_output._explain(SignalException, SignalException("x", signal.SIGINT), None)
    assert capsys.readouterr().err == "peft-dist: the launcher was ended by SIGINT\n"
