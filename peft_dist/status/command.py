"""`peft-dist status`: how runs are, in one table, now or again and again.

Gathers what directories and Slurm say; `run_state.py` judges it and `table.py` draws it. Changes
nothing.
"""

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peft_dist.common.errors import EXIT_DONE
from peft_dist.common.table import joined, print_lines, stdout_form
from peft_dist.common.terminal import is_terminal, size, terminal_console
from peft_dist.run.command_folder import COMMAND_FILE, find_folder
from peft_dist.run.paths import ARRAY_FILE
from peft_dist.run.sweep import array_elements
from peft_dist.slurm.job_state import JobState, job_states
from peft_dist.slurm.pending import fair_shares, jobs_ahead
from peft_dist.status.run_state import Reading, RunView, read_run, result_of, view
from peft_dist.status.table import ArrayView, render

SHOWN_RUNS = 20
"""Runs that are shown where none is named."""
REDRAW_EVERY_S = 2.0
ASK_SLURM_EVERY_S, ASK_SLURM_AT_LEAST_EVERY_S = 10.0, 60.0
"""Seconds for which an answer of Slurm is good: its controller serves everybody. As long as its
answers stay the same it is asked less and less often."""
SLURM_TIMEOUT_S = 10.0

View = RunView | ArrayView
Answers = dict[str, JobState]
Draw = Callable[[Sequence[str]], None]
Judge = Callable[[Reading, str], RunView]


def show_status(run_dirs: Sequence[str], *, watch: bool = False, as_json: bool = False) -> int:
    """Print how runs are; with `watch` until Ctrl-C.

    Args:
        run_dirs: Run directories or folders of arrays; none for the newest below ./runs.
        watch: Print it again every `REDRAW_EVERY_S`.
        as_json: Print one JSON list, with `watch` one per line, instead of the table.

    Raises:
        RunDirError: For a folder that holds neither a run nor an array.
    """
    answers: Answers = {}
    good_until_s, good_for_s = 0.0, ASK_SLURM_EVERY_S
    is_live = watch and not as_json and is_terminal(sys.stdout)
    try:
        with _display(is_live=is_live) as draw:
            while True:
                paths = [find_folder(name) for name in run_dirs] or newest_runs(Path("runs"))
                before, is_old = answers, time.monotonic() >= good_until_s
                answers = {} if is_old else answers
                views = gather(paths, answers, with_queue=not watch)
                if is_old:
                    good_for_s = 1.5 * good_for_s if answers == before else ASK_SLURM_EVERY_S
                    good_until_s = time.monotonic() + min(good_for_s, ASK_SLURM_AT_LEAST_EVERY_S)
                account = [] if watch or as_json else _account(views)
                lines = _json(views, watch=watch) if as_json else _table(views, watch=watch)
                draw([*lines, *account])
                if not watch:
                    return EXIT_DONE
                time.sleep(REDRAW_EVERY_S)
    except KeyboardInterrupt:
        if not watch:
            raise
        return EXIT_DONE


def newest_runs(folder: Path, at_most: int = SHOWN_RUNS) -> list[Path]:
    """Return the runs and arrays in a folder, the newest first."""
    made: dict[Path, float] = {}
    if folder.is_dir():
        for path in folder.absolute().iterdir():
            for file in (path / ARRAY_FILE, path / COMMAND_FILE, path / "run.json"):
                if file.is_file():
                    made[path] = file.stat().st_mtime
                    break
    return sorted(made, key=lambda path: (-made[path], path.name))[:at_most]


def gather(
    paths: Sequence[Path], answers: Answers | None = None, *, with_queue: bool = False
) -> list[View]:
    """Return how runs and arrays are, after asking Slurm once for all of them.

    Args:
        paths: Their folders.
        answers: What Slurm has said lately; the jobs that are missing in it are asked, and added.
        with_queue: Ask for the places of jobs that wait, too.
    """
    answers = {} if answers is None else answers
    names = _names(paths)
    arrays = {path: array_elements(path) for path in paths}
    readings = {
        path: [read_run(path / element["run_dir"]) for element in elements] or [read_run(path)]
        for path, elements in arrays.items()
    }
    # A run that has finished proves it; its job may be forgotten.
    open_runs = [one for found in readings.values() for one in found if not one.run.is_finished]
    new = [job for reading in open_runs for job in reading.jobs if job not in answers]
    answers.update(job_states(new, timeout_s=SLURM_TIMEOUT_S))
    now = time.time()
    pending = [job for job, state in answers.items() if state.reason in ("Priority", "Resources")]
    ahead = jobs_ahead(pending) if pending and with_queue else {}

    def one(reading: Reading, name: str) -> RunView:
        return view(reading, answers, name=name, now=now, ahead=ahead)

    return [
        _array(path, names[path], elements, readings[path], one)
        if (elements := arrays[path])
        else one(readings[path][0], names[path])
        for path in readings
    ]


def _array(
    path: Path,
    name: str,
    elements: Sequence[dict[str, Any]],
    readings: Sequence[Reading],
    one: Judge,
) -> ArrayView:
    views = [
        one(reading, element["run_dir"])
        for element, reading in zip(elements, readings, strict=True)
    ]
    jobs = {element.job.partition("_")[0] for element in views}
    return ArrayView(
        run=name,
        path=str(path),
        job=jobs.pop() if len(jobs) == 1 else "",
        elements=views,
        settings=[[str(text) for text in element.get("settings", [])] for element in elements],
        results=[result_of(reading.run) for reading in readings],
    )


def _names(paths: Sequence[Path]) -> dict[Path, str]:
    """Return what to call each run: its folder's name where that is enough."""
    alike = Counter(path.name for path in set(paths))
    return {path: path.name if alike[path.name] == 1 else os.path.relpath(path) for path in paths}


@contextmanager
def _display(*, is_live: bool) -> Iterator[Draw]:
    """Yield what shows lines: over those before on a terminal, else below them."""
    if not is_live:
        yield print_lines
        return
    from rich.live import Live
    from rich.text import Text

    with Live(
        console=terminal_console(sys.stdout),
        auto_refresh=False,
        redirect_stdout=False,
        redirect_stderr=False,
    ) as live:
        yield lambda lines: live.update(Text.from_ansi(joined(lines)), refresh=True)


def _json(views: Sequence[View], *, watch: bool) -> list[str]:
    """Return all that is known, with `watch` as one line."""
    found = [_facts(entry) for entry in views]
    return [json.dumps(found, indent=None if watch else 2)]


def _table(views: Sequence[View], *, watch: bool) -> list[str]:
    width, colour = stdout_form()
    lines = render(views, width, colour=colour) if views else ["no runs below ./runs"]
    if not watch:
        return lines
    if width is None:
        return [*lines, ""]
    height = size(sys.stdout)[1]
    left_out = len(lines) - (height - 2)
    if left_out > 0:
        lines = [*lines[: height - 3], f"... and {left_out + 1} more lines"]
    return [*lines, f"{time.strftime('%H:%M:%S')}  Ctrl-C ends"]


def _account(views: Sequence[View]) -> list[str]:
    """Return lines on what all runs have used, and what one may expect to get."""
    runs = [
        run
        for entry in views
        for run in (entry.elements if isinstance(entry, ArrayView) else [entry])
    ]
    hours = [run.gpu_hours for run in runs if run.gpu_hours is not None]
    lines = [f"GPU hours in all: {sum(hours):,.1f}"] if len(hours) > 1 else []
    if any(run.state == "PENDING" for run in runs):
        shares = fair_shares()
        lines += [f"fair share of {name}: {share:.2f} of 1" for name, share in shares.items()]
    return lines


def _facts(entry: View) -> dict[str, Any]:
    if isinstance(entry, RunView):
        return asdict(entry)
    elements = [
        {**asdict(element), "settings": settings, "result": result}
        for element, settings, result in zip(
            entry.elements, entry.settings, entry.results, strict=True
        )
    ]
    return {
        "run": entry.run,
        "path": entry.path,
        "job": entry.job,
        "counts": entry.counts,
        "elements": elements,
    }
