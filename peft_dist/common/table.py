"""Tables by rich: aligned under their titles, as wide as a terminal and in its colours, or plain.

Whatever stands in a cell is made `printable` first.
"""

import io
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from peft_dist.common.console import printable
from peft_dist.common.terminal import has_colours, size

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

UNLIMITED = 10_000
"""Columns of a file or a pipe: no line of ours is as long."""
GAPS = (2, 1)
"""Blanks between columns, and where that is too wide."""
LEAST_WIDTH = 12
"""A column that is cut keeps this much."""


class Drawn(str):
    """A line of a table, in which rich's colours may stand and nothing that others wrote."""

    __slots__ = ()


@dataclass(frozen=True)
class Column:
    """One column of a table."""

    title: str
    right: bool = False
    """Whether it is aligned to the right, as figures are."""
    cut: bool = False
    """Whether its texts are cut where the table is too wide; else the last ones are."""
    wrap: bool = False
    """Whether its texts go on in another line there."""
    style: Callable[[str], str] = lambda _text: ""
    """Returns rich's style of a text."""


def table_lines(
    columns: Sequence[Column],
    rows: Sequence[Sequence[str] | str],
    *,
    width: int | None = None,
    colour: bool = False,
) -> list[str]:
    """Return the lines of a table, none of them wider than `width`.

    Args:
        columns: What each row has. Where none has a title, there is no line of titles.
        rows: Texts of cells. A row that is one text keeps to no column, and goes on in other lines
            where it is too long; beside such rows no column wraps.
        width: Columns of the terminal; None for as many as it takes.
        colour: Whether lines may hold escape sequences.
    """
    cells = [row for row in rows if not isinstance(row, str)]
    console = _console(width, colour=colour)
    table = _table(columns, cells, GAPS[0])
    wraps = any(column.wrap for column in columns)
    if width is not None and not wraps and table_width(columns, cells) > width:
        table = _table(columns, cells, GAPS[1])
    with console.capture() as captured:
        console.print(table)
    lines: list[str] = [Drawn(line.rstrip()) for line in captured.get().splitlines()]
    if len(cells) == len(rows):
        return lines
    found, below = lines[: -len(cells) or None], iter(lines[-len(cells) or len(lines) :])
    for row in rows:
        found += _wrapped(_one_line(row), width) if isinstance(row, str) else [next(below)]
    return found


def table_width(columns: Sequence[Column], rows: Sequence[Sequence[str] | str]) -> int:
    """Return how wide a table would like to be."""
    cells = [row for row in rows if not isinstance(row, str)]
    return _console(None).measure(_table(columns, cells, GAPS[0])).maximum


def stdout_form() -> tuple[int | None, bool]:
    """Return the width of standard output for `table_lines`, and whether it shows colours."""
    width = size(sys.stdout)[0] if sys.stdout.isatty() else None
    return width, has_colours(sys.stdout)


def joined(lines: Sequence[str]) -> str:
    """Return lines as one text, in which those of tables alone may steer a terminal."""
    return "\n".join(line if isinstance(line, Drawn) else printable(line) for line in lines)


def print_lines(lines: Sequence[str]) -> None:
    """Print lines, some of them of tables."""
    encoding = sys.stdout.encoding or "utf-8"
    text = joined(lines).encode(encoding, errors="replace").decode(encoding)
    print(text, flush=True)  # noqa: T201


def _table(columns: Sequence[Column], rows: Sequence[Sequence[str]], gap: int) -> "Table":
    from rich.table import Table
    from rich.text import Text

    table = Table(
        box=None,
        padding=(0, gap, 0, 0),
        pad_edge=False,
        show_header=any(column.title for column in columns),
        header_style="bold",
    )
    for column in columns:
        table.add_column(
            Text(column.title, no_wrap=True),
            justify="right" if column.right else "left",
            no_wrap=not (column.cut or column.wrap),
            min_width=_least_width(column, rows, columns.index(column)),
            overflow="fold" if column.wrap else "ellipsis",
        )
    for row in rows:
        texts = (
            Text(_one_line(cell), style=column.style(cell), no_wrap=not column.wrap)
            for column, cell in zip(columns, row, strict=True)
        )
        table.add_row(*texts)
    return table


def _least_width(column: Column, rows: Sequence[Sequence[str]], index: int) -> int | None:
    if not column.cut:
        return None
    from rich.cells import cell_len

    return min(LEAST_WIDTH, max((cell_len(row[index]) for row in rows), default=0))


def _console(width: int | None, *, colour: bool = False) -> "Console":
    from rich.console import Console

    return Console(
        file=io.StringIO(),
        width=width or UNLIMITED,
        color_system="standard" if colour else None,
        force_terminal=colour,
        force_jupyter=False,
        highlight=False,
        markup=False,
        emoji=False,
    )


def _wrapped(text: str, width: int | None) -> list[str]:
    if width is None or len(text) <= width:
        return [text]
    indent = " " * (len(text) - len(text.lstrip()) + 2)
    return textwrap.wrap(text, width, subsequent_indent=indent, drop_whitespace=True)


def _one_line(text: str) -> str:
    return printable(text).translate(str.maketrans("\n\t", "??"))
