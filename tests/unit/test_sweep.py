"""Arrays: which runs a grid makes, and the list of them on the disk."""

import json
from pathlib import Path

import pytest

from peft_dist.common.errors import RecipeError, RunDirError
from peft_dist.run.paths import ARRAY_FILE
from peft_dist.run.sweep import (
    MAX_ELEMENTS,
    array_elements,
    array_limit,
    grid,
    refuse_another_array,
    write_array,
)
from tests.unit.run_folders import make_run

ELEMENTS = [
    {"run_dir": "000", "settings": ["train.seed=1"]},
    {"run_dir": "001", "settings": ["train.seed=2"]},
]


def test_a_key_with_values_makes_a_run_of_each() -> None:
    assert grid(["train.seed=1,2,3"]) == [("train.seed=1",), ("train.seed=2",), ("train.seed=3",)]


def test_several_keys_make_every_combination_and_the_last_changes_fastest() -> None:
    assert grid(["train.seed=1,2", "method.rank=8,16"]) == [
        ("train.seed=1", "method.rank=8"),
        ("train.seed=1", "method.rank=16"),
        ("train.seed=2", "method.rank=8"),
        ("train.seed=2", "method.rank=16"),
    ]


def test_what_was_typed_stays_as_it_was_typed() -> None:
    assert grid(["train.learning_rate=1e-4,2E-4"]) == [
        ("train.learning_rate=1e-4",),
        ("train.learning_rate=2E-4",),
    ]


def test_a_file_holds_lists_of_any_value(tmp_path: Path) -> None:
    file = tmp_path / "grid.yaml"
    file.write_text("method.targets: [[q_proj, v_proj], all-linear]\ntrain.seed: [1, 2]\n")
    assert grid([str(file)]) == [
        ('method.targets=["q_proj", "v_proj"]', "train.seed=1"),
        ('method.targets=["q_proj", "v_proj"]', "train.seed=2"),
        ('method.targets="all-linear"', "train.seed=1"),
        ('method.targets="all-linear"', "train.seed=2"),
    ]
    assert len(grid([str(file), "method.rank=4,8"])) == 8


@pytest.mark.parametrize(
    ("specifications", "told"),
    [
        (["train.seed"], "'train.seed' is neither key=v1,v2,... nor a file"),
        (["train.seed="], "cannot tell the values of '' apart"),
        (["train.seed=1,,2"], "cannot tell the values of '1,,2' apart"),
        (["method.targets=[q,v],[k]"], "a YAML file of lists for any other value"),
        (["train.seed=1,1"], "gives 'train.seed', or one of its values, twice"),
        (["train.seed=1", "train.seed=2"], "gives 'train.seed', or one of its values, twice"),
        (["a=" + ",".join(map(str, range(40))), "b=" + ",".join(map(str, range(40)))],
         "makes 1600 runs; at most 1000 at once"),
    ],
)  # fmt: skip
def test_a_grid_that_cannot_be_meant_is_refused(specifications: list[str], told: str) -> None:
    with pytest.raises(RecipeError, match="^--array: ") as refused:
        grid(specifications)
    assert told in str(refused.value)


@pytest.mark.parametrize(
    "text", ["", "[1, 2]", "train.seed: 1", "train.seed: []", "7: [1]", "a: ["]
)
def test_a_file_that_is_no_grid_is_refused_by_name(tmp_path: Path, text: str) -> None:
    file = tmp_path / "grid.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError, match=r"grid\.yaml"):
        grid([str(file)])


def test_as_many_elements_as_three_digits_count_are_made() -> None:
    assert len(grid(["train.seed=" + ",".join(map(str, range(MAX_ELEMENTS)))])) == MAX_ELEMENTS


def test_the_list_of_runs_is_read_back(tmp_path: Path) -> None:
    assert (array_elements(tmp_path), array_limit(tmp_path)) == ([], None)
    refuse_another_array(tmp_path, ELEMENTS)
    write_array(tmp_path, ELEMENTS, 2)
    assert (array_elements(tmp_path), array_limit(tmp_path)) == (ELEMENTS, 2)
    refuse_another_array(tmp_path, ELEMENTS)  # the same one goes on


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    write_array(tmp_path, ELEMENTS, None)
    with pytest.raises(RunDirError, match="holds another array; choose another folder"):
        refuse_another_array(tmp_path, ELEMENTS[:1])
    with pytest.raises(RunDirError, match="holds a run; choose another folder"):
        refuse_another_array(make_run(tmp_path / "run"), ELEMENTS)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"elements": 7}', '{"elements": [{"run_dir": "../evil"}]}',
     '{"elements": [{"run_dir": "/etc", "settings": []}]}', '{"elements": [{"run_dir": "000"}]}',
     '{"elements": [{"run_dir": "000", "settings": [7]}]}',
     '{"elements": [], "limit": "many"}'],
)  # fmt: skip
def test_a_spoiled_list_of_runs_is_told_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / ARRAY_FILE).write_text(text)
    with pytest.raises(RunDirError, match=r"array\.json: is no list of an array's runs"):
        array_elements(tmp_path)


def test_a_list_without_a_limit_is_one_of_all_at_once(tmp_path: Path) -> None:
    (tmp_path / ARRAY_FILE).write_text(json.dumps({"elements": ELEMENTS}))
    assert array_limit(tmp_path) is None
