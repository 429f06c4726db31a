"""What a model writes on to held-out rows, whatever shares it out."""

import pytest

from tests.equivalence.cases import CASES, SINGLE
from tests.equivalence.conftest import Outcomes

pytestmark = pytest.mark.distributed


def test_every_engine_writes_what_one_process_writes(outcome: Outcomes) -> None:
    alone = outcome("written", SINGLE)["samples"]
    assert [(sample["step"], sample["row"]) for sample in alone] == [
        (step, row) for step in (0, 20) for row in (1, 5, 9, 13)
    ]
    for engine in CASES["written"].engines[1:]:
        assert outcome("written", engine)["samples"] == alone, engine


def test_a_trained_model_writes_the_completion_and_ends(outcome: Outcomes) -> None:
    samples = outcome("written", SINGLE)["samples"]
    before, after = samples[:4], samples[4:]
    assert all(sample["predicted"] == sample["expected"] for sample in after), after
    assert all(sample["predicted"] != sample["expected"] for sample in before), before


@pytest.mark.parametrize("name", ["llama-nf4", "bert-nf4"])
def test_choices_and_classes_are_what_scoring_found(outcome: Outcomes, name: str) -> None:
    names = {" cat", " dog"} if name.startswith("llama") else {"animal", "place", "plant"}
    for engine in CASES[name].engines:
        found = outcome(name, engine)["samples"]
        assert found == outcome(name, SINGLE)["samples"]
        assert {sample["expected"] for sample in found} <= names
        assert {sample["predicted"] for sample in found} <= names
