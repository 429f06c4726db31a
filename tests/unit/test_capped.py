"""Attention with capped scores in one call is that of rows one by one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import flex_attention

from peft_dist.distributed.world import World
from peft_dist.model import attention, capped, proof
from peft_dist.model.architectures import bare_model
from peft_dist.model.attention import ROW_ATTENTION, VARLEN_ATTENTION
from peft_dist.model.proof import ProofRun, Way
from peft_dist.model.source import find_base
from peft_dist.model_setup import set_up_model
from tests.tiny import tiny_model, tiny_recipe

HEADS, GROUPS, SIZE, CAP = 4, 2, 16, 2.0
BLOCKS = (130, 1, 127, 128, 64)
"""Rows that are as long as a block, and a bit more and less."""


@pytest.fixture(autouse=True)
def quiet_compiler(caplog: pytest.LogCaptureFixture) -> None:
    """Keep out what a compiler writes to debug itself, which takes longer than it."""
    caplog.set_level("WARNING")


@pytest.fixture
def with_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let flex attention run with gradients, which it refuses on a CPU: no kernel of it has any."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)


def blocks_of(lengths: tuple[int, ...], window: int | None, learned: int) -> capped.RowBlocks:
    positions = torch.cat([torch.arange(length) for length in lengths])
    return capped.row_blocks(positions, window=window, learned=learned, softcap=CAP)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("rows", "window", "learned"),
    [
        ((5,), None, 0),
        ((3, 9, 1, 20), 6, 3),
        (BLOCKS, 150, 0),
        (BLOCKS, None, 140),
        (BLOCKS, 150, 140),
    ],
)
def test_one_call_gives_the_values_and_gradients_of_rows(
    with_gradients: None,
    rows: tuple[int, ...],
    window: int | None,
    learned: int,
    dtype: torch.dtype,
) -> None:
    source = torch.Generator().manual_seed(0)

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=dtype, generator=source).requires_grad_()

    parts = [made(1, heads, sum(rows), SIZE) for heads in (HEADS, GROUPS, GROUPS)]
    past = made(2, GROUPS, learned, SIZE) if learned else None
    weights = made(1, sum(rows), HEADS, SIZE).detach()
    given = [*parts, past] if past is not None else parts
    found = []
    for blocks in (None, {window: blocks_of(rows, window, learned)}):
        out, _ = attention._row_attention(
            None,
            *parts,
            None,
            row_lengths=rows,
            row_blocks=blocks,
            one_call=blocks is not None,
            prefix=past,
            sliding_window=window,
            softcap=CAP,
        )
        found.append((out, *torch.autograd.grad((out * weights).sum(), given)))
    for ours, theirs in zip(*reversed(found), strict=True):
        assert float((ours - theirs).detach().norm() / theirs.detach().norm()) < 1e-6


@pytest.mark.parametrize("learned", [0, 3, 140])
@pytest.mark.parametrize("window", [None, 6, 150])
@pytest.mark.parametrize("rows", [(5,), BLOCKS, (700,), (1,) * 300])
def test_lists_name_the_blocks_that_are_seen(
    rows: tuple[int, ...], window: int | None, learned: int
) -> None:
    """Kernels skip what they do not name, and make no mask where all is seen; nothing else does."""
    blocks, total = blocks_of(rows, window, learned), sum(rows)
    front, count = -(-learned // capped.BLOCK) * capped.BLOCK, len(blocks.first) * capped.BLOCK
    sees = torch.zeros(count, front + count, dtype=torch.bool)
    begin = 0
    for length in (*rows, *[1] * (count - total)):
        for token in range(length):
            place = range(-learned, token + 1)[-(window or total + learned) :]
            for one in place:
                sees[begin + token, front + (begin + one if one >= 0 else one)] = True
        begin += length
    tiles = sees.unflatten(1, (-1, capped.BLOCK)).unflatten(0, (-1, capped.BLOCK)).transpose(1, 2)
    some, whole = tiles.any(dim=(2, 3)), tiles.all(dim=(2, 3))
    masked, full, masked_by_key, full_by_key = (
        named(*blocks.lists[at : at + 2]) for at in range(0, 8, 2)
    )
    assert torch.equal(full, whole)
    assert torch.equal(masked, some & ~whole)
    assert torch.equal(masked_by_key, masked.T)
    assert torch.equal(full_by_key, full.T)


def named(counts: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Return the table that lists name: which blocks [.., K] each of [Q, ..] has to do with."""
    assert counts.dtype == places.dtype == torch.int32
    table = torch.zeros(places.shape[2:], dtype=torch.bool)
    for row, (count, of_row) in enumerate(zip(counts[0, 0], places[0, 0], strict=True)):
        table[row, of_row[: int(count)].long()] = True
    return table


PACKED = [Way(VARLEN_ATTENTION, packing=True), Way(ROW_ATTENTION, packing=True)]


def proven(folder: Path, alone: World) -> tuple[Way, list[str]]:
    """Return the way that is proven for a model that caps its scores, and what is wrong before."""
    tiny_model(folder / "model", "gemma2")
    recipe = tiny_recipe(folder / "model", folder / "none.jsonl", quantization="none")
    found: list[tuple[Way, list[str]]] = []

    def prover(run: ProofRun, *_: Any) -> Way:
        found.append(proof.prove(run, PACKED))
        assert attention.has_own_code(bare_model(run.peft).config) == (found[0][0] == PACKED[0])
        return found[0][0]

    set_up_model(recipe, alone, find_base(recipe, folder / "cache"), prover=prover)
    return found[0]


def twice_the_gradient(*given: Any, **named: Any) -> torch.Tensor:
    out = capped._attend(*given, **named)
    return 2 * out - out.detach()


def no_code(*_: Any) -> None:
    """Be what `capped._compiled` gives without a compiler."""


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    ("code", "problem"),
    [
        (capped._attend, ""),
        (twice_the_gradient, "the gradient differs by"),
        (no_code, "its capped scores could not be compiled"),
    ],
)
def test_one_call_is_taken_where_its_gradient_is_that_of_rows(
    tmp_path: Path,
    alone: World,
    monkeypatch: pytest.MonkeyPatch,
    with_gradients: None,
    code: Callable[..., Any],
    problem: str,
) -> None:
    def attend_rows(*parts: torch.Tensor, **named: Any) -> torch.Tensor | None:
        return code(*parts, named["blocks"], named["past"], named["scaling"])

    monkeypatch.setattr(capped, "attend_rows", attend_rows)
    way, problems = proven(tmp_path, alone)
    assert way == PACKED[1 if problem else 0]
    assert len(problems) == bool(problem)
    assert not problem or problem in problems[0]
