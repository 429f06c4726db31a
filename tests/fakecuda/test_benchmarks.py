"""What measures a real card runs to its end, as far as that can be seen without one."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from peft_dist.model.attention import VARLEN_ATTENTION
from tests.fakecuda.rank import first_rank


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module("card")


def test_a_card_is_measured_as_the_product_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, card: Any
) -> None:
    world = first_rank(monkeypatch)
    assert card.main(["--dry", "--json", str(tmp_path / "card.json")]) == 0
    report = json.loads((tmp_path / "card.json").read_text(encoding="utf-8"))
    assert report["facts"]["device"] == world.device_name
    assert report["left_out"] == []
    assert len(report["speed"]) == len({row["case"] for row in report["speed"]}) == 36
    assert {row["attention"] for row in report["speed"]} == {VARLEN_ATTENTION}
    assert all(row["tokens_per_s_per_gpu"] > 0 for row in report["speed"])
    assert {"attention_window_difference", "cross_entropy_difference"} <= report["values"].keys()


def test_without_time_every_case_is_left_out_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, card: Any
) -> None:
    first_rank(monkeypatch)
    monkeypatch.setattr(card, "repeats", lambda *_: {"deterministic": True})
    assert card.main(["--dry", "--seconds", "0", "--json", str(tmp_path / "card.json")]) == 0
    report = json.loads((tmp_path / "card.json").read_text(encoding="utf-8"))
    assert (len(report["speed"]), len(report["left_out"])) == (0, 36)
