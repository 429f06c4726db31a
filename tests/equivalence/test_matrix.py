"""Every method on every engine, in 4 bits with recomputation and unquantized without.

`make faults` has the other two of the four variants.

Besides what stands here, every test over all cases runs on these too: only the method's own
tensors change, the base is shared out to the byte, and plain PEFT reloads the adapter.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from peft_dist.checkpoint.adapter_file import ADAPTER_FILE
from tests.equivalence import matrix
from tests.equivalence.cases import (
    CASES,
    DDP,
    MATRIX_ENGINES,
    MATRIX_METHODS,
    SINGLE,
    STEPS,
    compiled_cases,
    matrix_cases,
)
from tests.equivalence.conftest import Outcomes
from tests.faults.long import only_long
from tests.processes import ROOT

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("engine", MATRIX_ENGINES)
@pytest.mark.parametrize("case", matrix_cases())
def test_a_cell_has_the_losses_of_one_process(outcome: Outcomes, case: str, engine: str) -> None:
    assert len(outcome(case, engine)["losses"]) == STEPS
    assert matrix.largest_loss_difference(outcome, case, engine) <= matrix.TOLERANCE


@only_long
@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("method", MATRIX_METHODS)
def test_recomputing_changes_no_loss(outcome: Outcomes, method: str, quantization: str) -> None:
    case, again = (f"matrix-{method}-{quantization}-{kept}" for kept in ("kept", "recomputed"))
    for engine in CASES[case].engines:
        pairs = zip(outcome(case, engine)["losses"], outcome(again, engine)["losses"], strict=True)
        assert max(abs(a - b) for a, b in pairs) <= 1e-5, engine


@only_long
@pytest.mark.parametrize("case", compiled_cases())
def test_compiled_blocks_change_no_loss(outcome: Outcomes, case: str) -> None:
    for engine in CASES[case].engines:
        compiled, plain = outcome(case, engine), outcome(case.removeprefix("compiled-"), engine)
        assert compiled["warnings"] == plain["warnings"], engine
        for key in ("losses", "norms"):
            assert compiled[key] == pytest.approx(plain[key], rel=1e-5, abs=1e-5), (engine, key)


@pytest.mark.parametrize("case", matrix_cases())
def test_a_cell_learns(outcome: Outcomes, case: str) -> None:
    losses = outcome(case, SINGLE)["losses"]
    assert sum(losses[STEPS // 2 :]) < sum(losses[: STEPS // 2])


@pytest.mark.parametrize("case", matrix_cases())
def test_the_saved_adapter_is_the_same_whatever_the_engine(trained: Path, case: str) -> None:
    files = {
        engine: trained / "outcomes" / case / engine / "adapter" / ADAPTER_FILE
        for engine in MATRIX_ENGINES
    }
    one = load_file(files[DDP])
    for engine, file in files.items():
        other = load_file(file)
        assert file.stat().st_size == files[DDP].stat().st_size, engine
        assert other.keys() == one.keys(), engine
        for name, tensor in other.items():
            assert (tensor.dtype, tensor.shape) == (one[name].dtype, one[name].shape), name
            # A gradient of zero is a rounding error, which AdamW's first steps make a whole step.
            assert float((tensor - one[name]).abs().max()) <= 1e-4, (engine, name)


@pytest.mark.parametrize("engine", (SINGLE, *MATRIX_ENGINES))
def test_a_training_repeats_to_the_bit(trained: Path, engine: str) -> None:
    one, again = (
        trained / "outcomes" / case / engine / "adapter" / ADAPTER_FILE
        for case in ("repeated", "repeated-again")
    )
    assert one.read_bytes() == again.read_bytes()


def test_the_readme_shows_the_matrix(
    outcome: Outcomes, record_property: Callable[[str, object], None]
) -> None:
    found = matrix.table(outcome)
    record_property("matrix", found)
    assert found in (ROOT / "README.md").read_text(encoding="utf-8")
