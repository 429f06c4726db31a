"""One training, whatever shares it out: the same losses and adapters on every engine."""

from pathlib import Path

import pytest

from tests.equivalence.cases import (
    CASES,
    DDP,
    FSDP,
    FSDP4,
    HSDP,
    RESHARDED,
    SINGLE,
    STEPS,
    ZERO2,
    ZERO3,
    expert_cases,
)
from tests.equivalence.conftest import Outcome, Outcomes
from tests.tiny import ARCHITECTURES

pytestmark = pytest.mark.distributed

SHARED = [name for name, case in CASES.items() if len(case.engines) > 1]
CAUSAL = [name for name in ARCHITECTURES if name != "bert"]
# bfloat16 has 8 bits of mantissa, and packed rows are summed in another order in another split.
BFLOAT16_TOLERANCE = 5e-3

MARKS = {
    "lora": ["lora_"],
    "bottleneck": ["bottleneck_"],
    "prefix": ["prompt_encoder"],
    "prompt": ["prompt_encoder"],
    "bitfit": ["bitfit_"],
}
"""What stands in the names of the tensors that a method trains."""


def largest_difference(one: Outcome, other: Outcome, key: str = "losses") -> float:
    """Return how far two lists of figures are apart at most."""
    return max(abs(a - b) for a, b in zip(one[key], other[key], strict=True))


@pytest.mark.parametrize("name", SHARED)
def test_every_engine_has_the_losses_of_one_process(outcome: Outcomes, name: str) -> None:
    alone = outcome(name, SINGLE)
    assert len(alone["losses"]) == CASES[name].steps
    tolerance = BFLOAT16_TOLERANCE if name.startswith(("bfloat16", "float16")) else 1e-5
    if name.startswith("muon-"):  # orthogonalised in bfloat16
        tolerance = BFLOAT16_TOLERANCE
    if name.startswith(("matrix-", "objective-", "experts-")):
        tolerance = 1e-4
    for engine in CASES[name].engines[1:]:
        shared = outcome(name, engine)
        assert largest_difference(alone, shared) <= tolerance, engine
        assert largest_difference(alone, shared, "probe_nll") <= 10 * tolerance, engine
        assert shared["rewards"] == pytest.approx(alone["rewards"], abs=tolerance), engine
        assert shared["first"][0] == pytest.approx(alone["first"][0], abs=tolerance), engine
        assert shared["last"][0] == pytest.approx(alone["last"][0], abs=tolerance), engine


@pytest.mark.parametrize(
    ("reshard", "engine"), [(when, engine) for when in RESHARDED for engine in RESHARDED[when]]
)
def test_blocks_that_stay_gathered_change_no_bit(
    outcome: Outcomes, reshard: str, engine: str
) -> None:
    anew, kept = outcome("accumulated", engine), outcome(f"accumulated-{reshard}", engine)
    for key in ("losses", "norms", "update", "first", "last", "probe_logits"):
        assert kept[key] == anew[key], key
    assert kept["base_bytes_by_rank"] == anew["base_bytes_by_rank"]


@pytest.mark.parametrize("engine", CASES["accumulated-dequantized"].engines)
def test_weights_that_stay_dequantized_change_no_bit(outcome: Outcomes, engine: str) -> None:
    anew, kept = outcome("accumulated", engine), "accumulated-step-dequantized"
    names = ["accumulated-dequantized"]
    names += [kept] if engine in (FSDP, HSDP) and engine in CASES[kept].engines else []
    for name in names:
        for key in ("losses", "norms", "update", "first", "last", "probe_logits"):
            assert outcome(name, engine)[key] == anew[key], (name, key)
        assert outcome(name, engine)["base_bytes_by_rank"] == anew["base_bytes_by_rank"]


@pytest.mark.parametrize(
    ("name", "engine"),
    [(name, engine) for name in ("llama-nf4", "llama-none") for engine in CASES[name].engines[1:]],
)
def test_twenty_steps_are_the_same_and_learn(outcome: Outcomes, name: str, engine: str) -> None:
    shared = outcome(name, engine)
    assert len(shared["losses"]) == 20
    assert shared["losses"][-1] < shared["losses"][0] - 1
    assert shared["last"][1] == outcome(name, SINGLE)["last"][1] == 1.0


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_learns(outcome: Outcomes, architecture: str, quantization: str) -> None:
    found = outcome(f"{architecture}-{quantization}", SINGLE)
    least = 0.02 if architecture == "bert" else 0.5
    assert found["losses"][-1] < found["losses"][0] - least
    assert (found["packed_layers"] > 0) == (quantization == "nf4")


@pytest.mark.parametrize("name", SHARED)
def test_the_base_is_shared_out_to_the_byte(outcome: Outcomes, name: str) -> None:
    for engine in CASES[name].engines[1:]:
        shared = outcome(name, engine)
        total, held = shared["base_bytes_total"], shared["base_bytes_by_rank"]
        whole = engine in (DDP, ZERO2)
        groups = [held[:1], held[1:]] if whole else [held]
        if engine == HSDP:
            groups = [held[:2], held[2:]]
        # DeepSpeed pads the last piece of each tensor.
        padding = 4 * shared["base_tensors"] if engine == ZERO3 else 0
        assert all(total <= sum(group) <= total + padding for group in groups), engine
        if not whole:
            assert max(held) <= 1.03 * total / len(groups[0]), engine  # tiny rows do not divide
        assert shared["sharded"] == (not whole)


@pytest.mark.parametrize("name", expert_cases())
def test_the_experts_are_shared_out_with_their_scales(outcome: Outcomes, name: str) -> None:
    shared, whole = outcome(name, FSDP), outcome(name, SINGLE)["expert_bytes_total"]
    assert whole > 0
    assert sum(shared["expert_bytes_by_rank"]) <= 1.02 * whole
    assert max(shared["expert_bytes_by_rank"]) <= 1.02 * whole / 2


# What is taken out of a weight by what rows make of it is rounded by how sums were made.
@pytest.mark.parametrize("name", [n for n in SHARED if n not in ("start-corda", "start-lora_ga")])
def test_the_base_has_the_same_bytes_on_every_engine(outcome: Outcomes, name: str) -> None:
    for engine in CASES[name].engines[1:]:
        found, alone = outcome(name, engine), outcome(name, SINGLE)
        assert found["base_fingerprint"] == alone["base_fingerprint"], engine


@pytest.mark.parametrize("name", CASES)
def test_adapters_move_and_are_equal_on_every_process(outcome: Outcomes, name: str) -> None:
    for engine in CASES[name].engines:
        found = outcome(name, engine)
        assert found["trained"]
        assert found["still"] == [], engine
        assert found["adapters_agree"], engine


@pytest.mark.parametrize("name", CASES)
def test_only_adapters_biases_and_heads_train(outcome: Outcomes, name: str) -> None:
    marks = [
        "lora_",
        "modules_to_save",
        "trainable_tokens",
        *(["bias"] if "biases" in name else []),
    ]
    if "matrix-" in name:
        marks = MARKS[name.partition("matrix-")[2].split("-")[0]]
    if name.startswith("objective-"):
        marks = [*MARKS.get(name.split("-")[2], MARKS["lora"]), "modules_to_save"]
    for engine in CASES[name].engines:
        trained = outcome(name, engine)["trained"]
        assert [n for n in trained if not any(mark in n for mark in marks)] == [], engine


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("own-dropout")])
def test_an_evaluation_in_between_leaves_the_gradient(outcome: Outcomes, name: str) -> None:
    for engine in CASES[name].engines:
        found = outcome(name, engine)
        assert found["gradient"] > 1e-3
        assert found["gradient_change"] <= 1e-6, engine


@pytest.mark.parametrize("architecture", CAUSAL)
def test_packed_rows_have_the_loss_of_padded_ones(outcome: Outcomes, architecture: str) -> None:
    padded = outcome(f"padded-{architecture}", SINGLE)
    packed = outcome(f"{architecture}-none", SINGLE)
    assert largest_difference(padded, packed) <= 1e-5


@pytest.mark.parametrize("engine", [SINGLE, FSDP, DDP, HSDP])
def test_four_passes_per_step_are_one(outcome: Outcomes, engine: str) -> None:
    assert largest_difference(outcome("accumulated", engine), outcome("repeated", SINGLE)) <= 1e-5


@pytest.mark.parametrize("engine", [SINGLE, FSDP])
def test_pairs_have_one_loss_in_any_number_of_passes(outcome: Outcomes, engine: str) -> None:
    once = outcome("objective-dpo-lora-nf4", SINGLE)
    assert len(once["rewards"]) == STEPS
    found = outcome("objective-dpo-accumulated", engine)
    assert largest_difference(found, once) <= 1e-5
    assert largest_difference(found, once, "rewards") <= 1e-5


@pytest.mark.parametrize("engine", [SINGLE, FSDP])
def test_recomputed_activations_change_nothing(outcome: Outcomes, engine: str) -> None:
    again, kept = outcome("checkpointed", engine), outcome("repeated", engine)
    assert largest_difference(again, kept) <= 1e-6


@pytest.mark.parametrize("engine", [SINGLE, FSDP])
def test_several_files_and_packed_files_are_the_same_base(outcome: Outcomes, engine: str) -> None:
    plain = outcome("repeated", engine)
    for name in ("files", "packed-before"):
        assert outcome(name, engine)["base_fingerprint"] == plain["base_fingerprint"]
        assert largest_difference(outcome(name, engine), plain) <= 1e-6
    twice = outcome("packed-twice", engine)
    assert twice["base_fingerprint"] != plain["base_fingerprint"]  # its scales lost some bits
    assert twice["losses"][0] == pytest.approx(plain["losses"][0], abs=0.01)


def test_a_trunk_without_its_head_is_the_same_base(outcome: Outcomes) -> None:
    trunk, whole = outcome("gpt2-trunk", SINGLE), outcome("gpt2-nf4", SINGLE)
    assert trunk["base_fingerprint"] == whole["base_fingerprint"]
    assert largest_difference(trunk, whole) <= 1e-6


def test_layers_that_do_not_fit_blocks_stay_unquantized_and_are_named(outcome: Outcomes) -> None:
    for engine in (SINGLE, FSDP, FSDP4):
        found = outcome("odd-nf4", engine)
        assert found["packed_layers"] == 12  # 6 of the 7 linears of both blocks
        assert found["warnings"] == [
            f"model.layers.{block}.mlp.down_proj.weight stays unquantized: "
            "its 71 columns are not a multiple of 32"
            for block in (0, 1)
        ]


def test_the_dropout_of_the_base_is_repeated_by_the_next_run(outcome: Outcomes) -> None:
    one, other = outcome("own-dropout", SINGLE), outcome("own-dropout-again", SINGLE)
    assert one["losses"] == other["losses"]
    assert one["losses"] != outcome("gpt2-none", SINGLE)["losses"]
    assert outcome("own-dropout-off", SINGLE)["losses"] == outcome("gpt2-none", SINGLE)["losses"]


@pytest.mark.parametrize("engine", CASES["damaged"].engines)
def test_every_process_agrees_that_the_packed_base_is_damaged(
    outcome: Outcomes, engine: str
) -> None:
    found, plain = outcome("damaged", engine), outcome("repeated", engine)
    (warning,) = found["warnings"]
    assert "is damaged at lm_head.weight; made anew" in warning
    assert found["base_fingerprint"] == plain["base_fingerprint"]
    assert largest_difference(found, plain) <= 1e-6


def test_any_number_of_processes_packs_the_same_bytes(trained: Path, outcome: Outcomes) -> None:
    one = {entry.name: entry for entry in (trained / "cache-1" / "packed").iterdir()}
    assert len(one) >= len(ARCHITECTURES)
    compared = set()
    for processes in (2, 4):
        for entry in (trained / f"cache-{processes}" / "packed").iterdir():
            compared.add(entry.name)
            for file in one[entry.name].iterdir():
                assert file.read_bytes() == (entry / file.name).read_bytes(), file
    assert compared == one.keys() - {Path(outcome("own-dropout", SINGLE)["packed_base"] or "").name}
