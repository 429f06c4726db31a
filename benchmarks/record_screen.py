"""Record what a command shows on a terminal, as text: every line that is drawn, and when.

    python benchmarks/record_screen.py --out run.txt -- peft-dist train RECIPE
    python benchmarks/record_screen.py --press 'step 3/' --press 'Ctrl-C again' -- peft-dist ...

`--press TEXT` presses Ctrl-C as soon as TEXT is seen, after those before it were. A line that is
drawn again and again, such as a bar, is noted when it changes, at most once a second.
"""

import argparse
import codecs
import fcntl
import os
import pty
import re
import struct
import sys
import termios
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

DRAWN = re.compile(r"\r\n|[\r\n]|\x1b\[[0-9]*[A-GJKf]|\x1b\[[0-9;]*H")
"""What ends a line on a terminal, or goes back to one."""
COLOURS = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1b[=>]")
DIGITS = re.compile(r"[0-9]+|[━╸╺]+")
SAME_LINE_EVERY_S = 1.0
CTRL_C = b"\x03"


def record(
    command: Sequence[str], out: TextIO, *, columns: int, lines: int, press: Sequence[str]
) -> int:
    """Run a command on a terminal of its own, write what it shows, and return its exit code."""
    child, leader = pty.fork()
    if child == 0:
        os.execvp(command[0], list(command))
    fcntl.ioctl(leader, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    start_s, waiting, seen = time.monotonic(), list(press), ""
    last: dict[str, tuple[str, float]] = {}
    out.write(f"$ {' '.join(command)}\n")
    for text in _texts(leader):
        now_s = time.monotonic() - start_s
        for line in DRAWN.split(text):
            plain = COLOURS.sub("", line).rstrip()
            kind = DIGITS.sub("", plain)
            before, at_s = last.get(kind, ("", -SAME_LINE_EVERY_S))
            if plain and plain != before and now_s - at_s >= SAME_LINE_EVERY_S:
                out.write(f"{now_s:8.2f}  {plain}\n")
                out.flush()
            if plain != before:
                last[kind] = plain, now_s if now_s - at_s >= SAME_LINE_EVERY_S else at_s
        seen += COLOURS.sub("", text)
        if waiting and waiting[0] in seen:
            out.write(f"{now_s:8.2f}  ^C  (after {waiting.pop(0)!r})\n")
            seen = ""
            os.write(leader, CTRL_C)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    out.write(f"{time.monotonic() - start_s:8.2f}  exit code {code}\n")
    return code


def _texts(leader: int) -> Iterator[str]:
    """Yield what comes from a terminal until nobody holds its other end."""
    decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
    while True:
        try:
            part = os.read(leader, 65536)
        except OSError:  # what Linux says instead of an end
            return
        if not part:
            return
        yield decode(part)


def main() -> int:
    """Record the command that stands behind `--`."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, help="file to write (default: standard output)")
    parser.add_argument("--columns", type=int, default=100, help="width (default: 100)")
    parser.add_argument("--lines", type=int, default=30, help="height (default: 30)")
    parser.add_argument(
        "--press", action="append", default=[], metavar="TEXT", help="press Ctrl-C after TEXT"
    )
    parser.add_argument("command", nargs="+")
    options = parser.parse_args()
    out = options.out.open("w", encoding="utf-8") if options.out else sys.stdout
    return record(
        options.command,
        out,
        columns=options.columns,
        lines=options.lines,
        press=options.press,
    )


if __name__ == "__main__":
    sys.exit(main())
