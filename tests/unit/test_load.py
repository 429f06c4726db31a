"""Reading recipes: YAML's traps, overrides, paths, and errors that fit on one line."""

from collections.abc import Callable
from pathlib import Path

import pytest

from peft_dist.common.errors import RecipeError
from peft_dist.config import load_recipe, render_recipe
from peft_dist.optim.lr_schedule import peak_learning_rate

Write = Callable[[str], Path]

MINIMAL = "model: {name: ./model}\ndata: {train: train.jsonl}\n"


def error_of(path: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_rendered_recipe_loads_to_the_same_recipe(recipe_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(
        recipe_file,
        ["train.learning_rate=1e-7", "method.targets=[q_proj]", 'evaluate.choices=[" a", "no"]',
         "data.eval=train.jsonl", "model.name=some/model", "model.revision='1e3'"],
    )  # fmt: skip
    copy = tmp_path / "elsewhere" / "recipe.yaml"
    copy.parent.mkdir()
    copy.write_text(render_recipe(recipe), encoding="utf-8")
    assert load_recipe(copy) == recipe
    assert recipe.train.learning_rate == 1e-7
    assert recipe.evaluate.choices == (" a", "no")
    assert recipe.model.revision == "1e3"


def test_a_number_with_an_exponent_and_no_dot_is_a_number(write_recipe: Write) -> None:
    path = write_recipe(MINIMAL + "train: {learning_rate: 1e-4, epsilon: 1E-9}\n")
    assert load_recipe(path).train.learning_rate == 1e-4


def test_a_time_stays_text_and_is_refused_where_a_number_belongs(recipe_file: Path) -> None:
    hub = ["model.name=some/model", "model.revision=24:00:00"]
    assert load_recipe(recipe_file, hub).model.revision == "24:00:00"
    assert "got '24:00:00'" in error_of(recipe_file, "train.steps=24:00:00")


def test_no_and_off_and_dates_stay_text_where_text_belongs(recipe_file: Path) -> None:
    for text in ("no", "off", "y", "2024-01-01", "0x"):
        hub = ["model.name=some/model", f"model.revision={text}"]
        assert load_recipe(recipe_file, hub).model.revision == text


def test_off_is_a_word_of_a_setting_that_has_it(recipe_file: Path) -> None:
    assert load_recipe(recipe_file, ["model.dropout=off"]).model.dropout == "off"
    asked = load_recipe(recipe_file, ["model.dropout=as-configured"])
    assert asked.model.dropout == "as-configured"


def test_no_switches_a_switch_off(recipe_file: Path) -> None:
    assert load_recipe(recipe_file, ["data.packing=no"]).data.packing is False


def test_a_leading_zero_does_not_make_a_number_octal(recipe_file: Path) -> None:
    assert load_recipe(recipe_file, ["train.steps=010"]).train.steps == 10


def test_the_yaml_1_1_directive_is_refused(write_recipe: Write) -> None:
    assert "directives" in error_of(write_recipe("%YAML 1.1\n---\n" + MINIMAL))


def test_true_is_not_taken_for_the_number_one(recipe_file: Path) -> None:
    line = error_of(recipe_file, "method.rank=true")
    assert "method.rank: got True; must be a whole number above 0" in line


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.learning_rat=1", "did you mean 'learning_rate'"),
        ("method.rnk=3", "did you mean 'rank'"),
        ("metod.rank=3", "did you mean 'method'"),
        ("method={kind: lora, rnk: 3}", "method.rnk: no such key; did you mean 'rank'"),
        ("method.kind=loar", "did you mean 'lora'"),
        ("tracking.wandb.mod=x", "did you mean 'mode'"),
        (
            "parallel.strategy=fdsp",
            "must be one of 'auto', 'ddp', 'fsdp', 'hsdp', 'zero2', 'zero3'; did you mean",
        ),
        ("method.targets=5", "must be 'all-linear' or a list"),
        ("train.betas=[1, 2]", "a list of 2, each item a number of at least 0.0 and below 1.0"),
        ("train.steps.x=1", "train.steps has no parts"),
        ("train.learning_rate=.nan", "got nan; must be a number above 0"),
        ("model.name=", "no value is given"),
        ("model.revision=1234567", "must be text that is not empty or null; put it in quotes"),
        ("nonsense", "is not key=value"),
        ("train.steps=[", "is not YAML"),
        ("train=5", "must be a section with any of"),
    ],
)
def test_an_error_names_the_field_the_value_and_the_remedy(
    recipe_file: Path, override: str, expected: str
) -> None:
    assert expected in error_of(recipe_file, override)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["method={init: pissa}"], "method.init pissa splits the full weights; set quantization"),
        (["method={init: olora}"], "method.init olora splits the full weights; set quantization"),
        (
            ["quantization=none", "method={init: olora, rank_pattern: {q_proj: 4}}"],
            "init: olora takes one rank and alpha",
        ),
        (["method={init: pissa, dora: true}"], "init: pissa and dora both decompose the weight"),
        (
            ["train.optimizer=muon", "parallel.strategy=zero2"],
            "train.optimizer muon needs whole matrices, which zero2 shares out in pieces; set",
        ),
        (["train.optimizer=schedule_free_adamw"], "schedule_free_adamw is not offered: it trains"),
        (["method={init: loftq, dora: true}"], "init: loftq and dora both decompose the weight"),
        (["method={init: loftq}", "quantization=none"], "loftq is for a base in 4 bits; set quant"),
        (["method={init: corda_kpm}"], "method.init corda_kpm splits the full weights; set quant"),
        (
            ["method={init: lora_ga}", "quantization=none", "objective=dpo"],
            "method.init lora_ga takes the gradient of objective sft; choose another init",
        ),
        (
            ["method={kind: prefix}", "model.task=sequence-classification"],
            "prefix is for causal-lm",
        ),
        (["method={kind: prompt, init: text}"], "init: text needs a text; add it"),
        (["method={kind: prompt, init: random, text: x}"], "text is not used with init: random"),
        (["method={kind: bottleneck, bottleneck_size: 8, reduction_factor: 2}"], "keep one"),
        (["method={kind: bottleneck, placement: parallel, residual: false}"], "cannot be off"),
        (["method={kind: bottlneck}"], "kind 'bottlneck' is not known; did you mean 'bottleneck'?"),
        (["method={kind: peft}"], "method.type: is missing"),
        (["method={kind: bitfit, rank: 3}"], "method.rank: no such key"),
        (
            ["data.truncation=split", "objective=dpo"],
            "objective dpo takes rows whole; set data.trun",
        ),
        (
            ["data.truncation=split", "model.task=sequence-classification"],
            "model.task sequence-classification takes rows whole",
        ),
        (
            ["data.truncation=split", "data.eval=train.jsonl", "evaluate.choices=[a, b]"],
            "evaluate.choices takes rows whole",
        ),
        (["parallel={strategy: ddp, offload: cpu}"], "offload cpu is for a sharded base, not ddp"),
        (["parallel={strategy: ddp, reshard: step}"], "reshard step is for strategy fsdp or hsdp"),
        (
            ["parallel={strategy: zero3, dequantized_blocks: 1}"],
            "dequantized_blocks 1 is not for strategy zero3",
        ),
        (
            ["parallel.dequantized_blocks=1", "quantization=none"],
            "parallel.dequantized_blocks 1 is for a base in 4 bits",
        ),
        (
            ["parallel.dequantized_blocks=1", "method.fused=auto"],
            "parallel.dequantized_blocks 1 and method.fused auto exclude each other",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_one_line(
    recipe_file: Path, overrides: list[str], expected: str
) -> None:
    line = error_of(recipe_file, *overrides)
    assert expected in line
    assert "\n" not in line


@pytest.mark.parametrize(
    "kind", ["lora", "bottleneck", "prefix", "prompt", "bitfit", "{kind: peft, type: IA3}"]
)
def test_every_method_has_a_learning_rate_of_its_own(recipe_file: Path, kind: str) -> None:
    method = kind if kind.startswith("{") else f"{{kind: {kind}}}"
    recipe = load_recipe(recipe_file, [f"method={method}"], check_paths=False)
    assert recipe.train.learning_rate is None
    assert peak_learning_rate(recipe) == recipe.method.default_learning_rate > 0
    given = load_recipe(
        recipe_file, [f"method={method}", "train.learning_rate=0.5"], check_paths=False
    )
    assert peak_learning_rate(given) == 0.5


def test_several_errors_are_the_first_and_a_count(recipe_file: Path) -> None:
    line = error_of(recipe_file, "train.steps=0", "method.rank=0", "method.targets=5")
    assert "method.rank: got 0" in line
    assert "(also wrong: " in line


def test_an_unknown_key_in_the_file_is_refused_with_the_nearest(write_recipe: Write) -> None:
    line = error_of(write_recipe(MINIMAL + "quantisation: nf4\n"))
    assert "quantisation: no such key; did you mean 'quantization'?" in line


def test_a_missing_section_says_how_to_add_it(write_recipe: Write) -> None:
    assert "data: is missing" in error_of(write_recipe("model: {name: org/name}\n"))


def test_a_cross_field_fault_keeps_its_own_words(recipe_file: Path) -> None:
    line = error_of(recipe_file, "train.steps=1", "train.epochs=1")
    assert "train: steps and epochs are both given; keep one" in line


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "is empty"),
        ("# only a comment\n", "is empty"),
        ("- a\n", "is not a mapping"),
        ("a:\n\tb: 1\n", "indent with spaces"),
        ("a: \x01\n", "control character"),
        ("a: &a [*a]\n", "an alias holds itself"),
        ("a: *b\n", "undefined alias"),
        ("a: 1\na: 2\n", "the key 'a' is there twice"),
        ("a: {b: 1, b: 2}\n", "the key 'b' is there twice"),
        ("a: &x {b: 1}\nc: {<<: *x}\n", "merge keys"),
        ("a: !!python/object:os.system ls\n", "is not read"),
        ("a: !!binary aGk=\n", "is not read"),
        ("1: 2\n", "the key 1 is not text"),
        ("? [a]\n: b\n", "is not text"),
        ("a: 1\n---\nb: 2\n", "another document"),
        ("[" * 5000, "nested too deeply"),
        ("a: " + "9" * 5000 + "\n", "is not read as a number"),
        ("x" * 1_000_001, "characters"),
    ],
)
def test_text_that_is_no_recipe_is_one_line(write_recipe: Write, text: str, expected: str) -> None:
    assert expected in error_of(write_recipe(text))


def test_nested_aliases_are_stopped_before_they_fill_the_memory(write_recipe: Write) -> None:
    lines = ["a0: &a0 [x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 30)]
    assert "expand to more than" in error_of(write_recipe("\n".join(lines)))


def test_a_plain_alias_is_read(write_recipe: Write) -> None:
    path = write_recipe(MINIMAL + "train: {steps: &n 7}\ncheckpoint: {every_steps: *n}\n")
    assert load_recipe(path).checkpoint.every_steps == 7


def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"a: \xff\n")
    assert "no such file" in error_of(tmp_path / "absent.yaml")
    assert "is a folder" in error_of(tmp_path)
    assert "is not UTF-8 (byte 3)" in error_of(tmp_path / "latin.yaml")
    assert "cannot be read" in error_of(tmp_path / ("x" * 300))
    assert "cannot be read" in error_of(Path("nul\0byte"))


def test_local_paths_become_absolute_and_hub_names_stay(
    write_recipe: Write, tmp_path: Path
) -> None:
    path = write_recipe("model: {name: org/model}\ndata: {train: ./train.jsonl, eval: rows}\n")
    recipe = load_recipe(path)
    assert recipe.model.name == "org/model"
    assert recipe.data.train == str(tmp_path / "train.jsonl")
    assert recipe.data.eval == "rows"


def test_the_paths_of_several_sources_become_absolute_and_come_back(
    write_recipe: Write, tmp_path: Path
) -> None:
    sources = "[{path: train.jsonl, weight: 2}, {path: org/rows, weight: 1, split: a}]"
    path = write_recipe(
        f"model: {{name: ./model}}\ndata: {{train: {sources}, eval: 5%, columns: {{prompt: q}}}}\n"
    )
    recipe = load_recipe(path)
    first, second = recipe.data.sources("train")
    assert (first.path, first.split) == (str(tmp_path / "train.jsonl"), "train")
    assert (second.path, second.split) == ("org/rows", "a")
    assert first.columns is not None and first.columns.names() == {"prompt": "q"}
    assert recipe.data.held_out == 0.05
    copy = tmp_path / "copy.yaml"
    copy.write_text(render_recipe(recipe), encoding="utf-8")
    assert load_recipe(copy) == recipe


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.train=[{path: absent.jsonl}]", "data.train[0].path: 'absent.jsonl' does not exist"),
        ("data.train=[{path: a, wieght: 2}]", "data.train[0].wieght: no such key; did you mean"),
        ("data.train=[{path: a}, {weight: 2}]", "data.train[1].path: is missing"),
        ("data.train=[{path: a, weight: true}]", "data.train[0].weight: got True; must be"),
        (
            "data.train=[{path: a, weight: 0}]",
            "data.train[0].weight: got 0; must be a number above",
        ),
        ("data.train=[{path: a, rows: 1, epochs: 2}]", "rows and epochs are both given; keep one"),
        ("data.train=[{path: a, weight: 1}, {path: b}]", "without (b); give all a weight"),
        ("data.train=[]", "data.train: got []; must be"),
        ("data.train=[a.jsonl]", "data.train[0]: got 'a.jsonl'; must be text that is not"),
        ("data.train=3", "data.train: got 3; must be"),
        ("data.eval=0", "data.eval: got 0; must be"),
        ("data.eval=true", "data.eval: got True; must be"),
        ("data.eval=100%", "eval 100% must be above 0% and below 100%"),
        ("data.eval=[{path: a, weight: 2}]", "eval: weight is for training rows; remove it"),
        ("data.columns.promt=q", "data.columns.promt: no such key; did you mean 'prompt'?"),
    ],
)
def test_a_wrong_source_of_rows_is_one_line(
    recipe_file: Path, override: str, expected: str
) -> None:
    assert expected in error_of(recipe_file, override)


def test_a_linked_row_file_keeps_its_ending(recipe_file: Path, tmp_path: Path) -> None:
    (tmp_path / "blob").write_text("{}\n", encoding="utf-8")
    (tmp_path / "linked.jsonl").symlink_to("blob")
    recipe = load_recipe(recipe_file, ["data.train=linked.jsonl"])
    assert recipe.data.train == str(tmp_path / "linked.jsonl")


def test_an_override_may_name_a_file_of_the_current_folder(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    (here / "mine.jsonl").write_text("{}\n", encoding="utf-8")
    monkeypatch.chdir(here)
    recipe = load_recipe(recipe_file, ["data.train=mine.jsonl"])
    assert recipe.data.train == str(here / "mine.jsonl")


def test_a_tilde_is_the_home_folder(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_recipe(recipe_file, ["model.name=~/model"]).model.name == str(tmp_path / "model")


@pytest.mark.parametrize("name", ["absent.jsonl", "./absent", "/absent", "~/absent", "~nobody/x"])
def test_a_path_that_does_not_exist_is_an_error_that_names_the_field(
    recipe_file: Path, name: str
) -> None:
    assert "data.train" in error_of(recipe_file, f"data.train={name}")
    assert load_recipe(recipe_file, [f"data.train={name}"], check_paths=False).data.train == name


def test_a_model_that_is_a_file_is_refused(recipe_file: Path) -> None:
    assert "is a file" in error_of(recipe_file, "model.name=train.jsonl")


def test_a_kind_where_no_section_has_one_is_one_line(recipe_file: Path) -> None:
    line = error_of(recipe_file, "checkpoint={kind: x}")
    assert "checkpoint.kind: no such key; valid: background, every_seconds, every_steps" in line


def test_a_run_is_saved_watched_and_restarted_without_being_told_to(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    assert recipe.checkpoint.model_dump() == {
        "every_steps": None,
        "every_seconds": 600.0,
        "keep_last": 2,
        "keep_best": 0,
        "background": True,
        "max_failed_saves": 3,
    }
    assert recipe.parallel.max_restarts == 3
    assert (recipe.train.non_finite, recipe.train.max_skipped_steps) == ("skip", 10)
    without = load_recipe(recipe_file, ["checkpoint.every_seconds=null"])
    assert without.checkpoint.every_seconds is None


@pytest.mark.parametrize(
    "override",
    [
        "train.non_finite=retry",
        "train.max_skipped_steps=-1",
        "parallel.max_restarts=-1",
        "checkpoint.every_seconds=0",
        "checkpoint.keep_last=0",
        "checkpoint.keep_best=-1",
        "checkpoint.max_failed_saves=0",
        "watchdog.min_s=0",
        "watchdog.save_s=-1",
    ],
)
def test_a_limit_that_makes_no_sense_is_one_line(recipe_file: Path, override: str) -> None:
    assert override.partition("=")[0] in error_of(recipe_file, override)


def test_the_best_checkpoints_are_known_by_evaluations(recipe_file: Path) -> None:
    told = error_of(recipe_file, "checkpoint.keep_best=1")
    assert "checkpoint.keep_best needs held-out losses; set evaluate.every_steps" in told
