"""A look at the first rows of a recipe, before anything is started: neither torch nor a model.

Finds what is wrong with all rows of a file; the rows after the first are seen when they are
tokenised.
"""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from peft_dist.common.errors import DataError
from peft_dist.config.recipe import Recipe
from peft_dist.config.row_sources import RowSource
from peft_dist.data.preference_rows import read_examples
from peft_dist.data.rows import BadRows
from peft_dist.data.sources import Source, open_source
from peft_dist.data.template_file import read_template

ROWS = 100
"""Rows of each source that are looked at."""
_FOLDER_MARKS = ("dataset_dict.json", "dataset_info.json", "state.json")


def open_row_source(source: RowSource, field: str) -> Source:
    """Find out what a source of a recipe is; `Data.sources` gives it.

    Raises:
        DataError: There is no such thing, it is of an unknown kind, or its chat template is broken.
    """
    assert source.split is not None, "Data.sources fills it in"
    columns = {} if source.columns is None else source.columns.names()
    found = open_source(source.path, split=source.split, field=field, columns=columns)
    return (
        found
        if source.template is None
        else replace(found, template=read_template(source.template))
    )


def check_first_rows(recipe: Recipe) -> None:
    """Look whether the rows can be read at all: files, their form, and the first rows in them.

    What is not on this machine is passed over, as are hub names and the content of folders that
    `datasets` saved: reading those takes libraries that take longer to import than this may.

    Raises:
        DataError: For a source that cannot be read, has no rows, or has more bad ones than may be.
    """
    for opened in _sources(recipe):
        if opened.kind == "folder":
            _check_folder(Path(opened.name))
        elif _can_look(opened):
            bad = BadRows.as_allowed(opened, recipe.data)
            for _ in read_examples(recipe, opened, bad, most=ROWS):
                pass


def hub_sources(recipe: Recipe) -> list[Source]:
    """Return the sources of a recipe's rows that are on a hub.

    Raises:
        DataError: As `open_row_source`.
    """
    return [source for source in _sources(recipe) if source.kind == "hub"]


def _sources(recipe: Recipe) -> list[Source]:
    data = recipe.data
    given = {"data.train": data.sources("train")}
    if data.held_out is None:
        given["data.eval"] = data.sources("eval")
    return [open_row_source(source, field) for field, found in given.items() for source in found]


def _can_look(source: Source) -> bool:
    if source.kind == "hub" or (source.kind == "parquet" and find_spec("pyarrow") is None):
        return False
    # to find the first rows of the last tenth, all would have to be read
    return source.part is None or not source.part.is_relative


def _check_folder(folder: Path) -> None:
    if not any((folder / name).is_file() for name in _FOLDER_MARKS):
        raise DataError(
            "not a folder that `datasets` saved",
            where=str(folder),
            remedy="name a file, or a folder made by Dataset.save_to_disk",
        )
