"""The packed base on disk: read instead of quantized, checked to the last byte, no obstacle."""

import hashlib
import json
import logging
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from peft_dist.distributed import process_group
from peft_dist.distributed.world import World, read_world
from peft_dist.entrypoints import quantize
from peft_dist.model.cache import MANIFEST
from peft_dist.model.source import find_base
from peft_dist.model_setup import ModelSetup, set_up_model
from tests.tiny import tiny_model, tiny_recipe

Opened = Callable[[], ModelSetup]


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what was logged as a warning or worse."""
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.fixture
def opened(tmp_path: Path, alone: World) -> Opened:
    """Return a function that starts a model setup with a tiny model and the cache beside it."""
    tiny_model(tmp_path / "model", "llama")
    recipe = tiny_recipe(tmp_path / "model", tmp_path / "rows.jsonl")
    return lambda: set_up_model(recipe, alone, find_base(recipe, tmp_path / "cache"))


def contents(entry: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in entry.iterdir()}


def entry_of(setup: ModelSetup) -> Path:
    assert setup.packed_base is not None
    return setup.packed_base


def test_the_second_start_reads_the_packed_form_alone(opened: Opened, tmp_path: Path) -> None:
    first = opened()
    # With the same size and times the model still counts as the same, but its weights are gone.
    weights = tmp_path / "model" / "model.safetensors"
    before = weights.stat()
    with weights.open("r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        file.seek(8 + length)
        file.write(bytes(before.st_size - 8 - length))
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    second = opened()
    assert second.base_fingerprint == first.base_fingerprint
    assert second.packed_base == first.packed_base


def test_other_weights_are_another_entry(opened: Opened, tmp_path: Path) -> None:
    first = entry_of(opened())
    weights = tmp_path / "model" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-2] ^= 1
    weights.write_bytes(data)
    assert entry_of(opened()) != first
    assert first.is_dir()


def rows_offset(file: Path, key: str) -> int:
    """Return the place in a safetensors file of the middle of a tensor."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        start, stop = json.loads(stream.read(length))[key]["data_offsets"]
    return int(8 + length + (start + stop) // 2)


PROJECTION = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    "place",
    [
        PROJECTION,
        f"{PROJECTION}.absmax",
        f"{PROJECTION}.quant_map",
        f"{PROJECTION}.quant_state.bitsandbytes__nf4",
        "model.norm.weight",
        "header",
        "config.json",
        MANIFEST,
    ],
)
def test_a_flipped_byte_is_found_and_the_entry_made_anew(
    opened: Opened, caplog: pytest.LogCaptureFixture, place: str
) -> None:
    first = opened()
    entry = entry_of(first)
    whole = contents(entry)
    file = entry / (place if place in whole else "model.safetensors")
    at = {"header": 40}.get(place)
    if at is None:
        at = len(whole[file.name]) // 2 if place in whole else rows_offset(file, place)
    damaged = bytearray(whole[file.name])
    damaged[at] ^= 0x10
    file.write_bytes(damaged)
    with caplog.at_level(logging.WARNING):
        second = opened()
    assert "damaged" in caplog.text
    assert "made anew" in caplog.text
    assert second.base_fingerprint == first.base_fingerprint
    assert contents(entry_of(second)) == whole
    caplog.clear()
    opened()
    assert warnings_in(caplog) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", MANIFEST])
@pytest.mark.parametrize("kept", [None, 0, 100])
def test_a_missing_or_truncated_file_is_made_anew(
    opened: Opened, name: str, kept: int | None
) -> None:
    first = opened()
    entry = entry_of(first)
    whole = contents(entry)
    (entry / name).unlink()
    if kept is not None:
        (entry / name).write_bytes(whole[name][:kept])
    assert opened().base_fingerprint == first.base_fingerprint
    assert contents(entry) == whole


def test_the_packed_form_of_another_model_is_not_used_under_this_ones_name(
    opened: Opened, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    right = opened()
    entry, whole = entry_of(right), contents(entry_of(right))
    weights = tmp_path / "model" / "model.safetensors"
    data = weights.read_bytes()
    changed = bytearray(data)
    changed[-2] ^= 1
    weights.write_bytes(changed)
    other = entry_of(opened())
    weights.write_bytes(data)
    shutil.rmtree(entry)
    shutil.copytree(other, entry)
    with caplog.at_level(logging.WARNING):
        again = opened()
    assert "made anew" in caplog.text
    assert again.base_fingerprint == right.base_fingerprint
    assert contents(entry) == whole


def test_a_packed_form_names_the_files_that_it_was_made_of(opened: Opened, tmp_path: Path) -> None:
    manifest = json.loads((entry_of(opened()) / MANIFEST).read_text(encoding="utf-8"))
    assert manifest["source"] == {
        name: hashlib.sha256((tmp_path / "model" / name).read_bytes()).hexdigest()
        for name in ("config.json", "model.safetensors")
    }


def test_nothing_is_left_beside_the_entry(opened: Opened) -> None:
    entry = entry_of(opened())
    assert list(entry.parent.iterdir()) == [entry]
    assert {file.name for file in entry.iterdir()} == {"model.safetensors", "config.json", MANIFEST}


def test_an_unwritable_cache_only_warns(
    opened: Opened, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = opened().base_fingerprint
    (tmp_path / "cache").rename(tmp_path / "elsewhere")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "packed").write_text("no folder", encoding="utf-8")
    (tmp_path / "cache" / "sha256").write_text("no folder", encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        setup = opened()
    assert setup.packed_base is None
    assert setup.base_fingerprint == expected
    (warning,) = warnings_in(caplog)
    assert warning.startswith("the packed base is not cached: ")


def test_a_base_quantized_ahead_is_the_entry_that_training_reads(
    opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PEFT_DIST_CACHE", str(tmp_path / "ahead"))
    assert quantize.main([str(tmp_path / "model")]) == 0
    (entry,) = (tmp_path / "ahead" / "packed").iterdir()
    process_group.start(read_world())
    trained = entry_of(opened())
    assert entry.name == trained.name
    assert contents(entry) == contents(trained)


def test_a_reward_model_and_a_language_model_share_a_cache(
    opened: Opened, tmp_path: Path, alone: World, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """One has a head that the other has not, so that neither can read what the other has packed."""
    monkeypatch.setenv("PEFT_DIST_CACHE", str(tmp_path / "cache"))
    assert quantize.main([str(tmp_path / "model"), "--task", "reward"]) == 0
    (ahead,) = (tmp_path / "cache" / "packed").iterdir()
    process_group.start(read_world())
    recipe = tiny_recipe(tmp_path / "model", tmp_path / "rows.jsonl", objective={"kind": "reward"})
    before = ahead.stat().st_ino
    language, reward = (
        entry_of(opened()),
        entry_of(set_up_model(recipe, alone, find_base(recipe, tmp_path / "cache"))),
    )
    assert reward == ahead != language
    assert ahead.stat().st_ino == before, "made anew"
    assert not any("made anew" in line for line in warnings_in(caplog))
