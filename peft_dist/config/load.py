"""Read a recipe file and its `key=value` overrides into a `Recipe`, and write one back as YAML.

Looks whether the files a recipe names exist, but opens none of them. Which key names exist is
`recipe.py`'s and `method.py`'s business, how a fault is put in words `explain.py`'s.
"""

import glob
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML

from peft_dist.common.errors import RecipeError
from peft_dist.common.paths import files_like
from peft_dist.config.explain import (
    also_wrong,
    describe_failure,
    quote,
    refuse_booleans_as_numbers,
    remedy_for_unknown,
    section_at,
)
from peft_dist.config.meaning import refuse_meaningless
from peft_dist.config.method import hub_adapter
from peft_dist.config.recipe import Recipe
from peft_dist.config.row_sources import RowSource, held_out
from peft_dist.config.yaml_text import MAX_CHARACTERS, parse_yaml

_START = ("method", "start_from")
PATH_FIELDS = (
    ("model", "name"),
    ("data", "train"),
    ("data", "eval"),
    ("data", "template"),
    _START,
)
"""Fields that hold a local path or, where no such path exists, a hub name; or a list of sources."""

_FILE_ENDINGS = (".jsonl", ".json", ".csv", ".parquet", ".arrow", ".tsv", ".txt", ".xls", ".xlsx",
                 ".gz", ".zip", ".yaml", ".yml", ".xml")  # fmt: skip
"""What no hub name ends with; of these files not all can be read."""


def load_recipe(
    path: str | Path, overrides: Sequence[str] = (), *, check_paths: bool = True
) -> Recipe:
    """Read, override, check and resolve a recipe.

    Relative paths are looked for beside the recipe; one that an override gave also in the current
    folder, where it was typed. With `check_paths=False` a missing file is no error, and neither is
    a setting without effect: nothing is trained by such a recipe.

    Raises:
        RecipeError: For anything that cannot be used as written, in one line.
    """
    where = str(path)
    raw = read_mapping(path, remedy="start with model: {name: ...}")
    unknown: dict[str, str] = {}
    typed = [_apply_override(raw, override, where, unknown) for override in overrides]
    for key, remedy in unknown.items():
        others = also_wrong([other for other in unknown if other != key])
        raise RecipeError("no such key", where=key, remedy=f"{remedy}{others}")
    refuse_booleans_as_numbers(raw, where)
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as failure:
        raise describe_failure(failure, raw, where) from failure
    recipe = _resolve_paths(recipe, Path(path), typed, check_paths=check_paths)
    if check_paths:
        refuse_meaningless(recipe, where)
    return recipe


def read_mapping(path: str | Path, *, remedy: str) -> dict[str, Any]:
    """Return the mapping that a YAML file holds.

    Raises:
        RecipeError: For a file that cannot be read or holds something else.
    """
    raw = parse_yaml(_read_text(Path(path)), where=str(path))
    if not isinstance(raw, dict):
        problem = "is empty" if raw is None else f"is not a mapping but {quote(raw)}"
        raise RecipeError(problem, where=str(path), remedy=remedy)
    return raw


def render_recipe(recipe: Recipe) -> str:
    """Return a recipe as YAML with every default written out; loading it gives the same recipe."""
    return render_yaml(recipe.model_dump(mode="python"))


def render_yaml(values: Mapping[str, Any]) -> str:
    """Return plain values as YAML, in their own order."""
    stream = io.StringIO()
    writer = YAML(typ="safe", pure=True)
    writer.default_flow_style = False
    writer.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    writer.width = 100
    writer.allow_unicode = True
    writer.dump(_plain(values), stream)
    return stream.getvalue()


def recipe_schema() -> str:
    """Return the JSON Schema of a recipe, for editors."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return json.dumps(schema | Recipe.model_json_schema(), indent=2)


def _read_text(path: Path) -> str:
    where = str(path)
    try:
        with path.open("rb") as file:
            data = file.read(4 * MAX_CHARACTERS + 1)
        return data.decode("utf-8")
    except FileNotFoundError as error:
        raise RecipeError(
            "no such file", where=where, remedy="name a file that is there"
        ) from error
    except IsADirectoryError as error:
        raise RecipeError(
            "is a folder", where=where, remedy="name the recipe.yaml inside it"
        ) from error
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"is not UTF-8 (byte {error.start})", where=where, remedy="save it as UTF-8 text"
        ) from error
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        reason = error.strerror if isinstance(error, OSError) else error
        raise RecipeError(f"cannot be read: {reason}", where=where) from error


def given_twice(overrides: Sequence[str]) -> list[str]:
    """Return a line about each key that a person gave several values: the last one counts."""
    given: dict[str, list[str]] = {}
    for override in overrides:
        key, _, value = override.partition("=")
        given.setdefault(key.strip(), []).append(value)
    return [
        f"{key} is given {len(values)} times; the last one counts: {quote(values[-1])} "
        f"(to train each: --array {key}={','.join(dict.fromkeys(values))})"
        for key, values in given.items()
        if len(set(values)) > 1
    ]


def _apply_override(
    raw: dict[str, Any], override: str, where: str, unknown: dict[str, str]
) -> tuple[str, ...]:
    """Set `a.b=value` in `raw`, and return its path; of a key that there is not, the remedy."""
    key, equals, text = override.partition("=")
    path = tuple(key.strip().split("."))
    if not equals or not all(path):
        raise RecipeError(
            f"{quote(override)} is not key=value", remedy="write it like train.learning_rate=5e-4"
        )
    if not text.strip():  # such as of a shell variable that nobody has set
        raise RecipeError(
            "no value is given", where=key.strip(), remedy="write null for what it is without one"
        )
    value = parse_yaml(text, where=key.strip())
    section = raw
    for depth, name in enumerate(path):
        model = section_at(path[:depth], raw)
        if model is None:
            parent = ".".join(path[:depth])
            raise RecipeError(
                "no such key", where=key.strip(), remedy=f"{parent} has no parts; set it as a whole"
            )
        if name not in model.model_fields and model.model_config.get("extra") != "allow":
            unknown[key.strip()] = remedy_for_unknown(path[: depth + 1], model)
            break
        if depth == len(path) - 1:
            section[name] = value
            break
        if section.get(name) is None:
            section[name] = {}
        section = section[name]
        if not isinstance(section, dict):
            raise RecipeError(
                f"got {quote(section)}",
                where=f"{where}: {'.'.join(path[: depth + 1])}",
                remedy=f"must be a section before {key.strip()} can be set",
            )
    return path


def _resolve_paths(
    recipe: Recipe, recipe_path: Path, typed: Sequence[tuple[str, ...]], *, check_paths: bool
) -> Recipe:
    """Return the recipe with local paths made absolute."""
    folder = Path(recipe_path).absolute().parent
    changed: dict[str, dict[str, Any]] = {}
    for path in PATH_FIELDS:
        section, field = path
        value = getattr(getattr(recipe, section), field)
        absent = "does not exist"
        from_override = path in typed or (section,) in typed
        bases = [folder, Path.cwd()] if from_override else [folder]
        where = f"{recipe_path}: {section}.{field}"
        if isinstance(value, tuple):
            changed.setdefault(section, {})[field] = tuple(
                _resolved_source(source, bases, f"{where}[{at}]", check=check_paths)
                for at, source in enumerate(value)
            )
        elif value is not None and not (section == "data" and held_out(value) is not None):
            is_local = path == ("data", "template")
            if path == _START and (refusal := _why_not_on_hub(value, bases)):
                is_local, absent = True, refusal
            found = _resolved(
                value, bases, where, check=check_paths, is_local=is_local, absent=absent
            )
            if section == "model" and Path(found).is_absolute() and Path(found).is_file():
                raise RecipeError(
                    f"{quote(value)} is a file",
                    where=where,
                    remedy="name the folder with config.json and the safetensors files",
                )
            changed.setdefault(section, {})[field] = found
    parts = {name: getattr(recipe, name).model_copy(update=new) for name, new in changed.items()}
    return recipe.model_copy(update=parts)


def _why_not_on_hub(named: str, bases: Sequence[Path]) -> str:
    """Return what is wrong with a start that is no folder; nothing where it can be a hub id."""
    problem = "is neither a folder here nor a hub id like ORG/NAME"
    if hub_adapter(named) is None:
        return problem
    owner = named.partition("/")[0]
    if "@" in named or _find(owner, bases) is None:
        return ""
    return f"{problem}: {owner}/ is a folder here (on the hub it is {named}@main)"


def _resolved_source(
    source: RowSource, bases: Sequence[Path], where: str, *, check: bool
) -> RowSource:
    """Return a source with its local paths made absolute."""
    found = {"path": _resolved(source.path, bases, f"{where}.path", check=check)}
    if source.template is not None:
        where = f"{where}.template"
        found["template"] = _resolved(source.template, bases, where, check=check, is_local=True)
    return source.model_copy(update=found)


def _resolved(
    name: str,
    bases: Sequence[Path],
    where: str,
    *,
    check: bool,
    is_local: bool = False,
    absent: str = "does not exist",
) -> str:
    """Return a path as an absolute one, and a hub name as it is."""
    found = _find(name, bases)
    if found is not None:
        return str(found)
    pattern = None if is_local else _find_pattern(name, bases)
    if pattern is not None:
        return pattern
    if (is_local or _looks_local(name)) and check:
        raise RecipeError(
            f"{quote(name)} {absent}",
            where=where,
            remedy=f"relative paths start at {bases[0]}",
        )
    return name


def _looks_local(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.lower().endswith(_FILE_ENDINGS)


def _find(name: str, bases: Sequence[Path]) -> Path | None:
    """Return the absolute path of an existing file or folder, or None.

    The last part keeps its own name: hub caches hold `train.jsonl` as a link to a file without an
    ending, and the ending says how to read it.
    """
    for base in bases:
        try:
            candidate = base / Path(name).expanduser()
            candidate.stat()
            if candidate.name in ("", ".."):
                return candidate.resolve()
            return candidate.parent.resolve() / candidate.name
        except (OSError, ValueError, RuntimeError):  # absent, NUL bytes, too long, ~nobody
            continue
    return None


def _find_pattern(name: str, bases: Sequence[Path]) -> str | None:
    """Return a pattern of files as an absolute one, where it matches any."""
    for base in bases if glob.has_magic(name) else ():
        try:
            pattern = str(Path(glob.escape(str(base))) / Path(name).expanduser())
            if files_like(pattern):
                return pattern
        except (OSError, ValueError, RuntimeError):  # as in _find
            continue
    return None


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value
