"""Print `docs/ledger.md`, the reference page of the ledger, from the schema."""

from collections.abc import Iterable
from typing import Any

from peft_dist.common.console import show
from peft_dist.ledger.events import EVENT_TYPES, STAMP, GpuSample, LedgerEvent, event_name

INTRODUCTION = """\
# The ledger of a run

<!-- Generated from peft_dist/ledger/events.py by `python -m peft_dist.ledger.docs`. -->

`ledger.jsonl` in a run directory has one line of JSON per event, in the order in which they were
written. Lines are only ever appended; a last line without its end is being written. The file is
read by `peft-dist goodput`, `report`, `status` and `sync`. A key that is missing was not known, or
the version that wrote the line did not have it. Keys and events that are not listed here belong to
another version and are kept.
"""


def render_docs() -> str:
    """Return the page."""
    stamp = ("event", "step", *STAMP)
    parts = [INTRODUCTION, "## Every event\n", _table(LedgerEvent, stamp)]
    for kind in EVENT_TYPES:
        own = [name for name in kind.model_fields if name not in stamp]
        parts += [f"## `{event_name(kind)}`\n", f"{kind.__doc__}\n"]
        parts += [_table(kind, own)] if own else []
    parts += [
        "## Each entry of `gpus`\n",
        f"{GpuSample.__doc__}\n",
        _table(GpuSample, GpuSample.model_fields),
    ]
    return "\n".join(parts)


def _table(kind: type[LedgerEvent] | type[GpuSample], names: Iterable[str]) -> str:
    schema = kind.model_json_schema()["properties"]
    rows = [
        f"| `{name}` | {_type(schema[name])} | {_text(kind.model_fields[name].description)} |"
        for name in names
    ]
    return "\n".join(["| key | type | meaning |", "|---|---|---|", *rows, ""])


def _type(schema: dict[str, Any]) -> str:
    """Return the type of a field as JSON calls it."""
    if "anyOf" in schema:
        return _type(next(one for one in schema["anyOf"] if one.get("type") != "null"))
    if "items" in schema:
        return f"array of {_type(schema['items'])}s"
    return str(schema.get("type", "object"))


def _text(description: str | None) -> str:
    assert description is not None, "every field has its meaning"
    return " ".join(description.split()).replace("|", "\\|")


if __name__ == "__main__":
    show(render_docs(), end="")
