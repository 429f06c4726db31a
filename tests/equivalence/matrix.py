"""The table of what works: every method on every engine, as the trainings really went."""

from tests.equivalence.cases import MATRIX_ENGINES, MATRIX_METHODS, MATRIX_VARIANTS, SINGLE
from tests.equivalence.conftest import Outcomes

TOLERANCE = 1e-4
"""How far any of the ten losses may be from the training on one process."""


def largest_loss_difference(outcome: Outcomes, case: str, engine: str) -> float:
    """Return how far a training is from the same one on one process."""
    alone, shared = outcome(case, SINGLE)["losses"], outcome(case, engine)["losses"]
    return max(abs(a - b) for a, b in zip(alone, shared, strict=True))


def table(outcome: Outcomes) -> str:
    """Return the matrix in Markdown: whether all of a cell's variants have one process's losses."""
    lines = [
        f"| | {' | '.join(engine.partition('-')[2] for engine in MATRIX_ENGINES)} |",
        f"|---|{'---|' * len(MATRIX_ENGINES)}",
    ]
    for method in MATRIX_METHODS:
        cells = []
        for engine in MATRIX_ENGINES:
            cases = [
                f"matrix-{method}-{quantization}-{kept}" for quantization, kept in MATRIX_VARIANTS
            ]
            right = [largest_loss_difference(outcome, c, engine) <= TOLERANCE for c in cases]
            cells.append("equal" if all(right) else f"{sum(right)} of {len(right)}")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)
