"""`peft-dist report`: read run directories, write the page, say where it is."""

import importlib.util
import webbrowser
from collections.abc import Sequence
from pathlib import Path

from peft_dist.common import console
from peft_dist.common.atomic import replace_file
from peft_dist.common.errors import EXIT_DONE, PeftDistError
from peft_dist.report.run_data import read_runs
from peft_dist.report.text import size
from peft_dist.run.directory import RunDir

SEVERAL = "report.html"
"""Name of the page about several runs, in the current folder."""


def write_report(run_dirs: Sequence[str], *, out: str | None, show: bool) -> int:
    """Write the page and return the exit code.

    Args:
        run_dirs: Folders of runs.
        out: The file to write. Default: in the run's folder, or, of several runs, in this one.
        show: Whether to open it in a browser.

    Raises:
        PeftDistError: For a folder without a run, a missing package, or a file that cannot be
            written.
    """
    if importlib.util.find_spec("plotly") is None:
        raise PeftDistError("plotly is not installed", remedy="pip install 'peft-dist[report]'")
    runs = read_runs(run_dirs)
    from peft_dist.report.page import render_page

    path = Path(out) if out else RunDir(runs[0].path).report if len(runs) == 1 else Path(SEVERAL)
    text = render_page(runs, path.parent)
    try:
        replace_file(path, text)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise PeftDistError(
            f"cannot be written: {reason}", where=str(path), remedy="choose another file with --out"
        ) from error
    console.show(f"{path} ({size(len(text.encode()))})")
    if show and not webbrowser.open(path.absolute().as_uri()):
        raise PeftDistError("no browser was found", remedy=f"open {path} in one yourself")
    return EXIT_DONE
