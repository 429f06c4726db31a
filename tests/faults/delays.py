"""Faults of time: calls and steps that take longer, and a lease that is judged from elsewhere."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from tests.faults.seams import at_steps, begun, nothing, replace_function, wrap

if TYPE_CHECKING:
    from tests.faults.hooks import Rank


def slow(
    here: "Rank",
    *,
    rank: int,
    where: Literal["tokenising", "loading", "evaluation", "final save"],
    seconds: float,
    from_step: int = 0,
) -> None:
    """Let a part of a training begin so much later on one rank.

    Args:
        here: The rank.
        rank: On which rank.
        where: `tokenising` and `loading`: before rows are read, or the model. `evaluation`: before
            each of its batches. `final save`: before the finished adapter is written.
        seconds: How much later.
        from_step: Not before this step has begun.
    """
    if not here.is_one_of(rank):
        return

    def wait() -> None:
        if begun["step"] >= from_step:
            time.sleep(seconds)

    def around(call: Callable[..., Any], *rest: Any, **named: Any) -> Any:
        wait()
        return call(*rest, **named)

    at_steps(nothing)
    if where == "tokenising":
        from peft_dist.data import token_cache

        read = token_cache.tokenize_rows
        replace_function(read, lambda *rest, **named: around(read, *rest, **named))
    elif where == "loading":
        from peft_dist import model_setup

        load = model_setup.set_up_model
        replace_function(load, lambda *rest, **named: around(load, *rest, **named))
    elif where == "evaluation":
        from peft_dist.evaluation import scoring

        batches = scoring._batches

        def late_batches(*rest: Any) -> Iterator[Any]:
            for batch in batches(*rest):
                wait()
                yield batch

        replace_function(batches, late_batches)
    else:
        from peft_dist.checkpoint.verified_save import AdapterSaver

        wrap(AdapterSaver, "save", around)


def delay_steps(here: "Rank", *, rank: int, seconds: Sequence[float], from_step: int = 1) -> None:
    """Let one rank begin some steps in a row later, each by its own time."""

    def wait(step: int) -> None:
        if 0 <= step - from_step < len(seconds):
            time.sleep(seconds[step - from_step])

    if here.is_one_of(rank):
        at_steps(wait)


def on_another_machine(_here: "Rank", *, stale_after_s: float) -> None:
    """Let a group see of the run's holder only its beats, and wait so long for one."""
    from peft_dist.common import process_identity
    from peft_dist.run import lease

    here = process_identity.this_process()
    replace_function(
        process_identity.this_process, lambda: {**here, "boot_id": "another machine's"}
    )
    assert stale_after_s < lease.STALE_AFTER_S
    lease.STALE_AFTER_S = stale_after_s
