"""`peft-dist doctor`: what of this machine, or of a recipe's needs, would end a run or slow it.

Makes the checks of `peft_dist.checks`, as the pre-flight of a Slurm job does on every node, and
looks at a recipe besides. Imports neither torch nor any other part of the data plane.
"""

import os
from collections.abc import Iterator

from peft_dist.checks.checks import Looking
from peft_dist.checks.context import CheckContext
from peft_dist.checks.finding import Finding
from peft_dist.checks.network import hub_is_off
from peft_dist.common.errors import EXIT_DONE, EXIT_USER_ERROR, PeftDistError
from peft_dist.common.table import Column, print_lines, stdout_form, table_lines
from peft_dist.config import Recipe, load_recipe
from peft_dist.config.cluster import Cluster, load_cluster
from peft_dist.plan.plan import read_config, subject_of
from peft_dist.plan.settle import cluster_hardware, settle

HANG_MARGIN = 3.0
"""Times a planned step that a watchdog should wait at least."""

_STYLES = {"ok": "green", "note": "yellow", "bad": "red"}
_COLUMNS = (Column("", style=lambda level: _STYLES[level]), Column("", wrap=True))


def examine(recipe_file: str | None, cluster_file: str | None) -> int:
    """Print every finding; return 2 where one would end a run.

    Raises:
        PeftDistError: For a cluster file that cannot be used as written.
    """
    cluster = None if cluster_file is None else load_cluster(cluster_file)
    found = Looking(CheckContext()).findings()
    if recipe_file is not None:
        try:
            found += _recipe(load_recipe(recipe_file), cluster)
        except PeftDistError as error:
            found.append(Finding("bad", "recipe", str(error)))
    width, colour = stdout_form()
    rows = [(finding.level, finding.line) for finding in found]
    print_lines(table_lines(_COLUMNS, rows, width=width, colour=colour))
    return EXIT_USER_ERROR if any(one.level == "bad" for one in found) else EXIT_DONE


def _recipe(recipe: Recipe, cluster: Cluster | None) -> Iterator[Finding]:
    """Look whether a recipe's model can be found, and whether it fits."""
    try:
        config = read_config(
            recipe.model.name, recipe.model.revision, network=not hub_is_off(os.environ)
        )
    except PeftDistError as error:
        yield Finding("bad", "model", str(error))
        return
    try:
        subject = subject_of(recipe, config)
    except PeftDistError as error:
        yield Finding("note", "plan", f"no plan: {error}")
        return
    text = f"model {recipe.model.name}: {subject.shape.parameters:,} parameters"
    yield Finding("ok", "model", text)
    hardware = None if cluster is None else cluster_hardware(cluster)
    if hardware is None:
        return
    settled = settle(recipe, hardware, 1)
    if settled.estimate is None:
        return
    if not settled.fits:
        yield Finding("bad", "plan", f"does not fit on one node: {settled.remedy}")
    step_s, limit_s = settled.estimate.seconds.total, recipe.watchdog.min_s
    if HANG_MARGIN * step_s > limit_s:
        yield Finding(
            "note",
            "watchdog",
            f"a step is planned to take {step_s:.0f} s, and counts as hung after {limit_s:g}",
            f"raise watchdog.min_s to {HANG_MARGIN * step_s:.0f}",
        )
