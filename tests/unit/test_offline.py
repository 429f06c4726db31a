"""Nodes without a network: what they could not fetch is refused, and `fetch` brings it."""

import json
from pathlib import Path

import pytest
from huggingface_hub import constants

from peft_dist.cli.main import main
from peft_dist.data.fetched import hub_cache, missing_of_dataset, missing_of_model, note_dataset
from peft_dist.entrypoints import fetch
from tests.processes import ROOT
from tests.tiny import completion_rows, tiny_model, write_jsonl
from tests.unit.slurm_desk import Capture, Desk, told


def download(home: Path, name: str, *files: str, revision: str = "main") -> Path:
    """Lay a model into a cache as huggingface_hub does; return its snapshot."""
    folder = home / "hub" / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / revision).write_text("abc", encoding="utf-8")
    snapshot = folder / "snapshots" / "abc"
    snapshot.mkdir(parents=True, exist_ok=True)
    for file in files:
        (snapshot / file).write_text("{}", encoding="utf-8")
    return snapshot


def test_a_model_is_whole_where_every_file_of_its_index_is_there(tmp_path: Path) -> None:
    own = {"HF_HOME": str(tmp_path)}
    assert missing_of_model("a/b", None, own) == f"is not in {tmp_path / 'hub'}"
    snapshot = download(tmp_path, "a/b", "config.json", "tokenizer.json", "1.safetensors")
    assert missing_of_model("a/b", None, own) == ""
    assert missing_of_model("a/b", "abc", own) == ""
    assert missing_of_model("a/b", "v2", own) == f"is not in {tmp_path / 'hub'}"
    index = {"weight_map": {str(n): f"{n}.safetensors" for n in range(1, 7)}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (snapshot / "tokenizer.json").unlink()
    assert missing_of_model("a/b", None, own) == (
        "lacks 2.safetensors, 3.safetensors, 4.safetensors and 3 more in " + str(snapshot)
    )


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"HF_HUB_CACHE": "/h"}, "/h"),
        ({"HF_HOME": "/a"}, "/a/hub"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/huggingface/hub"),
    ],
)
def test_the_cache_is_where_huggingface_hub_has_it(variables: dict[str, str], folder: str) -> None:
    assert hub_cache(variables) == Path(folder)


def test_a_dataset_is_whole_until_a_file_of_it_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PEFT_DIST_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "data.arrow"
    file.touch()
    note_dataset("a/b", "train", [file])
    own = {"PEFT_DIST_CACHE": str(tmp_path / "cache")}
    assert missing_of_dataset("a/b", "train", own) == ""
    assert missing_of_dataset("a/b", "test", own) == "has not been fetched for split 'test'"
    assert "not been fetched" in missing_of_dataset("a/b", "train", {"PEFT_DIST_CACHE": "/none"})
    file.unlink()
    assert missing_of_dataset("a/b", "train", own) == f"was fetched, and has lost {file} since"


def test_what_a_node_could_not_fetch_is_not_submitted(desk: Desk, capsys: Capture) -> None:
    home, cache = desk.folder / "home", desk.folder / "cache"
    environment = {"HF_HOME": str(home), "PEFT_DIST_CACHE": str(cache)}
    desk.cluster({"offline": True, "environment": environment})
    assert desk.submit() == 0  # all of it is in folders
    assert "export HF_HUB_OFFLINE=1\n" in (desk.run / "node.sh").read_text()
    words = ["model.name=a/b", "data.train=c/d", "--run-dir", "runs/hub"]
    remedy = f"`peft-dist fetch {desk.recipe} --cluster FILE` on a login node"
    capsys.readouterr()
    assert desk.submit(*words) == 2
    assert told(capsys) == (
        f"model.name: a/b is not in {home / 'hub'}, and nodes reach no network; {remedy}"
    )
    download(home, "a/b", "config.json", "tokenizer.json", "1.safetensors")
    assert desk.submit(*words) == 2
    assert told(capsys) == (
        "data: c/d has not been fetched for split 'train', and nodes reach no network; " + remedy
    )
    start = ["method.start_from=org/sft", "--run-dir", "runs/start"]
    assert desk.submit(*start) == 2
    assert told(capsys) == (
        f"method.start_from: org/sft is not in {home / 'hub'}, and nodes reach no network; {remedy}"
    )
    download(home, "org/sft", "adapter_config.json")
    assert desk.submit(*start) == 2
    assert "org/sft lacks adapter_model.safetensors in" in told(capsys)
    download(home, "org/sft", "adapter_model.safetensors")
    assert desk.submit(*start) == 0
    assert not (desk.folder / "runs" / "hub").exists()
    assert main(["submit", "quantize", "e/f", "--cluster", "cluster.yaml"]) == 2
    assert "e/f is not in" in told(capsys)


def test_an_image_of_a_registry_is_refused(desk: Desk, capsys: Capture) -> None:
    image = {"runtime": "apptainer", "image": "docker://pytorch/pytorch:2"}
    desk.cluster({"offline": True, "container": image})
    assert desk.submit() == 2
    assert told(capsys).startswith("container.image: docker://pytorch/pytorch:2 is pulled from")


def test_a_recipe_is_fetched(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model(tmp_path / "model", "llama")
    write_jsonl(tmp_path / "rows.jsonl", completion_rows(3))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: {name: model}\ndata: {train: rows.jsonl}\n", encoding="utf-8")
    snapshot = download(tmp_path, "org/sft", "adapter_config.json", "adapter_model.safetensors")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    capsys.readouterr()
    assert fetch.main([str(recipe), "method.start_from=org/sft"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"model {tmp_path / 'model'}: 0.0 GB in {tmp_path / 'model'}",
                     f"adapter org/sft: in {snapshot}", "tokenizer: loads"]  # fmt: skip


@pytest.mark.slow
def test_fetching_goes_into_the_caches_of_the_cluster_file(
    desk: Desk, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    home = desk.folder / "home"
    desk.cluster({"environment": {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}})
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # no test asks a hub
    words = ["fetch", str(desk.recipe), "model.name=a/b", "--cluster", "cluster.yaml"]
    assert main(words) == 2
    assert "'a/b' is neither a folder here nor a hub model" in capfd.readouterr().err
