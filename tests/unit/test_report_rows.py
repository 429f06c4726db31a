"""The report says what became of the rows."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

from peft_dist.data.counts import SourceRows
from peft_dist.report.differences import _rows
from peft_dist.report.run_data import RunData


def run_with(result: dict[str, Any]) -> RunData:
    return cast(RunData, SimpleNamespace(result=result))


def test_rows_of_all_sources_are_counted_and_lost_ends_are_told() -> None:
    one = SourceRows("a", rows=1000, cut=20, lost_end=7, dropped=3, bad=((1, "x"),))
    whole = replace(one, rows=50, cut=0, lost_end=0, dropped=0, bad=())
    run = run_with({"rows": {"train": [one.facts(), whole.facts()], "eval": [whole.facts()]}})
    told = "1,050, 20 cut, 7 without their end token, 3 dropped, 1 malformed"
    assert _rows(run, "train") == told
    assert _rows(run, "eval") == "50"


def test_a_result_without_rows_tells_nothing() -> None:
    for result in ({}, {"rows": 3}, {"rows": {"train": 3, "eval": []}}):
        assert _rows(run_with(result), "train") == ""
