"""Rows of what transformers makes of file tensors are rows of the whole."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from peft_dist.model import stored
from peft_dist.model.stored import RowTensor, Stored, find_sources
from peft_dist.model.weights import WeightFiles
from tests.tiny import tiny_model


@pytest.fixture
def files(tmp_path: Path) -> WeightFiles:
    torch.manual_seed(0)
    tensors = {name: torch.randn(4, 6) for name in "abc"}
    save_file(tensors, tmp_path / "model.safetensors")
    return WeightFiles(tmp_path)


def made(files: WeightFiles) -> dict[str, tuple[RowTensor, torch.Tensor]]:
    """Return every kind of source beside the tensor it stands for."""
    parts = [Stored(files, name) for name in "abc"]
    a, b, c = (files.full_tensor(name) for name in "abc")
    stack = stored._stacked(parts)
    return {
        "stored": (parts[0], a),
        "stacked": (stack, torch.stack([a, b, c])),
        "joined": (stored._joined(parts, 0), torch.cat([a, b, c])),
        "joined beside": (stored._joined(parts, 1), torch.cat([a, b, c], dim=1)),
        "a piece": (stored._piece(parts[0], 0, 1, 2), a[1:3]),
        "a piece of each row": (stored._piece(parts[0], 1, 2, 3), a[:, 2:5]),
        "transposed": (stored.turned(parts[0]), a.t()),
        "transposed inside": (
            stored.Turned((stack,), (3, 6, 4), (1, 2)),
            torch.stack([a, b, c]).transpose(1, 2),
        ),
        "of a joined one": (
            stored._piece(stored._joined(parts, 0), 0, 3, 6),
            torch.cat([a, b, c])[3:9],
        ),
        "run whole": (stored.Whole((parts[0],), (4, 6), lambda: a.flip(0)), a.flip(0)),
    }


def test_rows_are_those_of_the_whole_wherever_they_are_cut(files: WeightFiles) -> None:
    for kind, (source, whole) in made(files).items():
        assert source.shape == tuple(whole.shape), kind
        for start in range(len(whole) + 1):
            for stop in range(start, len(whole) + 1):
                rows = source.rows(start, stop)
                assert torch.equal(rows, whole[start:stop]), (kind, start, stop)


def test_only_the_tensors_that_rows_come_from_are_read(
    files: WeightFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    rows = WeightFiles.rows

    def noted(self: WeightFiles, key: str, start: int, stop: int, **more: bool) -> torch.Tensor:
        if stop > start:
            read.append(key)
        return rows(self, key, start, stop, **more)

    monkeypatch.setattr(WeightFiles, "rows", noted)
    made(files)["stacked"][0].rows(1, 2)
    made(files)["joined"][0].rows(9, 11)
    assert read == ["b", "c"]


def test_a_tensor_that_nothing_uses_is_named(tmp_path: Path) -> None:
    model = tiny_model(tmp_path, "llama")
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
    save_file(tensors, tmp_path / "model.safetensors")
    found = find_sources(model, WeightFiles(tmp_path))
    assert found.unused == ("model.layers.0.self_attn.q_proj.bias",)
