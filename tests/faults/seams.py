"""Where faults get into a rank: the few names of the program that the hooks hold on to.

Each breaks loudly where its name is gone. Arms nothing by itself.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

begun = {"step": 0}
"""The step that has begun last in this process; 0: none yet."""
_at_step: list[Callable[[int], None]] = []


def nothing(_step: int) -> None:
    """Want no more than `begun` to be kept."""


def at_steps(call: Callable[[int], None]) -> None:
    """Call with the number of every step when it begins."""
    if not _at_step:
        from peft_dist.data.order import StepPlan

        def around(steps: Callable[..., Any], *rest: Any, **named: Any) -> Any:
            for step, cursor, rows in steps(*rest, **named):
                begun["step"] = step
                for one in _at_step:
                    one(step)
                yield step, cursor, rows

        wrap(StepPlan, "steps", around)
    _at_step.append(call)


def around_forward(around: Callable[..., Any]) -> None:
    """Put `around` in the place of every head's forward."""
    from peft_dist.model.loss import CausalLM, SequenceClassifier

    wrap(CausalLM, "forward", around)
    wrap(SequenceClassifier, "forward", around)


def wrap(owner: type, name: str, around: Callable[..., Any]) -> None:
    """Put `around`, which gets the method as it was and its arguments, in a method's place."""
    method = getattr(owner, name)

    @functools.wraps(method)
    def wrapped(*rest: Any, **named: Any) -> Any:
        return around(method, *rest, **named)

    setattr(owner, name, wrapped)


def replace_function(function: Any, replacement: Callable[..., Any]) -> None:
    """Put another function in the place of one, in every module that has imported it."""
    places = [
        (module, name)
        for module in modules_of_the_program()
        for name, value in list(vars(module).items())
        if value is function
    ]
    assert places, function
    for module, name in places:
        setattr(module, name, replacement)


def modules_of_the_program() -> list[Any]:
    """Return every module of the program that is imported."""
    return [module for name, module in sys.modules.items() if name.split(".")[0] == "peft_dist"]
