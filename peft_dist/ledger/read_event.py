"""An event from what stands in a line of the ledger, or from its fields."""

import json
from functools import cache, reduce
from operator import or_
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from peft_dist.ledger.events import EVENT_TYPES, STAMP, LedgerEvent, UnknownEvent, event_name

_STAMP = frozenset(STAMP)


@cache
def _adapter() -> TypeAdapter[LedgerEvent]:
    union: Any = reduce(or_, EVENT_TYPES)
    adapter: TypeAdapter[LedgerEvent] = TypeAdapter(Annotated[union, Field(discriminator="event")])
    adapter.rebuild()  # now, and not with its first line
    return adapter


def from_fields(fields: Any) -> LedgerEvent:
    """Return the event that these fields make.

    Raises:
        ValueError: Where a field is missing or of another type.
    """
    name = fields.get("event") if isinstance(fields, dict) else None
    if isinstance(name, str) and name not in map(event_name, EVENT_TYPES):
        return UnknownEvent.model_validate(fields)
    return _adapter().validate_python(fields)


def from_line(line: bytes) -> LedgerEvent:
    """Return the event that a line of a ledger holds.

    Raises:
        ValueError: Where it holds none; its text names the field.
    """
    try:
        try:
            event: LedgerEvent = _adapter().validator.validate_json(line)
        except ValidationError:  # an unknown event, or a lone surrogate
            event = from_fields(json.loads(line))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"][-1:])
        raise ValueError(f"`{field}`: {first['msg']}" if field else first["msg"]) from error
    if not event.__pydantic_fields_set__ >= _STAMP:
        missing = next(name for name in STAMP if name not in event.model_fields_set)
        raise ValueError(f"`{missing}`: Field required")
    return event
