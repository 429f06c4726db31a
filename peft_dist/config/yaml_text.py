"""Read YAML text as plain values, by the YAML 1.2 core rules alone.

Only null, booleans, numbers, text, lists and mappings come out: no dates, tags, merge keys or
Python objects. Knows nothing of recipes.
"""

import math
from collections.abc import Mapping
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError

from peft_dist.common.errors import RecipeError

MAX_CHARACTERS = 1_000_000
"""A recipe is a page of text; more is the wrong file."""
MAX_VALUES = 20_000
"""Values after every alias is expanded, so that nested aliases cannot fill the memory."""
MAX_DIGITS = 100
"""Longest number; Python refuses to convert very long ones."""

_UNCLOSED = ("expected ',' or '}'", "expected ',' or ']'")
_CORE = "tag:yaml.org,2002:"


def parse_yaml(text: str, *, where: str) -> Any:
    """Return the one document in `text` as plain values; empty text is None.

    Raises:
        RecipeError: For text that is not YAML, or that says more than the core rules know.
    """
    if len(text) > MAX_CHARACTERS:
        raise RecipeError(
            f"has {len(text)} characters, more than {MAX_CHARACTERS}",
            where=where,
            remedy="name a recipe file",
        )
    if text.lstrip("\ufeff").startswith("%"):  # `%YAML 1.1` would bring back `no` as a boolean
        raise RecipeError("YAML directives are not read", where=where, remedy="remove the % line")
    try:
        yaml = YAML(typ="safe", pure=True)
        yaml.composer.warn_double_anchors = False  # naming two values alike is legal YAML
        root = yaml.compose(text)
        return None if root is None else _Builder(where).build(root)
    except MarkedYAMLError as error:
        raise _syntax_error(error, where) from error
    except ReaderError as error:
        raise RecipeError(
            f"holds the control character {chr(error.character)!r}"
            if isinstance(error.character, int)
            else f"holds the unreadable character {error.character!r}",
            where=where,
            remedy="save it as plain UTF-8 text",
        ) from error
    except RecursionError as error:
        raise RecipeError("is nested too deeply", where=where, remedy="flatten it") from error
    except YAMLError as error:
        raise RecipeError(f"is not YAML: {error}", where=where) from error


def _syntax_error(error: MarkedYAMLError, where: str) -> RecipeError:
    mark = error.problem_mark or error.context_mark
    location = f"{where}:{mark.line + 1}" if mark is not None else where
    problem = error.problem or error.context or "cannot be parsed"
    remedy = "quote text that holds any of : { } [ ] , & * # ? | > @ ` or starts with a dash"
    if "\\t" in problem or "'\t'" in problem:
        remedy = "indent with spaces, not tabs"
    elif problem.startswith(_UNCLOSED):
        remedy = f"close the bracket, or {remedy}"
    return RecipeError(f"is not YAML: {problem}", where=location, remedy=remedy)


class _Builder:
    """Turn a node graph into values, counting them as aliases expand."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.values = 0
        self.open: set[int] = set()  # nodes being built: meeting one again is a cycle

    def build(self, node: Node) -> Any:
        self.values += 1
        if self.values > MAX_VALUES:
            raise self.error(
                node, f"aliases expand to more than {MAX_VALUES} values", "write them out"
            )
        if isinstance(node, ScalarNode):
            return self.scalar(node)
        if id(node) in self.open:
            raise self.error(node, "an alias holds itself", "write the value out")
        self.open.add(id(node))
        try:
            if isinstance(node, SequenceNode) and node.tag == _CORE + "seq":
                return [self.build(item) for item in node.value]
            if isinstance(node, MappingNode) and node.tag == _CORE + "map":
                return self.mapping(node)
        finally:
            self.open.discard(id(node))
        raise self.error(node, f"the tag {_short(node.tag)} is not read", "remove it")

    def mapping(self, node: MappingNode) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if key_node.tag == _CORE + "merge":
                raise self.error(key_node, "merge keys (<<) are not YAML 1.2", "write them out")
            key = self.build(key_node)
            if not isinstance(key, str):
                raise self.error(key_node, f"the key {key!r} is not text", "put it in quotes")
            if key in result:
                raise self.error(key_node, f"the key {key!r} is there twice", "keep one of them")
            result[key] = self.build(value_node)
        return result

    def scalar(self, node: ScalarNode) -> Any:
        kind, text = (node.tag or "").removeprefix(_CORE), str(node.value)
        if kind in ("str", "timestamp"):  # whoever wants a date reads it from the text
            return text
        if kind == "null":
            return None
        if kind == "bool" and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if kind in ("int", "float") and len(text) <= MAX_DIGITS:
            try:
                return _integer(text) if kind == "int" else _real(text)
            except ValueError:
                pass  # `!!int x`: reported below like any other tag that does not fit
        if kind in ("bool", "int", "float"):
            raise self.error(node, f"{text[:80]!r} is not read as a number", "put it in quotes")
        raise self.error(node, f"the tag {_short(node.tag)} is not read", "remove it")

    def error(self, node: Node, problem: str, remedy: str) -> RecipeError:
        location = f"{self.where}:{node.start_mark.line + 1}"
        return RecipeError(problem, where=location, remedy=remedy)


def _short(tag: str | None) -> str:
    return repr((tag or "").replace(_CORE, "!!"))


def _integer(text: str) -> int:
    digits = text.replace("_", "")
    sign = -1 if digits.startswith("-") else 1
    digits = digits.lstrip("+-").lower()
    bases: Mapping[str, int] = {"0x": 16, "0o": 8, "0b": 2}
    base = bases.get(digits[:2], 10)
    return sign * int(digits if base == 10 else digits[2:], base)


def _real(text: str) -> float:
    plain = text.replace("_", "").lower()
    if plain.endswith(".inf"):
        return -math.inf if plain.startswith("-") else math.inf
    return math.nan if plain.endswith(".nan") else float(plain)
