"""Print the pages of docs/ that list every key of a recipe or a cluster file, from the schema."""

import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from peft_dist.common.console import show
from peft_dist.config.cluster import cluster_schema
from peft_dist.config.load import recipe_schema

RECIPE = """\
# Every key of a recipe

<!-- Generated from peft_dist/config by `python -m peft_dist.config.docs`. -->

A recipe is YAML with the sections below. Any key can be set on the command line by its full name,
such as `train.learning_rate=5e-4`. `peft-dist schema` prints the same as JSON Schema for an editor.
A default of "-" means that the key must be given, or that its text says what happens without it.
"""

CLUSTER = """\
# Every key of a cluster file

<!-- Generated from peft_dist/config by `python -m peft_dist.config.docs cluster`. -->

A cluster file says what a job may ask Slurm for; see [Slurm](slurm.md).
`peft-dist schema --cluster` prints the same as JSON Schema. A default of "-" means that the key
must be given, or that its text says what happens without it.
"""

Schema = Mapping[str, Any]


def render_recipe_docs() -> str:
    """Return the page about recipes."""
    return _page(RECIPE, json.loads(recipe_schema()))


def render_cluster_docs() -> str:
    """Return the page about cluster files."""
    return _page(CLUSTER, json.loads(cluster_schema()))


def _page(introduction: str, schema: Schema) -> str:
    definitions: Schema = schema.get("$defs", {})
    parts = [introduction, "## The top level\n", _table(schema, definitions)]
    for name, section in _sections(schema, definitions, ""):
        parts += [f"## {name}\n", f"{_text(section.get('description'))}\n"]
        parts.append(_table(section, definitions))
    return "\n".join(parts)


def _sections(section: Schema, definitions: Schema, prefix: str) -> Iterator[tuple[str, Schema]]:
    """Return the sections below one, each with its heading, in the order of the file."""
    for key, field in section["properties"].items():
        for name in _references(field):
            inner = definitions[name]
            if "properties" not in inner:
                continue
            kind = inner["properties"].get("kind", {}).get("const")
            path = f"{prefix}{key}"
            yield f"`{path}`" if kind is None else f"`{path}` of kind `{kind}`", inner
            yield from _sections(inner, definitions, f"{path}.")


def _references(field: Schema) -> list[str]:
    """Return the names of the definitions that a field may hold."""
    found = [field["$ref"].rpartition("/")[2]] if "$ref" in field else []
    for choice in (*field.get("anyOf", ()), *field.get("oneOf", ())):
        found += _references(choice)
    return found


def _table(section: Schema, definitions: Schema) -> str:
    required = section.get("required", ())
    rows = []
    for key, field in section["properties"].items():
        default = None if key in required else field.get("default")
        is_plain = default not in (None, "") and not isinstance(default, dict)
        shown = f"`{json.dumps(default).strip(chr(34))}`" if is_plain else "-"
        inner = [definitions[name] for name in _references(field)]
        about = field.get("description") or (inner[0].get("description") if inner else "")
        meaning = _text(about)
        rows.append(f"| `{key}` | {_type(field, definitions)} | {shown} | {meaning} |")
    return "\n".join(["| key | value | default | meaning |", "|---|---|---|---|", *rows, ""])


def _type(field: Schema, definitions: Schema) -> str:
    """Return what a key may hold, in words."""
    if "const" in field:
        return f"`{field['const']}`"
    if "enum" in field:
        return ", ".join(f"`{choice}`" for choice in field["enum"])
    choices = [*field.get("anyOf", ()), *field.get("oneOf", ())]
    if choices:
        words = [_type(one, definitions) for one in choices if one.get("type") != "null"]
        return " or ".join(dict.fromkeys(words))
    if "$ref" in field:
        inner = definitions[_references(field)[0]]
        return "section" if "properties" in inner else _type(inner, definitions)
    kind = field.get("type")
    if kind == "array":
        items = field.get("items")
        return "list" if items is None else f"list of {_type(items, definitions)}"
    plain = {"string": "text", "integer": "whole number", "boolean": "true or false"}
    return plain.get(str(kind), str(kind)) + _bounds(field)


def _bounds(field: Schema) -> str:
    names = {
        "minimum": "from",
        "exclusiveMinimum": "above",
        "maximum": "to",
        "exclusiveMaximum": "below",
    }
    found = [f"{word} {field[name]:g}" for name, word in names.items() if name in field]
    return f" {' '.join(found)}" if found else ""


def _text(description: str | None) -> str:
    return " ".join((description or "").split()).replace("|", "\\|")


if __name__ == "__main__":
    show(render_cluster_docs() if "cluster" in sys.argv[1:] else render_recipe_docs(), end="")
