"""The seal of a checkpoint: whatever happens to its bytes or names is found."""

import hashlib
import json
import os
import random
import shutil
import stat
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from peft_dist.checkpoint.directory import folders, newest_good
from peft_dist.common.manifest import BadCheckpoint, seal, step_name, verify
from tests.faults.mutations import KINDS, mutate

MUTATIONS = int(os.environ.get("PEFT_DIST_MUTATIONS", "200"))


def checkpoint(parent: Path, step: int, **facts: Any) -> Path:
    folder = parent / step_name(step)
    (folder / "adapter").mkdir(parents=True)
    rng = random.Random(step)
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(rng.randbytes(300))
    (folder / "adapter" / "adapter_config.json").write_text('{"r": 8}')
    (folder / "optimizer.safetensors").write_bytes(rng.randbytes(600))
    (folder / "state.json").write_text(json.dumps({"step": step}))
    (folder / "empty").touch()
    seal(folder, {"step": step, **facts})
    return folder


def contents(folder: Path) -> dict[str, bytes | str | None]:
    """Return everything below a folder: a file's bytes, a link's target, None for a folder."""
    if folder.is_symlink():
        return {"": str(folder.readlink())}
    return {
        str(path.relative_to(folder)): str(path.readlink())
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else None
        for path in folder.rglob("*")
    }


def why_bad(folder: Path) -> str:
    with pytest.raises(BadCheckpoint) as caught:
        verify(folder)
    return str(caught.value)


def rewrite(folder: Path, **changed: Any) -> None:
    """Write a manifest with other content, but canonical and with the right sha256."""
    file = folder / "manifest.json"
    content = {**json.loads(file.read_text()), **changed}
    del content["sha256"]

    def dumps(value: object) -> bytes:
        return json.dumps(value, sort_keys=True, separators=(",", ":")).encode() + b"\n"

    sha256 = hashlib.sha256(dumps(content)).hexdigest()
    file.write_bytes(dumps({**content, "sha256": sha256}))


def test_a_sealed_folder_verifies_and_gives_its_facts_back(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 40, attempt=3, loss=0.1)
    assert verify(folder) == {"step": 40, "attempt": 3, "loss": 0.1}


def test_seal_returns_the_bytes_on_disk_and_leaves_private_files(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 40)
    shutil.copytree(folder, tmp_path / "again")
    (tmp_path / "again" / "manifest.json").unlink()
    (tmp_path / "again" / "state.json").chmod(0o644)
    size = seal(tmp_path / "again", {"step": 40})
    files = [path for path in (tmp_path / "again").rglob("*") if path.is_file()]
    assert size == sum(path.stat().st_size for path in files)
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    assert contents(tmp_path / "again") == contents(folder)


def test_a_manifest_lists_size_and_sha256_of_every_file(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 40)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["format"] == 1
    assert manifest["files"] == {
        name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in contents(folder).items()
        if isinstance(data, bytes) and name != "manifest.json"
    }


def test_a_second_seal_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError):
        seal(checkpoint(tmp_path, 40), {"step": 40})


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 40)
    config = folder / "adapter" / "adapter_config.json"
    data = config.read_bytes()

    config.write_bytes(data + b" ")
    assert why_bad(folder) == "adapter/adapter_config.json has 9 bytes, not 8"
    config.write_bytes(data[::-1])
    assert why_bad(folder) == "adapter/adapter_config.json has another sha256"
    config.unlink()
    assert why_bad(folder) == "adapter/adapter_config.json is missing"
    os.mkfifo(config)
    assert why_bad(folder) == "adapter/adapter_config.json is a link or a special file"
    config.unlink()
    (tmp_path / "same").write_bytes(data)
    config.symlink_to(tmp_path / "same")
    assert why_bad(folder) == "adapter/adapter_config.json is a link or a special file"
    config.unlink()
    config.write_bytes(data)
    (folder / "adapter" / "more").mkdir()
    assert why_bad(folder) == "adapter/more/ is not listed"
    (folder / "adapter" / "more").rmdir()
    other = folder.rename(tmp_path / "step-00000041")
    assert why_bad(other) == "manifest.json belongs to step 40"
    other.rename(folder)
    assert verify(folder) == {"step": 40}  # nothing else was wrong
    (folder / "manifest.json").unlink()
    assert why_bad(folder) == "manifest.json is missing"
    assert why_bad(tmp_path / "step-00000050") == "is no folder"


def test_a_file_that_cannot_be_read_is_bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint(tmp_path, 40)
    real = os.open

    def vanishing(path: Any, *rest: Any, **named: Any) -> int:
        if Path(path).name == "state.json":
            Path(path).unlink()
        return real(path, *rest, **named)

    monkeypatch.setattr(os, "open", vanishing)
    assert why_bad(folder) == "state.json cannot be read: No such file or directory"


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "is no JSON"),
        (b"\xff\xfe\x00", "is no JSON"),
        (b'{"format":NaN}\n', "is no JSON"),
        (b'{"format":' + b"9" * 5000 + b"}\n", "is no JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[]\n", "has no format or no sha256"),
        (b"{}\n", "has no format or no sha256"),
        (b'{"format":1}\n', "has no format or no sha256"),
        (b'{"format":2,"sha256":""}\n', "has the unknown format 2"),
        (b'{"format":1,"sha256":""}\n', "has another sha256 than it says"),
        (b'{"format":1,"format":1,"sha256":""}\n', "is not as it was written"),
        (b'{"format": 1}\n', "is not as it was written"),
    ],
)
def test_a_manifest_of_other_bytes_is_bad(tmp_path: Path, data: bytes, why: str) -> None:
    folder = checkpoint(tmp_path, 40)
    (folder / "manifest.json").write_bytes(data)
    assert why in why_bad(folder)


@pytest.mark.parametrize(
    "changed",
    [
        {"facts": {}},
        {"facts": []},
        {"facts": {"step": "40"}},
        {"files": []},
        {"files": {"state.json": 3}},
        {"files": {"state.json": {}}},
    ],
)
def test_a_manifest_of_another_shape_is_bad(tmp_path: Path, changed: dict[str, Any]) -> None:
    folder = checkpoint(tmp_path, 40)
    rewrite(folder, **changed)
    assert why_bad(folder) == "manifest.json lacks the step or the files"


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "adapter/../state.json", "./x", ""])
def test_a_listed_path_that_leads_elsewhere_is_bad(tmp_path: Path, name: str) -> None:
    folder = checkpoint(tmp_path, 40)
    (tmp_path / "outside").write_bytes(b"")
    files = json.loads((folder / "manifest.json").read_text())["files"]
    rewrite(folder, files={**files, name: files["empty"]})
    assert why_bad(folder).endswith(" is missing")


def test_every_byte_of_a_manifest_counts(tmp_path: Path) -> None:
    file = checkpoint(tmp_path, 40) / "manifest.json"
    data = file.read_bytes()
    for at in range(len(data)):
        file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        why_bad(file.parent)
    file.write_bytes(data)
    verify(file.parent)


@pytest.mark.slow
def test_every_mutation_is_found_and_the_untouched_older_checkpoint_chosen(tmp_path: Path) -> None:
    pristine = tmp_path / "pristine"
    whole = {f.name: contents(f) for f in (checkpoint(pristine, step) for step in (10, 20, 30))}
    kinds: Counter[str] = Counter()
    for seed in range(MUTATIONS):
        work = tmp_path / "work"
        shutil.copytree(pristine, work)
        what = mutate(work / "step-00000030", random.Random(seed))
        kinds[what.split(":")[0]] += 1
        present = folders(work)
        untouched = [folder for folder in present if contents(folder) == whole.get(folder.name)]
        assert 0 < len(untouched) < 3, what
        found, bad = newest_good(work)
        assert found == untouched[-1], what
        assert [folder for folder, _ in bad] == [f for f in present[::-1] if f > found], what
        for folder in set(present) - set(untouched):
            assert why_bad(folder), what
        shutil.rmtree(work)
    assert kinds.keys() == KINDS.keys()
