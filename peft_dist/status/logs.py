"""`peft-dist logs`: what the processes of a run said in its newest start, and go on to say.

Reads files; of a job it only asks whether it is over. Nothing that is shown steers the terminal.
"""

import re
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from peft_dist.common.console import say, show
from peft_dist.common.errors import EXIT_DONE, RunDirError
from peft_dist.run.command_folder import find_folder
from peft_dist.run.directory import RunDir
from peft_dist.run.job_events import newest_job
from peft_dist.run.paths import ARRAY_FILE
from peft_dist.slurm.job_state import UNKNOWN, is_live, job_states
from peft_dist.status.log_tail import Tail, printable
from peft_dist.status.run_state import CRASHED, NOT_STARTED, read_run, view

DEFAULT_LINES = 50
POLL_S = 0.3
ASK_SLURM_EVERY_S = 6.0
"""Seconds between two questions whether the job is over."""
ASK_SLURM_AGAIN_S = 30.0
"""The same where Slurm could not tell."""
LOOK_EVERY_S = 1.0
"""Seconds between two looks whether a run without a job is over."""
SLURM_TIMEOUT_S = 5.0
"""How long Slurm may take to answer: meanwhile nothing is shown."""
RESTART_S = 15.0
"""How long a launcher may take to start crashed processes again, where no job tells that it is."""
START = re.compile(r"(?P<job>[0-9]+(?:_[0-9]+)?)-(?P<restart>[0-9]+)")
"""The folder of one start of a job."""
RANK = re.compile(r".*\.rank-(?P<rank>[0-9]+)\.[0-9]+\.log")


def show_logs(
    run_dir: str | Path,
    *,
    rank: int | None = None,
    follow: bool = False,
    lines: int = DEFAULT_LINES,
) -> int:
    """Print the end of a run's logs; with `follow` go on until the run is over, or Ctrl-C.

    Args:
        run_dir: The run directory.
        rank: Only this rank's newest log.
        follow: Print what comes, of later starts too.
        lines: How many lines of each file to begin with.

    Raises:
        RunDirError: For a folder without a run, a run without logs, or without one of that rank.
    """
    path = Path(run_dir).absolute()
    if (path / ARRAY_FILE).is_file():
        raise RunDirError(
            "is an array", where=str(run_dir), remedy=f"name one of its runs: {path / '000'}"
        )
    run = RunDir(find_folder(run_dir))
    shown = _Shown(lines)
    if not follow:
        files = log_files(run.path, rank=rank)
        _show_cause(run)
        shown.update(files)
        shown.close()
        return EXIT_DONE
    with suppress(KeyboardInterrupt):
        _follow(run, shown, rank)
    return EXIT_DONE


def _show_cause(run: RunDir) -> None:
    """Say first why the run ended, where its folder tells; the end of a log is often about less."""
    reading = read_run(run.path)
    if not reading.jobs:
        found = view(reading, {}, name="", now=time.time())
        if found.cause:
            show(f"peft-dist: {found.state}: {found.cause}")


def log_files(run_path: Path, *, rank: int | None = None) -> list[Path]:
    """Return the logs of a run's newest start: the job's own, then one per node.

    Args:
        run_path: The run directory.
        rank: Return the newest log of this rank instead.

    Raises:
        RunDirError: Where there is none.
    """
    starts = _starts(run_path / "logs")
    if rank is not None:
        return [_rank_log(run_path, starts, rank)]
    launcher = RunDir(run_path).launcher_log
    if launcher.is_file() and (not starts or _changed_s(launcher) > _changed_s(starts[-1])):
        return [launcher]
    if starts:
        job = _group(START, starts[-1], "job")
        nodes = [path for path in starts[-1].glob("*.log") if not RANK.fullmatch(path.name)]
    else:
        job, nodes = newest_job(run_path) or "", []
    # An element's job writes beside those of the whole array.
    own = [run_path / "logs", run_path.parent / "logs"]
    found = [folder / f"job-{job}.log" for folder in own]
    files = [path for path in found if job and path.is_file()][:1]
    files += sorted(nodes, key=lambda path: natural(path.name))
    if not files:
        raise RunDirError(
            "has no logs yet",
            where=str(run_path),
            remedy=f"see how it is: peft-dist status {run_path}",
        )
    return files


def natural(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts numbers in names by their value: node9 before node10."""
    parts = re.split(r"([0-9]+)", name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def _starts(logs: Path) -> list[Path]:
    """Return the folders of a run's job starts, the oldest first.

    Job ids begin anew some day, so that of two jobs the folders tell which is the newer.
    """
    made: dict[str, float] = {}
    found = [path for path in logs.glob("*-*") if START.fullmatch(path.name) and path.is_dir()]
    for path in found:
        job = _group(START, path, "job")
        made[job] = max(made.get(job, 0.0), path.stat().st_mtime)

    def age(path: Path) -> tuple[float, list[tuple[int, str]], int]:
        job = _group(START, path, "job")
        return made[job], natural(job), int(_group(START, path, "restart"))

    return sorted(found, key=age)


def _rank_log(run_path: Path, starts: Sequence[Path], rank: int) -> Path:
    by_start = [
        [path for path in start.iterdir() if RANK.fullmatch(path.name) and path.exists()]
        for start in starts
    ]
    for logs in reversed(by_start):
        # It may have moved to another node with a restart in place.
        own = [path for path in logs if int(_group(RANK, path, "rank")) == rank]
        if own:
            return max(own, key=lambda path: (_changed_s(path), natural(path.name)))
    has = _ranks(run_path, starts)
    problem = f"has no log of rank {rank}" + (f": {has}" if has else "")
    raise RunDirError(problem, where=str(run_path), remedy="leave out --rank")


def _ranks(run_path: Path, starts: Sequence[Path]) -> str:
    """Return in words which ranks have logs; nothing where none has begun to write."""
    logs = [path for start in starts for path in start.iterdir() if RANK.fullmatch(path.name)]
    if logs:
        known = sorted({int(_group(RANK, path, "rank")) for path in logs})
        return f"ranks {', '.join(map(str, known))} have one"
    return "all ranks write to launcher.log" if RunDir(run_path).launcher_log.is_file() else ""


def _group(pattern: re.Pattern[str], path: Path, name: str) -> str:
    match = pattern.fullmatch(path.name)
    assert match is not None
    return match[name]


def _changed_s(path: Path) -> float:
    """Return when a file, or any file in a folder, was last written to."""
    times = [0.0]
    for some in (path, *(path.iterdir() if path.is_dir() else ())):
        with suppress(OSError):
            times.append(some.stat().st_mtime)
    return max(times)


class _Shown:
    """Prints files from where it left them, each under its name where there are several."""

    def __init__(self, lines: int) -> None:
        """Begin each of the first files so many lines before its end."""
        self._lines: int | None = lines
        self._tails: dict[Path, Tail] = {}
        self._current: Path | None = None

    def update(self, paths: Sequence[Path]) -> None:
        """Print what has come to these files, and to all that were shown before."""
        for path in paths:
            if path not in self._tails:
                self._tails[path] = Tail(path, self._lines)
        if paths:
            self._lines = None  # of files that come later nothing is left out
        for tail in self._tails.values():
            while text := tail.more():
                self._print(tail.path, text)

    def close(self) -> None:
        """Print the lines that nobody has ended."""
        for tail in self._tails.values():
            self._print(tail.path, tail.rest())

    def _print(self, path: Path, text: str) -> None:
        if not text:
            return
        if path != self._current and len(self._tails) > 1:
            blank = "\n" if self._current else ""
            show(f"{blank}==> {_name(path)} <==")
        self._current = path
        show(text, end="")


def _name(path: Path) -> str:
    """Return a log's name, with its job's start where it has one."""
    name = path.name if path.parent.name == "logs" else f"{path.parent.name}/{path.name}"
    return printable(name)


class _Watch:
    """Looks now and then whether a run is over."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._look_at_s = 0.0  # on the monotonic clock
        self._crashed_at_s: float | None = None
        self._told = False

    def is_over(self) -> bool:
        """Whether nothing more can come; of a state that nobody can tell, that is not so."""
        now_s = time.monotonic()
        if now_s < self._look_at_s:
            return False
        self._look_at_s = now_s + LOOK_EVERY_S
        reading = read_run(self._path)
        answers = job_states(reading.jobs, timeout_s=SLURM_TIMEOUT_S)
        if any(is_live(answer.state) for answer in answers.values()):
            self._look_at_s = now_s + ASK_SLURM_EVERY_S  # also where it has trained to its end
            return False
        found = view(reading, answers, name="", now=time.time())
        if found.state == UNKNOWN:
            self._look_at_s = now_s + ASK_SLURM_AGAIN_S
            if not self._told:
                self._told = True
                say(f"peft-dist: state unknown: {found.cause}; Ctrl-C ends", sys.stderr)
        if found.state in (UNKNOWN, NOT_STARTED) or is_live(found.state):
            self._crashed_at_s = None
            return False
        if found.state == CRASHED:
            self._crashed_at_s = self._crashed_at_s or now_s
            return now_s - self._crashed_at_s >= RESTART_S
        return True


def _follow(run: RunDir, shown: _Shown, rank: int | None) -> None:
    """Print logs until the run is over and they have been read to their end."""
    watch, seen, waits = _Watch(run.path), False, False
    while True:
        over = watch.is_over()
        paths: list[Path] = []
        try:
            paths = log_files(run.path, rank=rank)
            seen = True
        except RunDirError as error:
            never = rank is not None and _ranks(run.path, _starts(run.logs))
            if not seen and (over or never):
                raise
            if not seen and not waits:
                say(f"peft-dist: {error}; waiting", sys.stderr)
            waits = True
        shown.update(paths)
        if over:
            shown.close()
            return
        time.sleep(POLL_S)
