"""The adapter on disk: PEFT's format, whole or not there, and the same after a reload."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from peft_dist.checkpoint.adapter_file import ADAPTER_FILE, load_adapter
from peft_dist.checkpoint.verified_save import AdapterSaver
from peft_dist.common.errors import PeftDistError, RunDirError, Superseded, TrainingError
from peft_dist.config.method import Lora
from peft_dist.data.token_cache import tokenize_rows
from peft_dist.distributed.world import World
from peft_dist.methods.lora import LoraMethod
from peft_dist.model import architectures
from peft_dist.model.source import find_base
from peft_dist.model_setup import ModelSetup, set_up_model
from tests.processes import environment, forked_world, run
from tests.tiny import completion_rows, save_adapter, tiny_model, tiny_recipe, write_jsonl


def opened(folder: Path, world: World, architecture: str = "llama", **sections: Any) -> ModelSetup:
    tiny_model(folder / architecture, architecture)
    recipe = tiny_recipe(folder / architecture, folder / "rows.jsonl", **sections)
    labels = ("a", "b") if architecture == "bert" else ()
    return set_up_model(recipe, world, find_base(recipe, folder / "cache"), label_names=labels)


BERT = {"model": {"task": "sequence-classification"}}


@pytest.mark.parametrize(
    ("architecture", "sections"),
    [
        ("llama", {}),
        ("llama", {"method": {"dora": True}}),
        ("qwen2", {"method": {"bias": "all"}}),
        ("qwen2", {"method": {"bias": "lora_only"}}),
        ("bert", BERT),
        ("bert", {**BERT, "method": {"bias": "all"}}),
    ],
)
def test_everything_that_trains_is_saved_and_read_back(
    tmp_path: Path, alone: World, architecture: str, sections: dict[str, Any]
) -> None:
    setup = opened(tmp_path, alone, architecture, **sections)
    state = {name: torch.randn_like(value) for name, value in setup.engine.adapter_state().items()}
    assert state.keys() == setup.adapter.keys()
    save_adapter(tmp_path / "adapter", setup.method, setup.peft, state)
    stored = load_file(tmp_path / "adapter" / ADAPTER_FILE)
    assert len(stored) == len(state)
    assert not any(".default." in name for name in stored)
    back = load_adapter(tmp_path / "adapter", setup.method, setup.peft, setup.adapter)
    assert all(torch.equal(back[name], value) for name, value in state.items())
    setup.engine.load_adapter_state(back)
    assert all(torch.equal(setup.adapter[name], value) for name, value in state.items())


def test_the_same_adapter_is_the_same_bytes(tmp_path: Path, alone: World) -> None:
    setup = opened(tmp_path, alone)
    for name in ("one", "two"):
        save_adapter(tmp_path / name, setup.method, setup.peft, setup.engine.adapter_state())
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
    config = json.loads((tmp_path / "one" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["target_modules"] == sorted(config["target_modules"])
    assert config["base_model_name_or_path"] == str(tmp_path / "llama")


def test_a_new_copy_replaces_the_old_one_and_leaves_nothing_beside_it(
    tmp_path: Path, alone: World
) -> None:
    setup = opened(tmp_path, alone)
    folder = tmp_path / "run" / "adapter"
    folder.mkdir(parents=True)
    (folder / "old").write_text("", encoding="utf-8")
    save_adapter(folder, setup.method, setup.peft, setup.engine.adapter_state())
    assert {f.name for f in folder.iterdir()} == {ADAPTER_FILE, "adapter_config.json"}
    assert list(folder.parent.iterdir()) == [folder]


def test_a_tensor_that_peft_would_not_save_is_named(tmp_path: Path, alone: World) -> None:
    setup = opened(tmp_path, alone)
    with pytest.raises(TrainingError, match="extra.weight is trained, but PEFT would not save it"):
        setup.method.saved(setup.peft, {**setup.adapter, "extra.weight": torch.zeros(1)})


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path, alone: World) -> None:
    setup = opened(tmp_path, alone)
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(TrainingError, match="the adapter cannot be written: ") as caught:
        save_adapter(
            tmp_path / "file" / "adapter",
            setup.method,
            setup.peft,
            setup.engine.adapter_state(),
        )
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["missing", "truncated", "other", "shape"])
def test_a_broken_or_foreign_adapter_is_refused(tmp_path: Path, alone: World, damage: str) -> None:
    setup = opened(tmp_path, alone)
    folder = tmp_path / "adapter"
    save_adapter(folder, setup.method, setup.peft, setup.engine.adapter_state())
    file = folder / ADAPTER_FILE
    tensors = load_file(file)
    name = sorted(tensors)[0]
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:500])
    elif damage == "other":
        save_file({**tensors, "another": torch.zeros(1)}, file)
    else:
        save_file({**tensors, name: torch.zeros(2, 2)}, file)
    with pytest.raises(RunDirError, match=str(file)) as caught:
        load_adapter(folder, setup.method, setup.peft, setup.adapter)
    assert isinstance(caught.value, PeftDistError)
    assert "\n" not in str(caught.value)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def trained(folder: Path, world: World, **sections: Any) -> tuple[ModelSetup, AdapterSaver]:
    """Return a model setup whose every trained tensor has moved since its saver was made."""
    write_jsonl(folder / "rows.jsonl", completion_rows(8))
    setup = opened(folder, world, **sections)
    saver = AdapterSaver(setup, tokenize_rows(setup.recipe, "train", folder / "cache"))
    with torch.no_grad():
        for parameter in setup.adapter.values():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return setup, saver


def dropped(setup: ModelSetup, patch: pytest.MonkeyPatch) -> str:
    """Gather all tensors but one."""
    state = setup.engine.adapter_state()
    state.popitem()
    patch.setattr(setup.engine, "adapter_state", lambda: state)
    return "down_proj.lora_B.weight is trained, but not in the file"


def emptied(setup: ModelSetup, patch: pytest.MonkeyPatch) -> str:
    """Gather a tensor as a process does that holds no part of it."""
    state = setup.engine.adapter_state()
    state["base_model.model.model.layers.1.mlp.up_proj.lora_B.default.weight"].zero_()
    patch.setattr(setup.engine, "adapter_state", lambda: state)
    return "layers.1.mlp.up_proj.lora_B.weight was changed by training, but is all zeros"


def stale(setup: ModelSetup, patch: pytest.MonkeyPatch) -> str:
    """Gather values from before the last step."""
    state = {name: value + 0.01 for name, value in setup.engine.adapter_state().items()}
    patch.setattr(setup.engine, "adapter_state", lambda: state)
    return "layers.0.mlp.down_proj.lora_A.weight has other values in the file than in the model"


def renamed(setup: ModelSetup, patch: pytest.MonkeyPatch, old: str, new: str) -> None:
    saved = setup.method.saved
    patch.setattr(
        setup.method,
        "saved",
        lambda *args: {name.replace(old, new): t for name, t in saved(*args).items()},
    )


def wrapped(setup: ModelSetup, patch: pytest.MonkeyPatch) -> str:
    """Save by the names of a compiled model."""
    renamed(setup, patch, "base_model.model.", "base_model.model._orig_mod.")
    return "_orig_mod.model.layers.0.mlp.down_proj.lora_A.weight stands in the file under the name"


def ignored(setup: ModelSetup, patch: pytest.MonkeyPatch) -> str:
    """Save a tensor by a name that PEFT does not know and says nothing of."""
    renamed(setup, patch, "layers.1.self_attn.q_proj.lora_A", "layers.1.self_attn.q.lora_A")
    return "PEFT does not read base_model.model.model.layers.1.self_attn.q.lora_A.weight"


def missed(setup: ModelSetup, patch: pytest.MonkeyPatch) -> str:
    """Save all but a tensor that PEFT expects, and forget that it was trained."""
    saved = setup.method.saved
    lost = "layers.0.self_attn.k_proj.lora_B.weight"
    patch.setattr(
        setup.method,
        "saved",
        lambda *args: {name: t for name, t in saved(*args).items() if not name.endswith(lost)},
    )
    return f"PEFT reads base_model.model.model.{lost}, which is not in the file"


def misdescribed(setup: ModelSetup, patch: pytest.MonkeyPatch) -> str:
    """Write another scale than the one that was trained with."""
    config = setup.method.saved_config(setup.peft)
    write = config.save_pretrained

    def changed(folder: str) -> None:
        write(folder)
        file = Path(folder) / "adapter_config.json"
        text = file.read_text(encoding="utf-8")
        file.write_text(text.replace('"lora_alpha": 16.0', '"lora_alpha": 8'), encoding="utf-8")

    patch.setattr(config, "save_pretrained", changed)
    return "lora_alpha is 8 in adapter_config.json, but 16.0 in training"


def misread(setup: ModelSetup, patch: pytest.MonkeyPatch) -> str:
    """Read the tensors back into the wrong places."""
    restored = setup.method.restored

    def swapped(*args: Any) -> dict[str, torch.Tensor]:
        state = restored(*args)
        one, other = (f"base_model.model.model.layers.{i}.mlp.up_proj.lora_B.default.weight"
                      for i in (0, 1))  # fmt: skip
        return state | {one: state[other], other: state[one]}

    patch.setattr(setup.method, "restored", swapped)
    return "read back, it gives other losses ("


@pytest.mark.slow
@pytest.mark.parametrize(
    "damage",
    [dropped, emptied, stale, wrapped, ignored, missed, misdescribed, misread],
    ids=lambda damage: damage.__name__,
)
def test_an_adapter_that_would_not_come_back_is_not_saved(
    tmp_path: Path,
    alone: World,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[ModelSetup, pytest.MonkeyPatch], str],
) -> None:
    setup, saver = trained(tmp_path, alone)
    folder = tmp_path / "run" / "adapter"
    saver.save(folder)
    before = contents(folder)
    with torch.no_grad():
        next(iter(setup.adapter.values())).add_(0.5)
    state = setup.engine.adapter_state()
    expected = damage(setup, monkeypatch)
    with pytest.raises(TrainingError) as caught:
        saver.save(folder)
    assert str(caught.value).startswith("the adapter was not saved: ")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert contents(folder) == before
    assert list(folder.parent.iterdir()) == [folder]
    assert all(torch.equal(setup.adapter[name], value) for name, value in state.items())
    monkeypatch.undo()
    saver.save(folder)
    assert contents(folder) != before


def test_an_adapter_of_an_attempt_that_was_taken_over_is_not_put_in_place(
    tmp_path: Path, alone: World
) -> None:
    _, saver = trained(tmp_path, alone)
    folder = tmp_path / "run" / "adapter"
    saver.save(folder)
    inode, found = folder.stat().st_ino, []

    def superseded() -> None:
        found.extend(path for path in folder.parent.iterdir() if path != folder)
        raise Superseded("attempt 1 was taken over")

    with pytest.raises(Superseded):
        saver.save(folder, may_publish=superseded)
    (partial,) = found
    assert (folder.stat().st_ino, partial.exists()) == (inode, False)


def test_a_tensor_that_has_not_moved_may_be_zero(tmp_path: Path, alone: World) -> None:
    setup, _ = trained(tmp_path, alone)
    with torch.no_grad():
        for name, parameter in setup.adapter.items():
            parameter.mul_(".lora_A." in name)
    rows = tokenize_rows(setup.recipe, "train", tmp_path / "cache")
    AdapterSaver(setup, rows).save(tmp_path / "adapter")
    assert not load_file(tmp_path / "adapter" / ADAPTER_FILE)[
        "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"
    ].any()


@pytest.mark.parametrize(
    "method",
    [
        {"dora": True},
        {"kind": "bottleneck"},
        {"kind": "prefix"},
        {"kind": "prefix", "projection": True},
        {"kind": "prompt"},
        {"kind": "bitfit", "add_bias": True},
        {"kind": "peft", "type": "IA3"},
    ],
    ids=lambda method: "-".join(str(value) for value in method.values()),
)
def test_every_method_passes_the_check_and_trains_on(
    tmp_path: Path, alone: World, method: dict[str, Any]
) -> None:
    setup, saver = trained(tmp_path, alone, method=method)
    setup.model.train()
    before = setup.engine.adapter_state()
    saver.save(tmp_path / "adapter")
    assert setup.model.training
    after = setup.engine.adapter_state()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_the_base_is_not_gathered_to_save(
    tmp_path: Path, alone: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup, saver = trained(tmp_path, alone)
    sizes = sorted(parameter.numel() for parameter in setup.adapter.values())
    sent: list[int] = []
    broadcast = torch.distributed.broadcast

    def counted(tensor: torch.Tensor, **where: Any) -> Any:
        sent.append(tensor.numel())
        return broadcast(tensor, **where)

    monkeypatch.setattr("torch.distributed.broadcast", counted)
    monkeypatch.delattr("peft_dist.sharding.engine.Engine.full_tensor")
    monkeypatch.delattr("peft_dist.distributed.collectives.Shard.gather")
    saver.save(tmp_path / "adapter")
    assert sent == [sum(sizes)]


def test_a_file_is_hardly_larger_than_its_adapter(tmp_path: Path) -> None:
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    config = LlamaConfig(**sizes, num_attention_heads=9, num_key_value_heads=3)
    skeleton = architectures.build_skeleton(
        config, task="causal-lm", dtype=torch.float32, attention="eager"
    )
    method = LoraMethod(Lora())
    peft = method.attach(skeleton, task="causal-lm", base_name="m", has_conv1d=False)
    state = {n: torch.zeros(p.shape) for n, p in peft.named_parameters() if p.requires_grad}
    save_adapter(tmp_path / "adapter", method, peft, state)
    trained_bytes = sum(tensor.nbytes for tensor in state.values())
    assert trained_bytes == 9_768_960  # 2.4 million parameters: SmolLM2-135M with rank 8
    size = (tmp_path / "adapter" / ADAPTER_FILE).stat().st_size
    assert trained_bytes < size <= 1.02 * trained_bytes


TWO_PROCESSES = """
import json, sys
from pathlib import Path
from peft_dist.distributed import process_group
from peft_dist.distributed.world import read_world
from peft_dist.data.token_cache import tokenize_rows
from peft_dist.common.errors import TrainingError
from peft_dist.checkpoint.verified_save import AdapterSaver
from peft_dist.model.source import find_base
from peft_dist.model_setup import set_up_model
from tests.tiny import tiny_recipe


def main(folder):
    world = read_world()
    process_group.start(world)
    recipe = tiny_recipe(folder / "llama", folder / "rows.jsonl", parallel={"strategy": "fsdp"})
    setup = set_up_model(recipe, world, find_base(recipe, folder / "cache"))
    saver = AdapterSaver(setup, tokenize_rows(recipe, "train", folder / "cache"))
    for parameter in setup.adapter.values():
        parameter.data += 0.01
    told = []

    def save(to):
        try:
            saver.save(to)
            told.append("saved")
        except TrainingError as error:
            told.append(str(error))

    save(folder / "run" / "adapter")
    gather, restored = setup.engine.adapter_state, setup.method.restored
    if world.rank == 0:
        setup.engine.adapter_state = lambda: dict(list(gather().items())[1:])
    save(folder / "run" / "adapter")
    setup.engine.adapter_state = gather
    if world.rank == 1:
        setup.method.restored = lambda *args: {n: t + 1 for n, t in restored(*args).items()}
    save(folder / "run" / "adapter")
    setup.method.restored = restored
    save(folder / "rows.jsonl" / "adapter")
    save(folder / "run" / "adapter")
    (folder / f"told-{world.rank}.json").write_text(json.dumps(told))

if __name__ == "__main__":
    main(Path(sys.argv[1]))
"""


@pytest.mark.distributed
def test_a_failed_save_ends_on_every_process(tmp_path: Path) -> None:
    tiny_model(tmp_path / "llama", "llama")
    write_jsonl(tmp_path / "rows.jsonl", completion_rows(8))
    (tmp_path / "worker.py").write_text(TWO_PROCESSES, encoding="utf-8")
    done = run(
        [*forked_world(2), str(tmp_path / "worker.py"), str(tmp_path)],
        environment=environment(tmp_path / "cache"),
        cwd=tmp_path,
        timeout_s=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"told-{rank}.json").read_text()) for rank in (0, 1))
    expected = ["saved", "is trained, but not in the file", "gives other losses",
                "the adapter cannot be written: ", "saved"]  # fmt: skip
    for told in (first, second):
        assert len(told) == len(expected)
        assert all(part in line for part, line in zip(expected, told, strict=True)), told
    assert first[1] == second[1]
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["adapter"]
