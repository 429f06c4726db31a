"""Say in one line what is wrong with a file: field, value, what it may be, nearest valid name.

Reads the models of a recipe or a cluster file, so a new field or method needs no word here. Loads
no file.
"""

import datetime as dt
import re
from collections.abc import Iterator, Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeAlias, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from peft_dist.common.errors import RecipeError, nearest
from peft_dist.config.recipe import Recipe
from peft_dist.config.section import Matches
from peft_dist.config.synonyms import ours

SectionType: TypeAlias = type[BaseModel]
MOST_OTHERS = 5
"""So many fields are named besides the first one that is wrong."""


def describe_failure(
    failure: ValidationError, raw: Mapping[str, Any], where: str, root: SectionType = Recipe
) -> RecipeError:
    """Turn pydantic's list of errors into one line about the first field, and a count.

    Args:
        failure: What pydantic said.
        raw: The values it was given.
        where: The file's path.
        root: The model of the whole file.
    """
    lines: dict[str, tuple[str, str]] = {}
    for error in failure.errors(include_url=False):
        path, field, section = _locate(error["loc"], raw, root)
        dotted = ".".join(path) or root.__name__.lower()
        if dotted not in lines:
            lines[dotted] = _sentence(dict(error), path, field, section)
            if error["type"] == "extra_forbidden" and root is Recipe:
                lines[dotted] = "no such key", remedy_for_unknown(path, section)
    (dotted, (problem, remedy)), *rest = lines.items()
    remedy += also_wrong([other for other, _ in rest])
    return RecipeError(problem, where=f"{where}: {dotted}", remedy=remedy.strip())


def also_wrong(fields: Sequence[str]) -> str:
    """Return what follows the remedy for the first field, about the others that are wrong."""
    if not fields:
        return ""
    more = f" and {len(fields) - MOST_OTHERS} more" if len(fields) > MOST_OTHERS else ""
    return f" (also wrong: {', '.join(fields[:MOST_OTHERS])}{more})"


def remedy_for_unknown(path: Sequence[str], section: SectionType) -> str:
    """Return what to do about a key of a recipe that its section does not have."""
    return ours(path, section.model_fields, dict.fromkeys(_paths(Recipe, "")))


def _paths(section: SectionType, before: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield f"{before}{name}"
        for inner in _sections(field.annotation):
            yield from _paths(inner, f"{before}{name}.")


def refuse_booleans_as_numbers(
    raw: Mapping[str, Any], where: str, root: SectionType = Recipe
) -> None:
    """Refuse `rank: true`, which pydantic would read as 1."""
    for path, field, value in _leaves(raw, root, ()):
        if isinstance(value, bool) and not _accepts(field.annotation, bool):
            raise RecipeError(
                f"got {value!r}", where=f"{where}: {'.'.join(path)}", remedy=_must(field)
            )


def section_at(path: Sequence[str], raw: Mapping[str, Any]) -> SectionType | None:
    """Return the section at a dotted path, or None where there is none."""
    section: SectionType | None = Recipe
    value: Any = raw
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
        field = section.model_fields.get(name) if section is not None else None
        section = None if field is None else _section_of(field.annotation, value)
    return section


def quote(value: Any) -> str:
    """Show a value on one line, cut where it is long."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _sentence(
    error: Mapping[str, Any],
    path: Sequence[str],
    field: FieldInfo | None,
    section: SectionType,
) -> tuple[str, str]:
    kind, value = error["type"], error["input"]
    if kind == "extra_forbidden":
        return "no such key", nearest(path[-1], section.model_fields)
    if kind == "missing":
        return "is missing", f"add {'.'.join(path)}"
    if kind == "value_error":  # our own validators say both the fault and the remedy
        return str(error["ctx"]["error"]), ""
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        tag = value.get("kind") if isinstance(value, Mapping) else None
        kinds = _kinds(field)
        if tag == "qlora" and "lora" in kinds:
            return f"kind {quote(tag)} is not known", "here that is lora with quantization: nf4"
        return f"kind {quote(tag)} is not known", nearest(str(tag), kinds)
    if field is None:
        return f"got {quote(value)}", "must be a mapping of sections"
    remedy = _must(field)
    if isinstance(value, int | float) and _accepts(field.annotation, str):
        remedy += "; put it in quotes"
    choices = _texts(field.annotation)
    if isinstance(value, str) and choices and "did you mean" in (near := nearest(value, choices)):
        remedy = f"{remedy}; {near}"
    if isinstance(value, str) and re.fullmatch(r"[-+.\de]+(,[-+.\de]+)+", value):
        remedy += f"; to train each: --array {'.'.join(path)}={value}"
    return f"got {quote(value)}", remedy


def _locate(
    loc: Sequence[int | str], raw: Mapping[str, Any], root: SectionType
) -> tuple[list[str], FieldInfo | None, SectionType]:
    """Follow pydantic's location down to the field it means.

    Pydantic adds the tags of unions to a location, and positions in lists; both would only puzzle
    the reader, so the path stops at the field, or goes on in a section of a list of them.
    """
    section: SectionType = root
    value: Any = raw
    path: list[str] = []
    field: FieldInfo | None = None
    items: SectionType | None = None
    for part in loc:
        name = str(part)
        if items is not None:
            if isinstance(part, int) and isinstance(value, list):
                path[-1] += f"[{part}]"
                section, value, items = items, value[part], None
        elif name in section.model_fields:
            field = section.model_fields[name]
            path.append(name)
            value = value.get(name) if isinstance(value, Mapping) else None
            items = _item_section(field.annotation) if isinstance(value, list) else None
            inner = _section_of(field.annotation, value)
            if inner is None and items is None:
                break
            section = inner or section
        elif not (field is not None and name in _kinds(field)):
            path.append(name if name.isidentifier() else quote(name))
            break
    return path, field, section


def _leaves(
    raw: Mapping[str, Any], section: SectionType, path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], FieldInfo, Any]]:
    for name, value in raw.items():
        field = section.model_fields.get(name)
        if field is None:
            continue
        inner = _section_of(field.annotation, value)
        if inner is not None and isinstance(value, Mapping):
            yield from _leaves(value, inner, (*path, name))
        elif isinstance(value, list):
            items = _item_section(field.annotation)
            for at, item in enumerate(value):
                if items is not None and isinstance(item, Mapping):
                    yield from _leaves(item, items, (*path, f"{name}[{at}]"))
                else:
                    yield (*path, name), field, item
        else:
            yield (*path, name), field, value


def _members(annotation: Any) -> Iterator[Any]:
    """Yield the alternatives of a type, each with `Annotated` taken off."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _members(get_args(annotation)[0])
    elif origin in (Union, UnionType):
        for member in get_args(annotation):
            yield from _members(member)
    else:
        yield annotation


def _sections(annotation: Any) -> list[SectionType]:
    return [m for m in _members(annotation) if isinstance(m, type) and issubclass(m, BaseModel)]


def _section_of(annotation: Any, value: Any) -> SectionType | None:
    """Return the section a field holds; of several, the one whose `kind` the value names."""
    sections = _sections(annotation)
    kind = value.get("kind") if isinstance(value, Mapping) else None
    for section in sections:
        field = section.model_fields.get("kind")
        if field is not None and kind in _texts(field.annotation):
            return section
    return sections[0] if sections else None


def _item_section(annotation: Any) -> SectionType | None:
    """Return the section that each item of a list is, where it is one."""
    lists = [member for member in _members(annotation) if get_origin(member) is tuple]
    found = [section for member in lists for section in _sections(get_args(member)[0])]
    return found[0] if found else None


def _kinds(field: FieldInfo | None) -> list[str]:
    sections = _sections(field.annotation) if field is not None else []
    fields = [section.model_fields.get("kind") for section in sections]
    return [text for kind in fields if kind is not None for text in _texts(kind.annotation)]


def _texts(annotation: Any) -> list[str]:
    members = [m for m in _members(annotation) if get_origin(m) is Literal]
    return [str(text) for member in members for text in get_args(member)]


def _accepts(annotation: Any, kind: type) -> bool:
    return any(
        member is kind or any(_accepts(item, kind) for item in get_args(member) if item is not ...)
        for member in _members(annotation)
    )


def _must(field: FieldInfo) -> str:
    return f"must be {_describe(field.annotation, field.metadata)}"


def _describe(annotation: Any, limits: Sequence[Any] = ()) -> str:
    """Say in words what a type takes, with its limits: `a number above 0`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner = [item for extra in arguments[1:] for item in _limits(extra)]
        return _describe(arguments[0], [*limits, *inner])
    if origin in (Union, UnionType):
        named = [_describe(member, limits) for member in arguments if member is not NoneType]
        if NoneType in arguments:
            named.append("null")
        return " or ".join(named)
    if origin is Literal:
        words = [quote(value) for value in arguments]
        return words[0] if len(words) == 1 else f"one of {', '.join(words)}"
    if origin is tuple:
        size = "" if arguments[-1] is ... else f" of {len(arguments)}"
        return f"a list{size}{_bounds(limits)}, each item {_describe(arguments[0])}"
    if origin is dict:
        return f"a section of names, each with {_describe(arguments[1])}"
    if annotation is str:
        words = [limit.words for limit in limits if isinstance(limit, Matches)]
        not_empty = any(isinstance(limit, MinLen) for limit in limits)
        return words[0] if words else "text that is not empty" if not_empty else "text"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"a section with any of {', '.join(sorted(annotation.model_fields))}"
    words_of = {bool: "true or false", int: "a whole number", float: "a number"}
    words_of[dt.date] = "a day such as 2026-01-31"
    return f"{words_of.get(annotation, str(annotation))}{_bounds(limits)}"


def _limits(extra: Any) -> list[Any]:
    return list(extra.metadata) if isinstance(extra, FieldInfo) else [extra]


def _bounds(limits: Sequence[Any]) -> str:
    words = []
    for limit in limits:
        if isinstance(limit, Gt):
            words.append(f"above {limit.gt}")
        elif isinstance(limit, Ge):
            words.append(f"of at least {limit.ge}")
        elif isinstance(limit, Lt):
            words.append(f"below {limit.lt}")
        elif isinstance(limit, Le):
            words.append(f"of at most {limit.le}")
        elif isinstance(limit, MinLen):
            words.append(f"of {limit.min_length} or more")
        elif isinstance(limit, MaxLen):
            words.append(f"of at most {limit.max_length}")
    return " " + " and ".join(words) if words else ""
