"""Compiled blocks compute what plain ones do, and are compiled once for rows of all lengths."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from peft_dist.common.errors import RecipeError
from peft_dist.data.token_cache import TokenizedRows, tokenize_rows
from peft_dist.distributed.world import World
from peft_dist.model.source import find_base
from peft_dist.model.ways import compiles
from peft_dist.model_setup import ModelSetup, set_up_model
from tests.tiny import completion_rows, tiny_model, tiny_recipe, write_jsonl

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("llama", {}),
    "lora that drops": ("llama", {"method": {"dropout": 0.5}}),
    "recomputed": ("llama", {"train": {"activation_checkpointing": True}}),
    "dora, not quantized": ("qwen3", {"method": {"dora": True}, "quantization": "none"}),
    "bottleneck": ("qwen2", {"method": {"kind": "bottleneck"}}),
    "prefix": ("llama", {"method": {"kind": "prefix"}}),
    "prompt": ("mistral", {"method": {"kind": "prompt"}}),
    "bitfit": ("gpt2", {"method": {"kind": "bitfit"}}),
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
    recipe = tiny_recipe(
        folder / "model", file, **{**sections, "model": {"compile": code, "dtype": "float32"}}
    )
    rows = tokenize_rows(recipe, "train", folder / "cache")
    setup = set_up_model(recipe, alone, find_base(recipe, folder / "cache"))
    setup.model.train()
    return setup, rows


def learn(
    setup: ModelSetup, rows: TokenizedRows, ids: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the losses of a micro-batch, and the gradient of their sum."""
    torch.manual_seed(0)
    nll = setup.model(setup.pack(rows, np.array(ids))).nll
    return nll.detach(), setup.engine.gradient_of(nll.sum())


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_compiled_blocks_give_the_same_losses_and_gradients_and_are_compiled_once(
    tmp_path: Path, alone: World, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """What torch makes of a block is run by its own operators here: code takes minutes."""
    from torch._dynamo.utils import counters

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    plain, rows = set_up(tmp_path, alone, *CASES[name], "off")
    setup, _ = set_up(tmp_path, alone, *CASES[name], "blocks")
    learn(setup, rows, [0, 1])  # what drops, or stands in front of rows, the proof has not run
    compiled = graphs()
    assert compiled >= 2
    plain.packing = setup.packing
    for ids in ([2, 3, 4], [5, 6, 7, 8, 9], [10, 11]):
        for found, wanted in zip(learn(setup, rows, ids), learn(plain, rows, ids), strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    assert graphs() == compiled
    assert not counters["graph_break"]


@pytest.mark.slow
def test_blocks_that_do_not_compile_run_as_they_are_and_say_so(
    tmp_path: Path, alone: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: Any) -> Any:
        raise OSError("no compiler here")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=fails))
    torch._dynamo.reset()
    setup, rows = set_up(tmp_path, alone, "llama", {}, "blocks")
    plain, _ = set_up(tmp_path, alone, "llama", {}, "off")
    for found, wanted in zip(learn(setup, rows, [0]), learn(plain, rows, [0]), strict=True):
        assert torch.equal(found, wanted)
    said = [record for record in caplog.records if record.levelname == "WARNING"]
    assert [record.name for record in said] == ["peft_dist.model.ways"]
    assert "llama: its blocks run as they are" in said[0].getMessage()
    assert "no compiler here" in said[0].getMessage()


@pytest.mark.slow
def test_a_compiled_backward_that_is_wrong_is_not_trained_with(
    tmp_path: Path, alone: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch._aot_autograd.utils import make_boxed_func

    def twice(graph: Any, _: Any) -> Any:
        return make_boxed_func(
            lambda *given: [
                2 * out
                if out is not None and out.dtype == torch.float32 and out.dim() == 2
                else out
                for out in graph(*given)
            ]
        )

    backend = aot_autograd(
        fw_compiler=lambda graph, _: make_boxed_func(graph.forward), bw_compiler=twice
    )
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    set_up(tmp_path, alone, "llama", {}, "blocks")
    (said,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "the gradient differs by" in said.getMessage()


@pytest.mark.slow
def test_code_for_this_processor_gives_the_same_losses_and_gradients(
    tmp_path: Path, alone: World, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("WARNING")
    torch._dynamo.reset()
    one_layer: dict[str, Any] = {"method": {"targets": ["q_proj"]}}
    plain, rows = set_up(tmp_path, alone, "llama", one_layer, "off")
    setup, _ = set_up(tmp_path, alone, "llama", one_layer, "blocks")
    plain.packing = setup.packing
    for found, wanted in zip(learn(setup, rows, [0, 1]), learn(plain, rows, [0, 1]), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    assert not caplog.records


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
