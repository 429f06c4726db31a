"""Compiled blocks compute what plain ones do, and are compiled once for rows of all lengths."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from peft_dist.common.errors import RecipeError
from peft_dist.data.token_cache import TokenizedRows, tokenize_rows
from peft_dist.distributed.world import World
from peft_dist.model.attention import ROW_ATTENTION
from peft_dist.model.compiled import set_up_compiler
from peft_dist.model.source import find_base
from peft_dist.model.ways import compiles, ways_of
from peft_dist.model_setup import ModelSetup, set_up_model
from tests.faults.long import only_long
from tests.tiny import completion_rows, tiny_model, tiny_recipe, write_jsonl

RECOMPUTED: dict[str, Any] = {"train": {"activation_checkpointing": True}}
"""All blocks are one code then: the input of the first has a gradient as well."""
PREFIX: dict[str, Any] = {"method": {"kind": "prefix"}}
BITFIT: dict[str, Any] = {"method": {"kind": "bitfit"}}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "recomputed prefix": ("llama", PREFIX | RECOMPUTED),
    "bitfit": ("gpt2", BITFIT),
}
LONG_CASES: dict[str, tuple[str, dict[str, Any]]] = CASES | {
    "lora": ("llama", {}),
    "lora, recomputed": ("llama", RECOMPUTED),
    "lora, not quantized": ("qwen3", {"quantization": "none"}),
    "lora that drops": ("llama", {"method": {"dropout": 0.5}}),
    "bottleneck": ("qwen2", {"method": {"kind": "bottleneck"}}),
    "recomputed bottleneck": ("llama", {"method": {"kind": "bottleneck"}} | RECOMPUTED),
    "prefix": ("llama", PREFIX),
    "prompt": ("mistral", {"method": {"kind": "prompt"}}),
    "recomputed prompt": ("llama", {"method": {"kind": "prompt"}} | RECOMPUTED),
    "recomputed bitfit": ("qwen2", BITFIT | RECOMPUTED),
    "in float16": ("llama", {"model": {"dtype": "float16"}}),
    "in bfloat16": ("llama", {"model": {"dtype": "bfloat16"}}),
}


def graphs() -> int:
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def set_up(
    folder: Path, alone: World, architecture: str, sections: dict[str, Any], code: str
) -> tuple[ModelSetup, TokenizedRows]:
    if not (folder / "model").exists():
        tiny_model(folder / "model", architecture)
    file = write_jsonl(folder / "rows.jsonl", completion_rows(12))
    model = {"dtype": "float32"} | sections.get("model", {}) | {"compile": code}
    recipe = tiny_recipe(folder / "model", file, **sections | {"model": model})
    rows = tokenize_rows(recipe, "train", folder / "cache")
    setup = set_up_model(recipe, alone, find_base(recipe, folder / "cache"))
    setup.model.train()
    return setup, rows


def learn(
    setup: ModelSetup, rows: TokenizedRows, ids: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the losses of a micro-batch, and the gradient of their sum."""
    torch.manual_seed(0)
    with setup.autocast():
        nll = setup.model(setup.pack(rows, np.array(ids))).nll
    return nll.detach(), setup.engine.gradient_of(nll.sum())


@pytest.fixture
def made_by(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Return a function that chooses what makes code; torch's own compiler takes a minute."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    compiler = torch.compile
    return lambda backend: monkeypatch.setattr(torch, "compile", partial(compiler, backend=backend))


def assert_compiled_once_with_the_same_results(
    folder: Path, alone: World, case: tuple[str, dict[str, Any]]
) -> None:
    from torch._dynamo.utils import counters

    plain, rows = set_up(folder, alone, *case, "off")
    setup, _ = set_up(folder, alone, *case, "blocks")
    assert graphs() > 0
    if case[1].get("method", {}).get("dropout"):
        learn(setup, rows, [0, 1])  # what drops is other code, which the proof does not run
    compiled = graphs()
    plain.packing = setup.packing
    rough = {"float16": 2e-2, "bfloat16": 0.1}.get(case[1].get("model", {}).get("dtype"), 1e-5)
    for ids in ([2, 3, 4], [5, 6, 7, 8, 9], [10, 11]):
        for found, wanted in zip(learn(setup, rows, ids), learn(plain, rows, ids), strict=True):
            assert float((found - wanted).norm()) <= rough * float(wanted.norm())
    assert graphs() == compiled
    assert not counters["graph_break"]


@pytest.mark.parametrize("name", CASES)
def test_what_blocks_do_is_found_once_for_rows_of_all_lengths(
    tmp_path: Path, alone: World, made_by: Callable[[Any], None], name: str
) -> None:
    made_by("eager")
    assert_compiled_once_with_the_same_results(tmp_path, alone, CASES[name])


@only_long
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", LONG_CASES)
def test_compiled_blocks_give_the_same_losses_and_gradients(
    tmp_path: Path, alone: World, made_by: Callable[[Any], None], name: str, backend: str
) -> None:
    if backend == "inductor" and "drops" in name:
        backend = "aot_eager"  # it has random numbers of its own
    made_by(backend)
    assert_compiled_once_with_the_same_results(tmp_path, alone, LONG_CASES[name])


@pytest.mark.parametrize("method", [{}, {"dora": True}])
def test_blocks_that_do_not_compile_run_as_they_are_and_say_so(
    tmp_path: Path,
    alone: World,
    made_by: Callable[[Any], None],
    caplog: pytest.LogCaptureFixture,
    method: dict[str, Any],
) -> None:
    def fails(*_: Any) -> Any:
        raise OSError("no compiler here")

    made_by("eager" if method else fails)
    sections = {"method": method, "quantization": "none"}
    setup, rows = set_up(tmp_path, alone, "llama", sections, "blocks")
    assert setup.packing, "which compiled code would not allow"
    plain, _ = set_up(tmp_path, alone, "llama", sections, "off")
    for found, wanted in zip(learn(setup, rows, [0]), learn(plain, rows, [0]), strict=True):
        assert torch.equal(found, wanted)
    (said,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert said.name == "peft_dist.model.ways"
    assert "llama: its blocks run as they are; padded rows" in said.getMessage()
    assert ("Unsupported" if method else "no compiler here") in said.getMessage()


def test_a_compiled_backward_that_is_wrong_is_not_trained_with(
    tmp_path: Path,
    alone: World,
    made_by: Callable[[Any], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    def twice(graph: Any, _: Any) -> Any:
        return lambda *given: [2 * out - out.detach() for out in graph(*given)]

    made_by(twice)
    set_up(tmp_path, alone, "llama", RECOMPUTED, "blocks")
    (said,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "the gradient differs by" in said.getMessage()


def test_code_that_fails_in_training_is_left_and_told_once(
    tmp_path: Path,
    alone: World,
    made_by: Callable[[Any], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    compiles = True

    def maybe(graph: Any, _: Any) -> Any:
        if not compiles:
            raise OSError("no room for code")
        return graph

    made_by(maybe)
    sections = {"method": {"dropout": 0.5}} | RECOMPUTED
    setup, rows = set_up(tmp_path, alone, "llama", sections, "blocks")
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    compiles = False
    learn(setup, rows, [0, 1])  # dropout is other code
    learn(setup, rows, [2])
    (said,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "llama: its blocks are not compiled and run slower" in said.getMessage()
    assert "no room for code" in said.getMessage()


def test_rounding_of_a_model_in_bfloat16_is_not_taken_for_wrong_code(
    tmp_path: Path, alone: World, made_by: Callable[[Any], None]
) -> None:
    made_by("eager")
    model = tiny_model(tmp_path / "model", "llama", num_hidden_layers=6)
    with torch.no_grad():
        model.lm_head.weight.mul_(40.0)
    model.save_pretrained(tmp_path / "model")
    sections = {"model": {"dtype": "bfloat16"}, "quantization": "none"} | RECOMPUTED
    setup, _ = set_up(tmp_path, alone, "llama", sections, "blocks")
    assert graphs() == 1
    assert not setup.packing, "as compiled code has it, whose losses differ by less than rounding"


@pytest.mark.parametrize(("strategy", "wanted"), [("fsdp", True), ("zero3", False)])
def test_blocks_are_compiled_on_gpus_where_an_engine_gathers_whole_blocks(
    strategy: str, wanted: bool, tmp_path: Path
) -> None:
    recipe = tiny_recipe(tmp_path, tmp_path / "rows.jsonl", model={"compile": "auto"})
    assert compiles(recipe, torch.device("cuda"), strategy) is wanted
    assert not compiles(recipe, torch.device("cpu"), strategy)


def test_blocks_cannot_be_asked_to_be_compiled_under_zero3(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, tmp_path / "rows.jsonl", model={"compile": "blocks"})
    with pytest.raises(RecipeError, match="model.compile: zero3 gathers each layer"):
        compiles(recipe, torch.device("cpu"), "zero3")


def test_code_is_kept_in_the_cache_folder_and_made_by_few_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor import config

    monkeypatch.setattr(config, "compile_threads", 32)
    monkeypatch.setattr(config, "deterministic", False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64))
    environ: dict[str, str] = {}
    set_up_compiler(tmp_path, 16, deterministic=False, environ=environ)
    assert (config.compile_threads, config.deterministic) == (4, False)
    set_up_compiler(tmp_path / "other", 1, deterministic=True, environ=environ)
    assert (config.compile_threads, config.deterministic) == (8, True)
    assert environ == {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}


def test_packed_rows_cannot_be_asked_to_be_compiled_on_a_cpu(tmp_path: Path) -> None:
    sections = {"model": {"compile": "blocks"}, "data": {"packing": True}}
    recipe = tiny_recipe(tmp_path, tmp_path / "rows.jsonl", **sections)
    with pytest.raises(RecipeError, match="model.compile: packed rows are compiled on GPUs alone"):
        ways_of(recipe, picked="sdpa", ours=[ROW_ATTENTION], own_attention=False, compiled=True)
