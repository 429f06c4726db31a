"""Make the README's pictures from real runs: `python -m tests.pictures RECIPE`; minutes.

A short run that is stopped and goes on, one that was stopped for good, and one whose loss became
NaN: `docs/status.svg` is what `peft-dist status` says of them while the first one goes on, and
`docs/report.webp` the top of its report.
"""

import argparse
import fcntl
import io
import os
import pty
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import threading
from contextlib import suppress
from pathlib import Path

from rich.console import Console
from rich.text import Text

from peft_dist.common.errors import EXIT_DO_NOT_RETRY, EXIT_DONE, EXIT_INTERRUPTED
from peft_dist.ledger.events import StepEvent
from peft_dist.ledger.reader import LedgerReader
from tests.browser import started
from tests.processes import ROOT, wait_until

OURS = [sys.executable, "-m", "peft_dist"]
WIDTH = 84
"""Columns of the terminal; as wide as a README is on a screen."""
REPORT = (1200, 858)
PATIENCE_S = 3600.0
LINE_HEIGHT = 24.4
"""Of rich's pictures, in their pixels."""
SVG = """<svg viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font-family: ui-monospace, Menlo, Consolas, monospace;
  font-size: {char_height}px; line-height: {line_height}px; }}
{styles}
</style>
<defs>{lines}</defs>
<rect width="{width}" height="{height}" rx="8" fill="#10141c"/>
<g transform="translate(12, 10)">{backgrounds}<g class="{unique_id}-matrix">{matrix}</g></g>
</svg>
"""


class Runs:
    """Runs of one recipe in one folder."""

    def __init__(self, folder: Path, recipe: Path, steps: int, settings: list[str]) -> None:
        """Train nothing yet."""
        self.folder, self.steps = folder, steps
        self._recipe = recipe.absolute()
        self._settings = [f"train.steps={steps}", f"evaluate.every_steps={steps // 3}", *settings]
        self._environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}

    def start(self, name: str, *settings: str) -> subprocess.Popen[bytes]:
        """Start or go on with a run."""
        words = ["train", str(self._recipe), "--quiet", "--run-dir", f"runs/{name}"]
        return subprocess.Popen(
            [*OURS, *words, *self._settings, *settings], cwd=self.folder, env=self._environment
        )

    def wait_for_step(self, name: str, step: int) -> None:
        """Wait until a run has come to a step."""
        ledger = self.folder / "runs" / name / "ledger.jsonl"

        def is_there() -> bool:
            if not ledger.exists():
                return False
            found = LedgerReader(ledger).tail(1, StepEvent)
            return bool(found) and found[-1].step >= step

        wait_until(is_there, f"step {step} of {name}", timeout_s=PATIENCE_S)

    def seen(self, *words: str) -> str:
        """Return what a command shows on a terminal."""
        return on_terminal([*OURS, *words], self.folder, self._environment)


def on_terminal(command: list[str], folder: Path, environ: dict[str, str]) -> str:
    """Return what a command shows on a terminal of `WIDTH` columns."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 40, WIDTH, 0, 0))
    terminal = {**environ, "TERM": "xterm-256color"}
    read: list[bytes] = []

    def drain() -> None:
        with suppress(OSError):
            while part := os.read(leader, 65536):
                read.append(part)

    reader = threading.Thread(target=drain)
    reader.start()
    subprocess.run(command, cwd=folder, env=terminal, stdout=follower, check=True)
    os.close(follower)
    reader.join()
    os.close(leader)
    return b"".join(read).decode().replace("\r\n", "\n")


def draw(shown: str, path: Path) -> None:
    """Draw what a terminal shows."""
    console = Console(
        record=True, width=WIDTH, file=io.StringIO(), color_system="standard", force_terminal=True
    )
    console.print(Text.from_ansi(shown.rstrip()))
    lines = shown.rstrip().count("\n") + 1
    form = SVG.replace("{height}", f"{LINE_HEIGHT * lines + 24:.0f}")
    path.write_text(console.export_svg(code_format=form, title=""), encoding="utf-8")


def make(runs: Runs) -> str:
    """Train all runs, and return what `status` says of them."""
    third = runs.steps // 3
    for name, settings in (("quickstart", []), ("other-seed", ["train.seed=1"])):
        stopped = runs.start(name, *settings)
        runs.wait_for_step(name, third)
        stopped.send_signal(signal.SIGINT)
        assert stopped.wait(PATIENCE_S) == EXIT_INTERRUPTED
    failing = runs.start("too-fast", "train.learning_rate=1e30", "train.non_finite=stop")
    assert failing.wait(PATIENCE_S) == EXIT_DO_NOT_RETRY
    running = runs.start("quickstart")
    runs.wait_for_step("quickstart", 2 * third + 1)
    shown = runs.seen("status")
    assert running.wait(PATIENCE_S) == EXIT_DONE
    return shown


def main() -> None:
    """Make both pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("settings", nargs="*", metavar="key=value")
    parser.add_argument("--steps", type=int, default=24, help="of each run (default: 24)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder (default: docs)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        runs = Runs(Path(name), options.recipe, options.steps, options.settings)
        draw(f"$ peft-dist status\n{make(runs)}", options.out / "status.svg")
        runs.seen("report", "runs/quickstart")
        report = runs.folder / "runs/quickstart/report.html"
        picture_of(report, options.out / "report.webp")


def picture_of(report: Path, path: Path) -> None:
    """Take a picture of the top of a report."""
    with tempfile.TemporaryDirectory() as name, started(Path(name), page_limit_s=300.0) as browser:
        browser.open(report, size=REPORT)
        browser.until("return document.querySelectorAll('.plot .main-svg').length", bool)
        browser.screenshot(path, height=REPORT[1])


if __name__ == "__main__":
    main()
