"""A run's adapter merged into its base: the same logits from plain files, one tensor at a time."""

import json
import re
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GgufConfig,
    LlamaConfig,
    PreTrainedModel,
)

from peft_dist.checkpoint.adapter_file import load_adapter
from peft_dist.cli.main import main
from peft_dist.common.errors import PeftDistError
from peft_dist.config import load_recipe
from peft_dist.config.method import Lora
from peft_dist.config.recipe import Recipe
from peft_dist.distributed.world import World
from peft_dist.entrypoints import train
from peft_dist.entrypoints.merge import UNMERGEABLE, merge
from peft_dist.methods import METHODS
from peft_dist.model import architectures
from peft_dist.model.source import find_base
from peft_dist.model_setup import set_up_model
from peft_dist.run.directory import RunDir
from tests.processes import environment, run
from tests.tiny import completion_rows, save_adapter, tiny_model, tiny_recipe, write_jsonl

LABELS = ("animal", "place", "plant")
CLASSIFY = {"model": {"task": "sequence-classification"}}
BFLOAT16 = {"dtype": torch.bfloat16}


def trained_run(
    folder: Path,
    world: World,
    architecture: str,
    sections: dict[str, Any] | None = None,
    saved: dict[str, Any] | None = None,
    scale: float = 0.1,
) -> RunDir:
    """Make a base and a run on it whose adapter has random values; `saved` is the base's form."""
    classes = {"num_labels": len(LABELS)} if architecture == "bert" else {}
    tiny_model(folder / "base", architecture, **classes, **(saved or {}))
    recipe = tiny_recipe(folder / "base", folder / "rows.jsonl", **(sections or {}))
    source = find_base(recipe, folder / "cache")
    labels = LABELS if architecture == "bert" else ()
    setup = set_up_model(recipe, world, source, label_names=labels)
    torch.manual_seed(1)
    state = {
        name: value + scale * torch.randn_like(value)
        for name, value in setup.engine.adapter_state().items()
    }
    found = RunDir.create(folder / "run", recipe)
    save_adapter(found.adapter, setup.method, setup.peft, state)
    found.result.write_text(json.dumps({"labels": labels}), encoding="utf-8")
    return found


def logits(model: torch.nn.Module) -> torch.Tensor:
    torch.manual_seed(2)
    with torch.no_grad():
        found: torch.Tensor = model.eval()(torch.randint(3, 300, (3, 17))).logits
    return found.float()


def loaded(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load a merged model as a user of transformers would, without being told of classes."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    classify = "Classification" in config["architectures"][0]
    auto = AutoModelForSequenceClassification if classify else AutoModelForCausalLM
    model: PreTrainedModel
    model, told = auto.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["mismatched_keys"]
    return model


def with_peft(run_dir: RunDir, dtype: torch.dtype = torch.float32) -> PeftModel:
    """Load the base and the adapter."""
    base = run_dir.path.parent / "base"
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    classify = config["model_type"] == "bert"
    auto = AutoModelForSequenceClassification if classify else AutoModelForCausalLM
    classes = {"num_labels": len(LABELS)} if classify else {}
    return PeftModel.from_pretrained(
        auto.from_pretrained(base, dtype=dtype, **classes), run_dir.adapter
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "sections", "saved"),
    [
        ("llama", {}, {}),
        ("llama", {"quantization": "none"}, {"max_shard_size": "60KB"}),
        ("llama", {"method": {"rslora": True, "rank": 4}}, {}),
        ("llama", {"method": {"dora": True}}, {"max_shard_size": "60KB"}),
        ("llama", {"quantization": "none", "method": {"init": "pissa"}}, {}),
        ("llama", {"quantization": "none", "method": {"init": "olora"}}, {}),
        ("llama", {"method": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 4}}}, {}),
        ("llama", {"method": {"modules_to_save": ["embed_tokens", "lm_head", "norm"]}}, {}),
        ("llama", {"method": {"trainable_tokens": [5, 271]}}, {}),
        ("qwen2", {"method": {"modules_to_save": ["lm_head"]}}, {}),
        ("qwen2", {"method": {"trainable_tokens": [5, 271]}}, {"trunk_only": True}),
        ("gpt2", {}, {}),
        ("gpt2", {"method": {"dora": True}}, {}),
        ("gpt2", {"method": {"bias": "all"}}, {"trunk_only": True}),
        ("qwen2", {"method": {"bias": "all"}}, {}),
        ("qwen2", {"method": {"bias": "lora_only", "targets": ["q_proj"]}}, {}),
        ("bert", CLASSIFY, {}),
        ("bert", {**CLASSIFY, "method": {"bias": "all"}}, {"trunk_only": True}),
        ("bert", CLASSIFY, {"trunk_only": True, "max_shard_size": "100KB"}),
    ],
)
def test_a_merged_model_has_the_logits_of_base_and_adapter(
    tmp_path: Path,
    alone: World,
    architecture: str,
    sections: dict[str, Any],
    saved: dict[str, Any],
) -> None:
    found = trained_run(tmp_path, alone, architecture, sections, saved)
    merge(found, tmp_path / "merged")
    expected = logits(with_peft(found))
    merged = loaded(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)
    bare = logits(with_peft(found).unload())
    assert (bare - expected).abs().max() > 0.01, "the adapter does nothing, so nothing is shown"
    if architecture == "bert":
        assert tuple(merged.config.id2label.values()) == LABELS
    AutoTokenizer.from_pretrained(tmp_path / "merged")


@pytest.mark.parametrize("method", [{}, {"dora": True}, {"bias": "all"}])
def test_a_bfloat16_base_stays_one_and_is_rounded_once(
    tmp_path: Path, alone: World, method: dict[str, Any]
) -> None:
    found = trained_run(tmp_path, alone, "qwen2", {"method": method}, BFLOAT16)
    merge(found, tmp_path / "merged")
    theirs = with_peft(found).merge_and_unload().to(torch.bfloat16).state_dict()
    ours = load_file(tmp_path / "merged" / "model.safetensors")
    for name, tensor in ours.items():
        assert tensor.dtype == torch.bfloat16
        # Two ways to add in float32 can fall on the two sides of a rounding edge.
        torch.testing.assert_close(tensor, theirs[name], atol=1e-3, rtol=2**-8)
    torch.testing.assert_close(
        logits(loaded(tmp_path / "merged")), logits(with_peft(found)), atol=0.1, rtol=0.1
    )


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_dequantized_base_gives_what_training_gave(
    tmp_path: Path, alone: World, architecture: str
) -> None:
    sections = {"method": {"dora": architecture == "gpt2"}, "parallel": {"strategy": "ddp"}}
    found = trained_run(tmp_path, alone, architecture, sections)
    merge(found, tmp_path / "merged", dequantized=True)
    recipe = load_recipe(found.recipe, check_paths=False)
    setup = set_up_model(recipe, alone, find_base(recipe, tmp_path / "cache"))
    state = load_adapter(found.adapter, setup.method, setup.peft, setup.adapter)
    setup.engine.load_adapter_state(state)
    torch.manual_seed(2)
    ids = torch.randint(3, 300, (3, 17))
    with torch.no_grad():
        ours = setup.peft.eval()(input_ids=ids, row_lengths=None).logits
    merged = logits(loaded(tmp_path / "merged"))
    torch.testing.assert_close(merged, ours, atol=1e-3, rtol=1e-3)
    assert (logits(with_peft(found)) - ours).abs().max() > 0.01, "4 bits cost nothing here"


def test_the_files_keep_their_names_and_whatever_was_not_trained(
    tmp_path: Path, alone: World
) -> None:
    sections = {"method": {"targets": ["q_proj"]}}
    found = trained_run(tmp_path, alone, "llama", sections, {"max_shard_size": "60KB"})
    base, out = tmp_path / "base", tmp_path / "merged"
    (base / "pytorch_model.bin").write_bytes(b"the weights before")
    (base / "notes").mkdir()
    merge(found, out)
    expected = {file.name for file in base.iterdir() if file.is_file()} - {"pytorch_model.bin"}
    assert {file.name for file in out.iterdir()} == expected
    shards = sorted(base.glob("*.safetensors"))
    assert len(shards) > 3
    for file in shards:
        before, after = load_file(file), load_file(out / file.name)
        assert before.keys() == after.keys()
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed == {name for name in before if "q_proj.weight" in name}
        with safe_open(out / file.name, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    for name in expected - {file.name for file in shards}:
        if name.endswith(".index.json"):
            indices = [json.loads((folder / name).read_text()) for folder in (base, out)]
            assert indices[0] == indices[1]
        else:
            assert (out / name).read_bytes() == (base / name).read_bytes()


def test_a_new_head_is_in_the_index(tmp_path: Path, alone: World) -> None:
    saved = {"trunk_only": True, "max_shard_size": "100KB"}
    found = trained_run(tmp_path, alone, "bert", CLASSIFY, saved)
    merge(found, tmp_path / "merged")
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    files = {file.name: load_file(file) for file in (tmp_path / "merged").glob("*.safetensors")}
    assert index["weight_map"] == {key: name for name, held in files.items() for key in held}
    assert {"classifier.weight", "classifier.bias"} <= index["weight_map"].keys()
    size = sum(tensor.nbytes for held in files.values() for tensor in held.values())
    assert index["metadata"]["total_size"] == size


MEASURE = """
import sys
from pathlib import Path
from peft_dist.entrypoints.merge import merge
from peft_dist.run.directory import RunDir

def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) << 10

warm, large = (RunDir.open(path) for path in sys.argv[1:])
merge(warm, warm.path / "merged")
before = peak()
merge(large, large.path / "merged")
print("GROWTH", peak() - before)
"""


def large_run(folder: Path, layers: int) -> tuple[RunDir, list[int]]:
    """Make a base in one file per layer and a run on it; return the sizes of the files too."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=layers,
        num_attention_heads=8,
    )
    config.architectures = ["LlamaForCausalLM"]
    base = folder / "base"
    config.save_pretrained(base)
    skeleton = architectures.build_skeleton(
        config, task="causal-lm", dtype=torch.float32, attention="eager"
    )
    files: dict[str, dict[str, torch.Tensor]] = {}
    for name, parameter in skeleton.named_parameters():
        part = name.split(".")[2] if ".layers." in name else "rest"
        files.setdefault(f"model-{part}.safetensors", {})[name] = torch.randn(parameter.shape)
    for name, tensors in files.items():
        save_file(tensors, base / name, metadata={"format": "pt"})
    index = {"weight_map": {key: name for name, tensors in files.items() for key in tensors}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    made = RunDir.create(folder / "run", tiny_recipe(base, folder / "rows.jsonl"))
    method = METHODS["lora"](Lora())
    peft = method.attach(skeleton, task="causal-lm", base_name=str(base), has_conv1d=False)
    state = {n: torch.randn(p.shape) for n, p in peft.named_parameters() if p.requires_grad}
    save_adapter(made.adapter, method, peft, state)
    return made, [(base / name).stat().st_size for name in files]


@pytest.mark.slow
def test_memory_grows_by_less_than_one_file_of_the_model(tmp_path: Path) -> None:
    warm, _ = large_run(tmp_path / "warm", layers=1)
    large, sizes = large_run(tmp_path / "large", layers=6)
    done = run(
        [sys.executable, "-c", MEASURE, str(warm.path), str(large.path)],
        # what is freed goes back at once, so that the peak is of what is held and not of malloc
        environment=environment(tmp_path / "cache") | {"MALLOC_MMAP_THRESHOLD_": "65536"},
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    growth = int(done.stdout.split("GROWTH")[1])
    assert sum(sizes) > 5 * max(sizes)
    assert growth < max(sizes)


@pytest.mark.parametrize("kind", sorted(UNMERGEABLE))
def test_a_method_that_is_no_sum_of_weights_is_refused_with_the_reason(
    tmp_path: Path, kind: str
) -> None:
    method = {"kind": kind, **({"type": "IA3"} if kind == "peft" else {})}
    raw = {"model": {"name": "m"}, "data": {"train": "d"}, "method": method}
    found = RunDir.create(tmp_path / "run", Recipe.model_validate(raw))
    told = refused(found, tmp_path / "merged")
    assert told == (
        f"method.kind: a {kind} adapter cannot be merged: {UNMERGEABLE[kind]}; load it with PEFT"
    )


def refused(found: RunDir, out: Path) -> str:
    """Merge what cannot be merged; return the one line and see that nothing is left."""
    before = sorted(out.parent.iterdir()) if out.parent.is_dir() else []
    with pytest.raises(PeftDistError) as caught:
        merge(found, out)
    assert (sorted(out.parent.iterdir()) if out.parent.is_dir() else []) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_cannot_be_merged_is_one_line_and_leaves_nothing(tmp_path: Path, alone: World) -> None:
    found = trained_run(tmp_path, alone, "llama")
    out, base = tmp_path / "merged", tmp_path / "base"
    assert "base: already there; choose another folder with --out" in refused(found, base)
    with small_disk(100_000):
        assert f"{out}: cannot be written: File too large; free space" in refused(found, out)
    file = tmp_path / "file"
    file.touch()
    assert "file: already there" in refused(found, file)
    assert "cannot be written: " in refused(found, file / "merged")
    weights = load_file(base / "model.safetensors")
    state = {"x.quant_state.bitsandbytes__nf4": torch.zeros(1)}
    save_file(weights | state, base / "model.safetensors")
    assert "is stored quantized; merging needs the full-precision model" in refused(found, out)
    tiny_model(base, "llama", num_hidden_layers=1)
    assert "layers.1" in (told := refused(found, out))
    assert "has no place in the base" in told
    (found.adapter / "adapter_model.safetensors").unlink()
    assert "holds no adapter; wait until training has finished" in refused(found, out)


@contextmanager
def small_disk(most: int) -> Iterator[None]:
    """Let no file of this process grow beyond so many bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_weight_that_no_longer_fits_its_type_is_named(tmp_path: Path, alone: World) -> None:
    found = trained_run(tmp_path, alone, "llama", {}, {"dtype": torch.float16}, scale=1000.0)
    told = refused(found, tmp_path / "merged")
    assert "_proj.weight is not finite in F16 once merged" in told


def test_an_empty_folder_is_filled(tmp_path: Path, alone: World) -> None:
    found = trained_run(tmp_path, alone, "llama")
    (tmp_path / "merged").mkdir()
    merge(found, tmp_path / "merged")
    assert (tmp_path / "merged" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.usefixtures("alone")
def test_the_command_merges_a_run_that_was_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in environment(tmp_path / "cache").items():
        monkeypatch.setenv(name, value)
    tiny_model(tmp_path / "base", "llama")
    write_jsonl(tmp_path / "rows.jsonl", completion_rows(8))
    (tmp_path / "recipe.yaml").write_text(
        "model: {name: base, dtype: float32}\ndata: {train: rows.jsonl, eval: rows.jsonl}\n"
        "train: {steps: 3, global_batch_size: 4, learning_rate: 1e-2}\n",
        encoding="utf-8",
    )
    assert train.main(["recipe.yaml", "--run-dir", "run"]) == 0
    capfd.readouterr()
    assert main(["merge", "run", "--out", "merged", "--gguf", "q8_0"]) == 0
    told = capfd.readouterr()
    assert f"{tmp_path}/merged  14 of " in told.out
    ways = "4-bit [+] adapter ([0-9.]+), full [+] adapter ([0-9.]+), merged ([0-9.]+)"
    found = re.search(f"held-out loss: {ways}", told.out)
    assert found is not None, told.out
    in_4_bits, full, merged = map(float, found.groups())
    result = json.loads(RunDir.open("run").result.read_text(encoding="utf-8"))
    assert in_4_bits == pytest.approx(result["eval"]["last"]["loss"], abs=2e-4)
    assert merged == pytest.approx(full, abs=2e-4)
    assert in_4_bits != full
    assert "tensors merged" in told.out
    expected = logits(with_peft(RunDir.open("run")))
    torch.testing.assert_close(logits(loaded(tmp_path / "merged")), expected, atol=1e-4, rtol=1e-4)
    assert f"llama-cli -m {tmp_path}/merged/merged-q8_0.gguf" in told.out
    rounded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged",
        gguf_file="merged-q8_0.gguf",
        quantization_config=GgufConfig(dequantize=True),
    )
    difference = logits(rounded.float()) - expected
    assert 0 < difference.abs().max() < 0.03 * expected.abs().max()
