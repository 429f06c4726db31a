"""The day that chat templates of a run print: one for all ranks, starts and nodes."""

import datetime as dt
from pathlib import Path

import pytest
import torch
from torch.distributed import HashStore

from peft_dist.common.errors import RecipeError
from peft_dist.config import Recipe, load_recipe
from peft_dist.config.run_date import date_in, with_date
from peft_dist.distributed.world import World
from peft_dist.finetune import _with_date_of_main

RAW = {"model": {"name": "m"}, "data": {"train": "d"}}
UNDATED = Recipe.model_validate(RAW)
DAYS = (dt.date(2026, 1, 31), dt.date(2026, 2, 1))


def test_a_date_that_is_written_is_kept_and_another_is_set() -> None:
    dated = with_date(UNDATED, DAYS[0])
    assert dated.data.date == DAYS[0]
    assert with_date(dated, DAYS[1]) is dated
    today = dt.datetime.now(dt.UTC).date()
    assert with_date(UNDATED).data.date in (today, today + dt.timedelta(days=1))


def test_all_ranks_take_the_date_of_rank_0_whatever_their_clocks_say() -> None:
    store = HashStore()
    recipes = [with_date(UNDATED, DAYS[0]), UNDATED, with_date(UNDATED, DAYS[1])]
    found = [
        _with_date_of_main(recipe, World(rank, 3, rank, 3, torch.device("cpu")), store)
        for rank, recipe in enumerate(recipes)
    ]
    assert [recipe.data.date for recipe in found] == [DAYS[0]] * 3
    assert len({recipe.model_dump_json() for recipe in found}) == 1


@pytest.mark.parametrize("date", ["2026-02-30", "tomorrow", "5", "true"])
def test_a_date_that_is_no_day_is_one_line(recipe_file: Path, date: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe_file, [f"data.date={date}"])
    assert str(caught.value).endswith("must be a day such as 2026-01-31 or null")


def test_a_file_without_a_date_has_none(tmp_path: Path, recipe_file: Path) -> None:
    assert date_in(recipe_file) is None
    assert date_in(tmp_path / "absent.yaml") is None
