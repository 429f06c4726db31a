"""Whatever stands in a recipe or an override: a recipe, or one line and exit code 2."""

import contextlib
import io
import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peft_dist.cli.main import main
from peft_dist.config import Recipe, load_recipe, render_recipe

BASE = {"model": {"name": "org/model"}, "data": {"train": "org/rows"}}

SECTIONS = sorted(Recipe.model_fields)
FIELDS = sorted({name for field in Recipe.model_fields.values()
                 for name in getattr(field.annotation, "model_fields", {})})  # fmt: skip

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["auto", "nf4", "lora", "no", "24:00:00", "1e-4", "~", ".", "/", "\0.json"])
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=12,
)
yaml_pieces = st.lists(
    st.sampled_from(
        ["a", "model", "train", ": ", ":", "- ", "\n", "  ", "\t", "{", "}", "[", "]", ",", "&x ",
         "*x", "!!", "!!int ", "!t ", "|\n", ">", "'", '"', "#", "%", "---", "...", "<<", "?", "~",
         "1e-4", "0x", "0o8", "1:30", "no", "\\", "\\ud800", "\x00", "\x85", "\u2028", "\ufeff"]
    ),
    max_size=40,
).map("".join)  # fmt: skip

quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def check(text: bytes, overrides: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_bytes(text)
        errors, output = io.StringIO(), io.StringIO()
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(output):
            code = main(["validate", str(path), *overrides])
        if code == 0:
            recipe = load_recipe(path, overrides)
            again = Path(folder) / "again.yaml"
            again.write_text(render_recipe(recipe), encoding="utf-8")
            assert load_recipe(again) == recipe
        else:
            assert code == 2
            line = errors.getvalue()
            assert line.startswith("peft-dist: error: ")
            assert len(line.splitlines()) == 1


@quick
@given(st.binary(max_size=200))
def test_random_bytes(data: bytes) -> None:
    check(data, [])


@pytest.mark.slow
@quick
@given(st.text(max_size=200) | yaml_pieces)
def test_random_yaml_text(text: str) -> None:
    check(text.encode("utf-8", "surrogatepass"), [])


@pytest.mark.slow
@quick
@given(st.sampled_from(SECTIONS), values)
def test_random_values_for_a_section(section: str, value: object) -> None:
    check(json.dumps(BASE | {section: value}).encode(), [])


@pytest.mark.slow
@quick
@given(st.sampled_from(SECTIONS), st.sampled_from(FIELDS), values)
def test_random_values_for_a_field(section: str, field: str, value: object) -> None:
    check(json.dumps(BASE).encode(), [f"{section}.{field}={json.dumps(value)}"])


@pytest.mark.slow
@quick
@given(
    st.lists(
        st.builds(
            lambda key, text: f"{key}={text}",
            st.sampled_from(SECTIONS + [f"{s}.{f}" for s in SECTIONS for f in FIELDS])
            | st.text(max_size=10),
            st.text(max_size=20) | yaml_pieces,
        ).filter(lambda word: not word.startswith("-")),
        max_size=3,
    )
)
def test_random_overrides(overrides: list[str]) -> None:
    check(json.dumps(BASE).encode(), overrides)
