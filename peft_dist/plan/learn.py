"""What a cluster's own runs say of the plan: seconds measured over seconds calculated.

A run is calculated again as it was: its strategy, its processes, its rows of the length that they
had. One factor on the assumed efficiencies then makes the calculated step last as long as the
measured one. Waits for links stay what the links give.
"""

import glob
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median

from peft_dist.common.errors import PeftDistError
from peft_dist.config import Recipe, load_recipe
from peft_dist.ledger.events import StartEvent, StepEvent
from peft_dist.ledger.reader import LedgerReader
from peft_dist.plan.candidate import Candidate, candidate_for
from peft_dist.plan.estimate import Estimate
from peft_dist.plan.hardware import Hardware, is_gpu
from peft_dist.plan.subject import read_config, subject_of
from peft_dist.run.directory import RunDir

WARM_UP_STEPS = 2
"""First steps of an attempt that do not count: they pay for everything lazy."""
LEAST_STEPS = 3
"""Steps besides, without which a run teaches nothing."""
LEAST_FACTOR, MOST_FACTOR = 1 / 256, 4.0
"""Between which the factor on the assumed efficiencies is looked for."""


@dataclass(frozen=True)
class Lesson:
    """One run, as it was and as it is calculated."""

    run: str
    calculated_s: float
    """Seconds of a step, with what is assumed."""
    measured_s: float
    """Median of the steps, waiting for other processes included."""
    factor: float
    """On the assumed efficiencies: with it, the calculated step takes what was measured."""
    calculated_bytes: int
    """Of tensors on a GPU, with rows as long as `data.max_length`."""
    measured_bytes: int | None
    """Peak of the fullest process."""


@dataclass(frozen=True)
class Learned:
    """What all runs together say."""

    lessons: tuple[Lesson, ...]
    left_out: tuple[str, ...]
    """`RUN: why`, of each run that teaches nothing."""

    @property
    def factor(self) -> float:
        """The middle of the runs' factors; 1 without any."""
        return median(one.factor for one in self.lessons) if self.lessons else 1.0

    def applied_to(self, hardware: Hardware) -> Hardware:
        """Return hardware that is as efficient as the runs were."""
        assumed, factor = hardware.assumed, self.factor
        return replace(hardware, assumed=assumed.times(factor))


def learn(patterns: Sequence[str], hardware: Hardware) -> Learned:
    """Learn from the runs in folders that match.

    Args:
        patterns: Folders, or patterns of such, as a shell would take them.
        hardware: The GPUs that the plan is for, and their links; other GPUs' runs are left out.

    Raises:
        PeftDistError: Where nothing matches.
    """
    # Path.glob takes no pattern that begins at the root.
    folders = sorted({path for pattern in patterns for path in glob.glob(pattern)})  # noqa: PTH207
    if not folders:
        raise PeftDistError(
            f"got {', '.join(patterns)!r}, and nothing is there",
            where="--runs",
            remedy="give folders of runs, such as 'runs/*'",
        )
    lessons, left_out = [], []
    for folder in folders:
        try:
            found = _lesson(RunDir.open(folder), hardware)
        except PeftDistError as error:
            found = str(error)
        if isinstance(found, str):
            left_out.append(f"{folder}: {found}")
        else:
            lessons.append(found)
    return Learned(tuple(lessons), tuple(left_out))


def _lesson(run: RunDir, hardware: Hardware) -> Lesson | str:
    """Return what a run teaches, or why it teaches nothing."""
    start, steps = _newest_steps(run)
    if start is None or len(steps) < LEAST_STEPS:
        return f"has fewer than {WARM_UP_STEPS + LEAST_STEPS} steps in its newest attempt"
    if not is_gpu(start.device or "", hardware.gpu):
        return f"ran on {start.device}, not on {hardware.gpu.name}"
    recipe = load_recipe(run.recipe, check_paths=False)
    if recipe.train.micro_batch_size == "auto" or recipe.train.activation_checkpointing == "auto":
        return "leaves open how it was trained"
    processes = start.world_size or 1
    candidate = _as_it_was(recipe, start, processes)
    config = read_config(recipe.model.name, recipe.model.revision, network=False)
    subject = subject_of(_with_measured_rows(recipe, steps), config)
    measured_s = median((step.tokens or 0) / step.tokens_per_s for step in steps)

    def calculated(factor: float) -> Estimate:
        assumed = hardware.assumed.times(factor)
        return subject.estimate(candidate, replace(hardware, assumed=assumed))

    factor = solve(lambda value: calculated(value).seconds.total, measured_s)
    if factor is None:
        return f"a step took {measured_s:.3g} s, which no efficiency explains; see links"
    longest = subject_of(recipe, config).estimate(candidate, hardware)
    peaks = [max(step.rank_memory_bytes) for step in steps if step.rank_memory_bytes]
    return Lesson(
        run=str(run.path.name),
        calculated_s=calculated(1.0).seconds.total,
        measured_s=measured_s,
        factor=factor,
        calculated_bytes=longest.bytes.allocated,
        measured_bytes=max(peaks, default=None),
    )


def _newest_steps(run: RunDir) -> tuple[StartEvent | None, list[StepEvent]]:
    """Return the start of the newest attempt that has steps to learn from, and those steps."""
    start: StartEvent | None = None
    attempts: list[tuple[StartEvent, list[StepEvent]]] = []
    for event in LedgerReader(run.ledger).all():
        if isinstance(event, StartEvent):
            start = event
            attempts.append((event, []))
        elif isinstance(event, StepEvent) and _counts(event, start):
            attempts[-1][1].append(event)
    long = [one for one in attempts if len(one[1]) >= LEAST_STEPS]
    return long[-1] if long else (start, [])


def _counts(step: StepEvent, start: StartEvent | None) -> bool:
    """Whether a step tells how fast its attempt is."""
    known = step.tokens is not None and step.tokens_per_s > 0
    return start is not None and known and step.step > start.step + WARM_UP_STEPS


def _as_it_was(recipe: Recipe, start: StartEvent, processes: int) -> Candidate:
    strategy = start.strategy or recipe.parallel.strategy
    nodes = len(set(start.hosts or ("",)))
    rows, again = recipe.train.micro_batch_size, recipe.train.activation_checkpointing
    assert rows != "auto" and again != "auto"
    return candidate_for(
        recipe, strategy, nodes=nodes, processes=processes, rows=rows, recompute=again
    )


def _with_measured_rows(recipe: Recipe, steps: Sequence[StepEvent]) -> Recipe:
    """Return a recipe whose longest rows are as long as the steps' rows were on average."""
    examples = sum(step.rows or 0 for step in steps)
    tokens = sum(step.tokens or 0 for step in steps)
    length = max(2, round(tokens / max(1, examples) / recipe.rows_per_example))
    train = {"global_batch_size": round(examples / len(steps)), "global_batch_tokens": None}
    return recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update={"max_length": length}),
            "train": recipe.train.model_copy(update=train),
        }
    )


def solve(seconds: Callable[[float], float], wanted_s: float) -> float | None:
    """Return the factor with which a step takes so many seconds; None where none does."""
    low, high = LEAST_FACTOR, MOST_FACTOR
    if not seconds(high) <= wanted_s <= seconds(low):
        return None
    for _ in range(60):  # seconds fall as the factor grows
        middle = (low * high) ** 0.5
        low, high = (middle, high) if seconds(middle) > wanted_s else (low, middle)
    return high
