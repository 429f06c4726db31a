"""Attention with capped scores on GPUs: one call for all rows, by code that is made once."""

import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from peft_dist.model import capped
from peft_dist.model.attention import ROW_ATTENTION, VARLEN_ATTENTION
from tests.configs import CONFIGS
from tests.fakecuda.device import counting
from tests.fakecuda.rank import RANKS, of_shape, prepare, steps
from tests.fakecuda.test_cards import run
from tests.fakecuda.test_step import attention_of, no_waits

LAYERS = 2
"""One with a window, and one without."""
SHAPE = CONFIGS["gemma-2-27b"] | {"num_hidden_layers": LAYERS, "vocab_size": 32000}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"model": {"compile": "off"}},
    "compiled": {
        "model": {"compile": "auto"},
        "method": {"kind": "prefix"},
        "train": {"activation_checkpointing": True},
    },
}
KERNELS = {"plain": 215 * LAYERS + 200, "compiled": 75 * LAYERS + 200}
"""Budgets of a step, what is beside the layers included."""


@pytest.mark.parametrize("name", SETTINGS)
def test_rows_of_all_lengths_are_one_call_of_one_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    from torch._dynamo.utils import counters

    caplog.set_level("WARNING")  # what a compiler writes to debug itself takes longer than it
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    torch._dynamo.reset()
    counters.clear()
    train = {"steps": 4, "global_batch_size": 4 * RANKS, "micro_batch_size": 4}
    trainer = of_shape(
        tmp_path,
        monkeypatch,
        SHAPE,
        np.random.default_rng(0).integers(50, 601, 6 * 4 * RANKS).tolist(),
        quantization="nf4",
        parallel={"strategy": "fsdp"},
        **SETTINGS[name] | {"train": train | SETTINGS[name].get("train", {})},
    )
    assert attention_of(trainer.setup) == VARLEN_ATTENTION
    made = counters["stats"]["unique_graphs"]
    for index, step in enumerate(steps(trainer)):
        if index == 0:
            step()
            continue
        with no_waits(), counting() as counted:
            step()
        print(f"{name}, {LAYERS} layers: {counted.kernels} kernels, {counted.products} products")
        assert counted.waits <= 1, "for the step before"
        assert counted.kernels <= KERNELS[name], counted.kernels
        again = 2 if name == "compiled" else 1
        assert counted.kernels_named("flex_attention_backward") == 2 * LAYERS
        assert counted.kernels_named("triton_tem_fused") == (again + 1) * LAYERS
    assert counters["stats"]["unique_graphs"] == made, "in the proof"
    assert not counters["graph_break"]
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


COMPILED = """
import os, sys, torch
from peft_dist.model import capped

device = torch.device("cuda", 0)
for size, learned in ((64, 0), (128, 20), (256, 20)):
    shapes = [(1, heads, 700, size) for heads in (8, 4, 4)]
    made = [torch.empty(shape, device=device, dtype=torch.bfloat16) for shape in shapes]
    past = torch.empty(2, 4, learned, size, device=device, requires_grad=True)
    positions = torch.arange(700, device=device)
    blocks = capped.row_blocks(positions, window=64, learned=learned, softcap=50.0)
    out = capped.attend_rows(
        *(part.requires_grad_() for part in made),
        blocks=blocks, past=past if learned else None, scaling=None,
    )
    assert out is not None and out.shape == (1, 700, 8, size)
    out.sum().backward()
    assert all(part.grad is not None for part in made)
    assert (past.grad is not None) == bool(learned)
sys.stdout.flush()
os._exit(0)
"""


@pytest.mark.parametrize("card", ["A100", "L4", "H100"])
def test_it_compiles_for_every_card_and_spills_nothing(tmp_path: Path, card: str) -> None:
    """Also for heads of 256: torch refuses what needs more shared memory than a card has."""
    import triton

    folders = dict.fromkeys(("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"), str(tmp_path))
    done = run(COMPILED, FAKE_CUDA_CARD=card, **folders)
    assert done.returncode == 0, done.stderr
    tool, found = triton.knobs.nvidia.cuobjdump.path, []
    for cubin in tmp_path.rglob("triton_tem*.cubin"):
        listed = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True).stdout
        use = re.search(r"REG:(\d+) STACK:(\d+)", listed)
        assert use is not None, listed
        found.append((cubin.stem, int(use[1]), int(use[2])))
    assert len(found) == 6, "forward and backward"
    for kernel, registers, spilled in sorted(found):
        print(f"{card}: {kernel}: {registers} registers, {spilled} bytes spilled")
        assert spilled == 0, kernel


def test_without_a_compiler_rows_are_computed_one_by_one_and_it_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_compiler(*_: Any) -> Any:
        raise RuntimeError("Failed to find C compiler")

    caplog.set_level("WARNING")
    torch._dynamo.reset()
    capped._compiled.cache_clear()
    compiler = torch.compile
    with monkeypatch.context() as patch:
        patch.setattr(
            torch, "compile", lambda *of, **how: compiler(*of, **how, backend=no_compiler)
        )
        rank = prepare(tmp_path, patch, "gemma2", model={"compile": "off"})
    capped._compiled.cache_clear()
    assert attention_of(rank.setup) == ROW_ATTENTION
    (said,) = [one.getMessage() for one in caplog.records if one.name == "peft_dist.model.capped"]
    assert "row by row" in said and "Failed to find C compiler" in said
