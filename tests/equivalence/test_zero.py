"""DeepSpeed's engines and offload against the others: what they compute, hold and save."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.equivalence.cases import DDP, FSDP, ZERO2, ZERO3
from tests.equivalence.zero_cases import CASES, CLIPPED_AT
from tests.processes import ROOT, environment, forked_world, run
from tests.tiny import completion_rows, labelled_rows, tiny_model, write_jsonl

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
pytest.importorskip("deepspeed")

# bfloat16 has 8 bits of mantissa, and the order of sums differs.
TOLERANCES = {"bfloat16": 5e-3}
DEEPSPEED = [
    (name, engine)
    for name, case in CASES.items()
    for engine in case.engines
    if engine in (ZERO2, ZERO3) and case.steps > 1  # in its first step LoRA moves B alone
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder in which every case was trained, on one process and on two."""
    folder = tmp_path_factory.mktemp("zero")
    for name in ("llama", "qwen2", "gpt2"):
        tiny_model(folder / "models" / name, name)
    tiny_model(folder / "models" / "bert", "bert", num_labels=3)
    # 2 processes divide neither 71 nor 321 rows, nor the elements of a norm of 71
    tiny_model(folder / "models" / "odd", "llama", hidden_size=96, head_dim=32,
               num_attention_heads=3, num_key_value_heads=3, intermediate_size=71,
               vocab_size=321)  # fmt: skip
    for kind, rows in (("completion", completion_rows), ("labelled", labelled_rows)):
        write_jsonl(folder / f"{kind}.jsonl", rows(48))
        write_jsonl(folder / f"{kind}-eval.jsonl", rows(13, seed=1))
    script = str(ROOT / "tests" / "equivalence" / "zero_cases.py")
    done = run(
        [*forked_world(1, 2), script, str(folder)],
        environment=environment(folder / "cache"),
        cwd=folder,
        timeout_s=600,
    )
    assert done.returncode == 0, done.stderr[-20000:]
    assert "DeepSpeed" not in done.stdout, "it speaks on standard output"
    return folder


def outcome(folder: Path, name: str, engine: str) -> dict[str, Any]:
    text = (folder / "outcomes" / name / engine / "outcome.json").read_text(encoding="utf-8")
    return dict(json.loads(text))


@pytest.mark.parametrize("name", [name for name in CASES if name != "offloaded"])
def test_deepspeed_has_the_losses_of_the_other_engines(folder: Path, name: str) -> None:
    first, *others = CASES[name].engines
    wanted = outcome(folder, name, first)
    assert len(wanted["losses"]) == CASES[name].steps
    for engine in others:
        found = outcome(folder, name, engine)
        tolerance = TOLERANCES.get(name, 1e-5)
        assert found["losses"] == pytest.approx(wanted["losses"], abs=tolerance), engine
        assert found["last"][0] == pytest.approx(wanted["last"][0], abs=tolerance), engine


@pytest.mark.parametrize("norm", CLIPPED_AT)
def test_every_engine_clips_as_the_recipe_says_and_at_nothing_else(
    folder: Path, norm: float
) -> None:
    name = f"clipped-at-{norm:g}"
    first, *others = CASES[name].engines
    wanted = outcome(folder, name, first)
    assert wanted["norms"][0] > 2.0, "nothing to clip at a default of 1"
    for engine in others:
        found = outcome(folder, name, engine)
        assert found["norms"] == pytest.approx(wanted["norms"], rel=1e-5), engine
        assert found["update"] == pytest.approx(wanted["update"], rel=1e-4), engine


@pytest.mark.parametrize("engine", [FSDP, ZERO3])
def test_a_base_in_host_memory_trains_to_the_same_losses(folder: Path, engine: str) -> None:
    there, here = outcome(folder, "offloaded", engine), outcome(folder, "kept-nf4", engine)
    assert there["losses"] == pytest.approx(here["losses"], abs=1e-6)
    assert there["base_bytes_by_rank"] == here["base_bytes_by_rank"]


@pytest.mark.parametrize(("name", "engine"), DEEPSPEED)
def test_adapters_move_and_agree_and_the_base_does_not(
    folder: Path, name: str, engine: str
) -> None:
    # A change of the base, or adapters that differ, would have ended the training.
    found = outcome(folder, name, engine)
    assert found["adapters_agree"]
    assert found["still"] == []
    assert found["gradient"] > 0.0
    assert found["gradient_change"] == 0.0, "an evaluation in between changed the gradient"


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if ZERO3 in case.engines])
def test_zero3_holds_the_bytes_of_the_others_in_pieces(folder: Path, name: str) -> None:
    found, wanted = outcome(folder, name, ZERO3), outcome(folder, name, CASES[name].engines[0])
    assert found["base_fingerprint"] == wanted["base_fingerprint"]
    assert found["base_bytes_total"] == wanted["base_bytes_total"]
    # No tensor is padded by more than one element, of eight bytes at most.
    tensors = len(found["base_fingerprint"])
    for held in found["base_bytes_by_rank"]:
        assert 0 <= held - found["base_bytes_total"] / 2 <= 4 * tensors
    assert not any(held == found["base_bytes_total"] for held in found["base_bytes_by_rank"])


# In bfloat16 a rounding error of the optimizer turns the sign of small gradients.
SAVED = [n for n, c in CASES.items() if {DDP, ZERO3} <= {*c.engines} and n != "bfloat16"]


@pytest.mark.parametrize("name", SAVED)
def test_the_saved_adapter_is_that_of_ddp(folder: Path, name: str) -> None:
    path = folder / "outcomes" / name
    wanted = load_file(path / DDP / "adapter" / "adapter_model.safetensors")
    for engine in set(CASES[name].engines) & {ZERO2, ZERO3}:
        found = load_file(path / engine / "adapter" / "adapter_model.safetensors")
        assert found.keys() == wanted.keys()
        for key, tensor in found.items():
            assert tensor.dtype == wanted[key].dtype
            difference = (tensor - wanted[key]).abs().max()
            assert difference <= 1e-4, key


def test_a_rank_never_holds_more_than_one_tensor_whole_while_it_loads(folder: Path) -> None:
    for facts in json.loads((folder / "load.json").read_text(encoding="utf-8")):
        assert facts["tensors"] > 20
        assert facts["made"] == 0, "a tensor stayed whole after its turn"
        assert facts["filled"] == 0


def test_zero3_frees_a_block_before_the_next_is_gathered(folder: Path) -> None:
    for facts in json.loads((folder / "training.json").read_text(encoding="utf-8")):
        assert facts["looks"] >= 4 * 2 * 2, "steps x blocks x forward and backward"
        assert facts["here"] > 0, "the hooks saw no layer at work"
        assert facts["elsewhere"] == 0
        assert facts["left"] == 0, "something stays whole after the last step"


def test_zero3_takes_and_gives_whole_tensors_and_leaves_the_adapter_alone(folder: Path) -> None:
    for facts in json.loads((folder / "load.json").read_text(encoding="utf-8")):
        assert facts["returned"]
        assert facts["adapter_is_whole"]
        assert facts["listed_by_peft"] == facts["trained"] > 0
