"""Lines for people: a stream that is full or closed costs the line, and nothing else."""

import subprocess
import sys
from pathlib import Path

import pytest

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
