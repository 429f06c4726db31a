"""Draw the figures of `scale.py` as one SVG, by plotly in a browser without a window.

PYTHONPATH=. python benchmarks/scale_plot.py scale.json docs/scale.svg     # needs chromium
"""

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs
from plotly.subplots import make_subplots
from scale import FABRICS, STRATEGIES, per_gpu_at_first

from tests.browser import started

COLOURS = {"ddp": "#7a5195", "fsdp": "#d95f02", "hsdp": "#1b7837"}
DASHES = {"InfiniBand": "solid", "Ethernet": "dot"}
WIDTH, HEIGHT = 1100, 640
DRAW = """
const done = arguments[arguments.length - 1], figure = %s;
const size = {format: "svg", width: %d, height: %d};
Plotly.toImage(figure, size).then(done, (error) => done("failed: " + error));
"""


def figure(found: dict[str, Any]) -> Any:
    """Return a panel for each model and kind of scaling: speed per GPU over the number of GPUs."""
    kinds = ("strong", "weak")
    titles = [f"{model}, {kind}" for kind in kinds for model in found]
    drawn = make_subplots(rows=2, cols=len(found), subplot_titles=titles, shared_yaxes=True)
    for row, kind in enumerate(kinds, 1):
        for column, (model, parts) in enumerate(found.items(), 1):
            for fabric in FABRICS:
                points = parts[kind][fabric]
                for strategy in STRATEGIES:
                    drawn.add_trace(
                        _line(points, strategy, fabric, shown=(row, model) == (1, "8B")),
                        row=row,
                        col=column,
                    )
    drawn.update_xaxes(type="log", tickvals=[8, 32, 128, 512], title_text="GPUs")
    drawn.update_yaxes(range=[0, 1.5], tickformat=".0%")
    drawn.update_yaxes(title_text="speed per GPU", col=1)
    drawn.update_layout(template="plotly_white", font={"size": 12}, margin={"t": 40, "r": 10})
    drawn.update_layout(legend={"orientation": "h", "y": -0.12, "entrywidth": 140})
    return drawn


def _line(points: Sequence[dict[str, Any]], strategy: str, fabric: str, *, shown: bool) -> Any:
    own = [point for point in points if point["strategy"] == strategy]
    first = per_gpu_at_first([*points])
    return go.Scatter(
        x=[point["gpus"] for point in own],
        y=[point["tokens_per_s"] / point["gpus"] / first for point in own],
        mode="lines+markers",
        name=f"{strategy}, {fabric}",
        line={"color": COLOURS[strategy], "dash": DASHES[fabric]},
        marker={"size": 5},
        showlegend=shown,
    )


def svg(drawn: Any) -> str:
    """Return a figure as the text of an SVG.

    Raises:
        RuntimeError: Where plotly cannot draw it.
    """
    with tempfile.TemporaryDirectory() as folder, started(Path(folder)) as browser:
        page = Path(folder, "page.html")
        page.write_text(f"<html><script>{get_plotlyjs()}</script></html>", encoding="utf-8")
        browser.open(page)
        script = DRAW % (drawn.to_json(), WIDTH, HEIGHT)
        found = str(browser._driver.execute_async_script(script))
    head, _, text = found.partition(",")
    if not head.startswith("data:image/svg+xml"):
        raise RuntimeError(found[:200])
    return unquote(text)


def main() -> int:
    """Draw."""
    found = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    Path(sys.argv[2]).write_text(svg(figure(found)) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
