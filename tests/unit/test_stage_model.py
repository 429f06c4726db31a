"""A model's copy on a node's own disk: whole or not used, made once, and never in the way."""

import ctypes
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from peft_dist.common import env, paths
from peft_dist.common.errors import ClusterError
from peft_dist.config.cluster import check_cluster
from peft_dist.slurm.stage_model import (
    MANIFEST,
    CannotStage,
    expand,
    find_damage,
    main,
    remove_unused,
    stage,
)
from tests.processes import wait_until

BIG = 48 << 20
"""Bytes of a weight file that takes a moment to copy."""
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Return a folder with a model's files, and some that training does not read."""
    folder = tmp_path / "shared" / "tiny model [1]"
    folder.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "merges.txt", "chat_template.jinja"):
        folder.joinpath(name).write_text(f"{{}} of {name}", encoding="utf-8")
    folder.joinpath("model.safetensors").write_bytes(os.urandom(100_000))
    folder.joinpath("consolidated.safetensors").write_bytes(bytes(10))
    folder.joinpath("pytorch_model.bin").write_bytes(bytes(10))
    folder.joinpath("checkpoint-1").mkdir()
    return folder


@pytest.fixture
def local(tmp_path: Path) -> Path:
    """Return the folder for copies, which is not there yet."""
    return tmp_path / "local" / "scratch" / str(os.getuid())


def command(model: Path, local: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "peft_dist.slurm.stage_model",
            str(model),
            str(local.parent),
            *options,
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def copies(local: Path) -> list[Path]:
    return [path for path in local.iterdir() if path.is_dir()]


def test_what_training_reads_is_copied_and_nothing_else(model: Path, local: Path) -> None:
    copy = stage(model, local)
    assert copy.parent == local
    assert copy.name.startswith("tiny model [1]-")
    found = contents(copy)
    manifest = json.loads(found.pop(MANIFEST))
    unread = {"consolidated.safetensors", "pytorch_model.bin"}
    assert found == {name: text for name, text in contents(model).items() if name not in unread}
    assert sorted(manifest["files"]) == sorted(found)
    assert copies(local) == [copy]


def test_only_its_owner_can_read_a_copy(model: Path, local: Path) -> None:
    done = command(model, local)
    path = Path(done.communicate()[0].strip())
    assert all(entry.stat().st_mode & 0o077 == 0 for entry in (local, path, *path.iterdir()))


def test_the_first_user_of_a_node_leaves_room_for_the_next(model: Path, local: Path) -> None:
    assert command(model, local).wait() == 0
    assert stat.S_IMODE(local.parent.stat().st_mode) == 0o1777
    assert stat.S_IMODE(local.stat().st_mode) == 0o700


def test_a_folder_is_named_by_the_nodes_own_variables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_TMPDIR", str(tmp_path))
    monkeypatch.setenv("USER", "alice")
    monkeypatch.delenv("LOCAL_SCRATCH", raising=False)
    assert expand("$SLURM_TMPDIR/a") == tmp_path / "a"
    assert expand("/local/$USER/$USERS") == Path("/local/alice/$USERS")
    with pytest.raises(CannotStage, match="LOCAL_SCRATCH is not set on this node"):
        expand("$LOCAL_SCRATCH")


@pytest.mark.parametrize("folder", ["$HOME/a", "/a/$(id)", "$TMPDIRS/a", "/a/${USER}", "/a$USER_b"])
def test_no_other_variable_is_expanded(folder: str) -> None:
    with pytest.raises(ClusterError, match="stage.folder"):
        check_cluster({"stage": {"folder": folder}}, where="cluster.yaml")
    assert check_cluster({"stage": {"folder": "$TMPDIR/$USER"}}, where="cluster.yaml").stage


def test_a_copy_that_no_job_has_used_for_long_is_removed(model: Path, local: Path) -> None:
    old = stage(model, local)
    (model / "config.json").write_text("{} ", encoding="utf-8")
    new = stage(model, local)
    lock = local / f".{old.name}.lock"
    remove_unused(local, keep=new)
    assert sorted(copies(local)) == sorted([old, new])
    os.utime(lock, (0, 0))
    os.utime(local / f".{new.name}.lock", (0, 0))
    remove_unused(local, keep=new)
    assert copies(local) == [new]
    assert not lock.exists()


def test_a_copy_is_made_once_and_again_after_the_model_has_changed(
    model: Path, local: Path
) -> None:
    first = stage(model, local)
    made_ns = first.stat().st_mtime_ns
    assert stage(model, local) == first
    assert first.stat().st_mtime_ns == made_ns
    model.joinpath("config.json").write_text("{} changed", encoding="utf-8")
    second = stage(model, local)
    assert second != first
    assert second.joinpath("config.json").read_text(encoding="utf-8") == "{} changed"


def test_weights_in_several_files_are_those_the_index_names(model: Path, local: Path) -> None:
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for name in names:
        model.joinpath(name).write_bytes(os.urandom(1000))
    index = {"weight_map": {"a": names[0], "b": names[1], "c": names[0]}}
    model.joinpath("model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    weights = [path.name for path in stage(model, local).glob("*.safetensors")]
    assert sorted(weights) == names


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_copy_that_was_killed_is_not_used_and_not_left(
    model: Path, local: Path, number: int
) -> None:
    model.joinpath("model.safetensors").write_bytes(os.urandom(1 << 20) * (BIG >> 20))
    process = command(model, local)
    wait_until(lambda: bool(list(local.glob(".*partial-*/model.safetensors"))), "a partial copy")
    process.send_signal(number)
    told, _ = process.communicate()
    assert (process.returncode, told) == (-number, "")
    (partial,) = copies(local)
    copy = stage(model, local)
    assert copies(local) == [copy]
    assert not partial.exists()
    assert find_damage(copy, set(contents(copy)) - {MANIFEST}, verify=True) is None


def test_of_two_at_once_one_copies_and_both_use_it(model: Path, local: Path) -> None:
    model.joinpath("model.safetensors").write_bytes(os.urandom(1 << 20) * (BIG >> 20))
    processes = [command(model, local) for _ in range(3)]
    told = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert {out.strip() for out, _ in told} == {str(path) for path in copies(local)}
    assert sum("copied to" in errors for _, errors in told) == 1
    assert len(copies(local)) == 1


@pytest.mark.parametrize("verify", [False, True])
def test_a_damaged_copy_is_found_and_made_again(
    model: Path, local: Path, verify: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    copy = stage(model, local)
    weights = copy / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]) if verify else whole[:-1])
    assert main([str(model), str(local.parent), *(["--verify"] if verify else [])]) == 0
    out, errors = capfd.readouterr()
    assert out == f"{copy}\n"
    assert f"model.safetensors has {'other bytes' if verify else 'another size'}" in errors
    assert weights.read_bytes() == whole
    assert copies(local) == [copy]


@pytest.mark.parametrize("damage", ["manifest", "file", "text"])
def test_a_copy_that_is_not_whole_is_made_again(model: Path, local: Path, damage: str) -> None:
    copy = stage(model, local)
    if damage == "text":
        copy.joinpath(MANIFEST).write_text("[1]", encoding="utf-8")
    else:
        copy.joinpath({"manifest": MANIFEST, "file": "tokenizer.json"}[damage]).unlink()
    assert stage(model, local) == copy
    assert find_damage(copy, set(contents(copy)) - {MANIFEST}, verify=True) is None


@pytest.mark.parametrize("spare", [1 << 28, -1 << 40])
def test_without_space_the_model_is_read_where_it_lies(
    model: Path,
    local: Path,
    spare: int,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("peft_dist.slurm.stage_model.SPARE_BYTES", spare)
    local.mkdir(parents=True)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", os.fsencode(local), b"tmpfs", 0, b"size=64k"):
        pytest.skip(f"cannot mount a small disk: {os.strerror(ctypes.get_errno())}")
    try:
        assert main([str(model), str(local.parent)]) == 0
        out, errors = capfd.readouterr()
        assert out == f"{model}\n"
        (line,) = errors.splitlines()
        assert line.startswith("peft-dist: warning: the model is not copied to this node: ")
        assert (" GB free in " if spare > 0 else "No space left on device") in line
        assert copies(local) == []
    finally:
        assert libc.umount(os.fsencode(local)) == 0


def test_whatever_else_is_wrong_the_model_is_read_where_it_lies(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.touch()
    index = model / "model.safetensors.index.json"
    for source, folder in ((model, file), (model, file / "below"), (tmp_path / "no", tmp_path)):
        assert main([str(source), str(folder)]) == 0
        out, errors = capfd.readouterr()
        assert out == f"{source}\n"
        assert len(errors.splitlines()) == 1, errors
    for text in ("", "[]", '{"weight_map": {"a": "../x.safetensors"}}'):
        index.write_text(text, encoding="utf-8")
        assert main([str(model), str(tmp_path / "local")]) == 0
        assert capfd.readouterr().out == f"{model}\n"


def test_a_link_in_place_of_a_copy_is_not_followed(
    model: Path, local: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    copy = stage(model, local)
    copy.rename(tmp_path / "planted")
    copy.symlink_to(tmp_path / "planted")
    assert main([str(model), str(local.parent)]) == 0
    out, errors = capfd.readouterr()
    assert out == f"{model}\n"
    assert "is somebody else's" in errors


def test_ranks_find_the_copy_by_the_name_in_the_recipe(
    model: Path, local: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    name = str(model)
    assert paths.staged(name) is None
    assert main([name, str(local.parent), "--json"]) == 0
    monkeypatch.setenv(env.STAGED, capfd.readouterr().out)
    (copy,) = copies(local)
    assert paths.staged(name) == copy
    assert paths.staged("another/model") is None
    copy.rename(local / "gone")
    assert paths.staged(name) is None
    for text in ("", "no JSON", "[]", f'{{"{name}": 3}}'):
        monkeypatch.setenv(env.STAGED, text)
        assert paths.staged(name) is None


def test_weights_and_tokenizer_are_read_from_the_copy(
    tmp_path: Path, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    from peft_dist.data.encode import load_tokenizer
    from peft_dist.model.source import find_base
    from tests.tiny import tiny_model, tiny_recipe

    model = tmp_path / "model"
    tiny_model(model, "llama", max_shard_size="60KB")
    recipe = tiny_recipe(model, tmp_path / "rows.jsonl")
    tokens = load_tokenizer(recipe)("the cat").input_ids
    files = find_base(recipe, tmp_path / "cache").files
    copy = stage(model, local)
    for path in model.iterdir():
        path.unlink()
    monkeypatch.setenv(env.STAGED, json.dumps({recipe.model.name: str(copy)}))
    assert load_tokenizer(recipe)("the cat").input_ids == tokens
    staged = find_base(recipe, tmp_path / "cache").files
    assert staged.folder == copy
    assert staged.tensors.keys() == files.tensors.keys()


def test_no_torch_is_imported() -> None:
    code = "import peft_dist.slurm.stage_model, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
