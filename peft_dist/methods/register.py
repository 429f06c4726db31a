"""Make a method of our own one of PEFT's, for its functions to find by name.

PEFT keeps its methods in an enum, which Python lets nobody extend: this is the one place that does.
"""

import importlib.metadata
from typing import Any

from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method

from peft_dist.common.errors import PeftDistError


def register(name: str, config: type[PeftConfig], model: type[BaseTuner]) -> None:
    """Register a method under a lower-case name; a second time is no harm.

    `get_peft_model`, `save_pretrained` and `from_pretrained` work with it from then on.

    Raises:
        PeftDistError: Where this PEFT has another method of that name, or its enum cannot grow.
    """
    kind = name.upper()
    if kind in list(PeftType):
        if PEFT_TYPE_TO_CONFIG_MAPPING.get(PeftType(kind)) is config:
            return
        raise _unsuited(f"has a method {name} of its own")
    try:
        _extend(kind)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _unsuited(f"cannot take the method {name} ({error})") from None
    register_peft_method(name=name, config_cls=config, model_cls=model)


def _extend(kind: str) -> None:
    """Add a member as `enum` would have, were it in the class body."""
    # Not through getattr, which would find those that all enums inherit.
    own = vars(PeftType)
    names, members, by_value = (
        own[part] for part in ("_member_names_", "_member_map_", "_value2member_map_")
    )
    member: Any = str.__new__(PeftType, kind)
    member._name_ = member._value_ = kind
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType)
    names.append(kind)
    members[kind] = by_value[kind] = member
    # From Python 3.12 on a member is an attribute; the enum's own __setattr__ would refuse it.
    type.__setattr__(PeftType, kind, member)
    found = (PeftType(kind), PeftType[kind], getattr(PeftType, kind), list(PeftType)[-1])
    if any(one is not member for one in found):
        raise ValueError("its enum does not find what was added")


def _unsuited(problem: str) -> PeftDistError:
    version = importlib.metadata.version("peft")
    return PeftDistError(
        f"peft {version} {problem}", where="peft", remedy="install the version that pip resolves"
    )
