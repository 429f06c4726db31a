"""Save a project's dashboard at W&B: the process of `peft-dist dashboard`.

It is one saved view, created or updated; other views of the project are left alone. The names of
metrics are those of `rows.py`.
"""

import argparse
import hashlib
import os
import sys
from collections.abc import Sequence
from typing import Any

from peft_dist.common.console import say
from peft_dist.common.errors import ERROR_PREFIX, EXIT_CRASHED, EXIT_DONE, PeftDistError
from peft_dist.tracking.wandb import rows
from peft_dist.tracking.wandb.identity import wandb_environment
from peft_dist.tracking.wandb.wandb_run import NotAllowed, Unreachable, end_service, explained

NAME = "peft-dist"
SHOWN_RUNS = 20

Lines = tuple[str, tuple[str, ...]]
"""A panel: its title, and the figures whose lines it shows, or one pattern of their names."""
SECTIONS: dict[str, tuple[Lines, ...]] = {
    "Training": (
        ("Loss", (rows.LOSS,)),
        ("Held-out loss", (rows.HELD_OUT_LOSS,)),
        ("Held-out accuracy", (rows.HELD_OUT_ACCURACY,)),
        ("Learning rate", (rows.LEARNING_RATE,)),
        ("Gradient norm", (rows.GRADIENT_NORM,)),
    ),
    "Preferences": (
        ("Rewards of the chosen and the rejected", (rows.REWARD_CHOSEN, rows.REWARD_REJECTED)),
        ("Reward margin", (rows.REWARD_MARGIN, rows.HELD_OUT_MARGIN)),
        ("Pairs in the right order", (rows.REWARD_ACCURACY,)),
    ),
    "Throughput and memory": (
        ("Tokens per second", (rows.TOKENS_PER_S,)),
        ("Model FLOPs utilisation (4 N per token)", (rows.MFU,)),
        ("Peak memory, bytes", (rows.PEAK_MEMORY,)),
        ("Peak memory of each rank, bytes", (rows.RANK_MEMORY_PATTERN,)),
        ("Machine", (rows.SYSTEM_PATTERN,)),
    ),
    "Goodput and restarts": (
        ("Goodput", (rows.GOODPUT,)),
        ("Shares of the time", rows.SHARES),
        ("Attempt", (rows.ATTEMPT,)),
        ("Skipped, rolled back, not saved", rows.MISHAP_COUNTS),
        ("Waiting for checkpoints, s", (rows.CHECKPOINT_STALL_S, rows.CHECKPOINT_WRITE_S)),
    ),
    "Stragglers": (
        ("Slowest rank and median, s a step", (rows.STEP_S_MAX, rows.STEP_S_MEDIAN)),
        ("Which rank is slowest", (rows.SLOWEST_RANK,)),
        ("Each rank, s a step", (rows.RANK_STEP_S_PATTERN,)),
    ),
}
STACKED = ("Shares of the time",)
PATTERNS = (rows.RANK_MEMORY_PATTERN, rows.RANK_STEP_S_PATTERN, rows.SYSTEM_PATTERN)
COMPARED = (
    "method.kind",
    "method.rank",
    "train.learning_rate",
    "train.global_batch_size",
    "train.seed",
)
"""Settings beside which the sweep's results stand."""


def main(argv: Sequence[str]) -> int:
    """Make or update the dashboard of a project; return the exit code."""
    parser = argparse.ArgumentParser(prog="peft-dist dashboard")
    parser.add_argument("project")
    parser.add_argument("--entity")
    options = parser.parse_args(argv)
    environment = wandb_environment(os.environ)
    os.environ.clear()
    os.environ.update(environment)
    try:
        say(save(options.project, options.entity))
    except Unreachable as error:
        say(f"{ERROR_PREFIX}{error}; try again later", sys.stderr)
        return EXIT_CRASHED
    except PeftDistError as error:
        say(f"{ERROR_PREFIX}{error}", sys.stderr)
        return error.exit_code
    return EXIT_DONE


def save(project: str, entity: str | None) -> str:
    """Save the dashboard; return where it is.

    Raises:
        Unreachable: Where W&B does not answer.
        NotAllowed: Where there is no key, or no such project for it.
    """
    import wandb
    from wandb_workspaces.workspaces import internal

    try:
        owner = entity or wandb.Api(timeout=5).default_entity
        view = workspace(owner, project)
        # Its name follows from its place, so that a second time finds the first.
        digest = hashlib.sha256(f"{NAME}/{owner}/{project}".encode()).hexdigest()
        view._internal_name = f"nw-{digest[:11]}-v"
        try:
            there = internal.View.from_name(owner, project, digest[:11])
            view._internal_id = there.id
        except ValueError as error:
            if "not found in project" not in str(error):  # there is no such project
                raise
        view.save()
        return str(view.url)
    except ValueError as error:
        raise NotAllowed(
            str(error).split("\n")[0], where="W&B", remedy="name a project that has runs"
        ) from error
    except Exception as error:
        raise explained(error) from error
    finally:
        end_service(wandb)


def workspace(entity: str | None, project: str) -> Any:
    """Return the dashboard, not saved yet."""
    import wandb_workspaces.workspaces as ws

    sections = [
        ws.Section(
            name=name, is_open=True, panels=[_lines(title, names) for title, names in panels]
        )
        for name, panels in SECTIONS.items()
    ]
    return ws.Workspace(
        entity=entity,
        project=project,
        name=NAME,
        sections=[*sections, ws.Section(name="Sweep comparison", is_open=True, panels=_sweep())],
        settings=ws.WorkspaceSettings(x_axis=rows.STEP, max_runs=SHOWN_RUNS),
    )


def _lines(title: str, names: Sequence[str]) -> Any:
    import wandb_workspaces.reports.v2 as wr

    if names[0] in PATTERNS:
        return wr.LinePlot(title=title, x=rows.STEP, metric_regex=names[0])
    style = "stacked-area" if title in STACKED else None
    return wr.LinePlot(title=title, x=rows.STEP, y=list(names), plot_type=style)


def _sweep() -> list[Any]:
    import wandb_workspaces.reports.v2 as wr

    results = (rows.HELD_OUT_LOSS, rows.HELD_OUT_ACCURACY)
    columns = [wr.ParallelCoordinatesPlotColumn(wr.Config(name)) for name in COMPARED]
    columns += [wr.ParallelCoordinatesPlotColumn(wr.SummaryMetric(name)) for name in results]
    return [
        wr.ParallelCoordinatesPlot(title="Settings and what came of them", columns=columns),
        wr.BarPlot(title="Held-out loss", metrics=[rows.HELD_OUT_LOSS]),
        wr.BarPlot(title="Held-out accuracy", metrics=[rows.HELD_OUT_ACCURACY]),
        wr.RunComparer(diff_only=True),
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
