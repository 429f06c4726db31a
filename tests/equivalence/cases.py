"""The trainings that the distributed tests compare, and the worker that runs them.

One process group runs them all, one after the other: starting Python and torch costs more than a
training does. `python cases.py FOLDER`, alone or under torchrun; nothing is asserted here.
"""

import json
import logging
import os
import sys
import time
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from peft_dist.checkpoint.verified_save import AdapterSaver
from peft_dist.data.token_cache import TokenizedRows, tokenize_rows
from peft_dist.distributed import process_group
from peft_dist.distributed.collectives import barrier, gather_objects
from peft_dist.distributed.world import World, read_world
from peft_dist.evaluation.scoring import make_eval_set, score
from peft_dist.ledger.events import LedgerEvent
from peft_dist.model import cache as packed_base
from peft_dist.model.source import find_base
from peft_dist.model.weights import WeightFiles
from peft_dist.model_setup import ModelSetup, set_up_model
from peft_dist.objective.reference import reference_scores
from peft_dist.trainer import Trainer
from tests.faults.long import IS_LONG
from tests.faults.long import cases as some
from tests.tiny import ARCHITECTURES, tiny_recipe

SINGLE, FSDP, DDP, HSDP, FSDP4 = "1-fsdp", "2-fsdp", "2-ddp", "4-hsdp", "4-fsdp"
ZERO2, ZERO3 = "2-zero2", "2-zero3"
MATRIX_ENGINES = (DDP, FSDP, HSDP, ZERO2, ZERO3)
MATRIX_METHODS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora"},
    "bottleneck": {"kind": "bottleneck"},
    "prefix": {"kind": "prefix", "virtual_tokens": 5, "text": "the cat and the dog"},
    "prompt": {"kind": "prompt", "virtual_tokens": 5, "text": "the cat and the dog"},
    "bitfit": {"kind": "bitfit", "add_bias": True},
}
MATRIX_VARIANTS = [("none", "kept"), ("nf4", "recomputed")]
MIXTURES = ("qwen3_moe",)
if IS_LONG:
    MATRIX_VARIANTS += [("none", "recomputed"), ("nf4", "kept")]
    MIXTURES += (
        "qwen2_moe",
        "mixtral",
        "gpt_oss",
        "deepseek_v3",
        "olmoe",
        "granitemoe",
        "llama4_text",
    )
RESHARDED = {"backward": (FSDP, HSDP)[: some(1, 2)], "step": (FSDP, HSDP)}
"""Engines on which blocks stay gathered for so long."""
STARTED = {
    "eva": (FSDP, HSDP, ZERO3)[: some(2, 3)],
    "loftq": (FSDP, HSDP, ZERO3)[: some(1, 3)],
    "corda": (FSDP, HSDP, ZERO3)[: some(1, 3)],
    "lora_ga": (FSDP, ZERO3, HSDP)[: some(2, 3)],
}
"""Engines on which LoRAs start from weights or rows."""
STEPS, FEW = (10, 5) if IS_LONG else (6, 3)
"""Optimizer steps of a case, and of one that looks at a single setting: a difference shows in the
first of them, and grows."""
PROBE_ROWS = 6
"""Training rows whose losses stand for the logits of a trained model."""


@dataclass(frozen=True)
class Case:
    """One training, on one engine or on several that must agree."""

    model: str
    """Folder of the model in FOLDER/models."""
    engines: tuple[str, ...] = (SINGLE, FSDP)
    """Processes and strategy."""
    sections: dict[str, Any] = field(default_factory=dict)
    """What the recipe says besides."""
    steps: int = FEW
    damage: bool = False
    """Start once before, and flip a byte of the packed base which that start left."""

    @property
    def rows(self) -> str:
        """First part of the names of the row files."""
        if self.model.startswith("bert"):
            return "labelled"
        objective = self.sections.get("objective", "sft")
        return {"sft": "completion", "kto": "judged"}.get(objective, "pair")


def _cases() -> dict[str, Case]:
    nf4, none = {"quantization": "nf4"}, {"quantization": "none"}
    dropout = {"model": {"dropout": "as-configured"}}
    dropping = Case("gpt2-dropout", (SINGLE,), none | dropout, steps=5)
    lora = {"rslora": {"rslora": True}, "dora": {"dora": True}, "all-biases": {"bias": "all"},
            "lora-biases": {"bias": "lora_only"}, "rank-1": {"rank": 1},
            "two-targets": {"targets": ["q_proj", "down_proj"]}}  # fmt: skip
    # In short, what is sharded in 4 bits stands for what is sharded as it is.
    cases = {
        f"{architecture}-{name}": Case(architecture, engines, sections, steps=5)
        for architecture in ARCHITECTURES
        for name, sections, engines in (
            ("nf4", nf4, (SINGLE, FSDP)),
            ("none", none, (SINGLE, FSDP)[: some(1, 2)]),
        )
    }
    everywhere = (SINGLE, FSDP, DDP, HSDP)
    cases["llama-nf4"] = Case("llama", everywhere, nf4, steps=20)
    cases["llama-none"] = Case("llama", everywhere[: some(2, 4)], none, steps=20)
    cases["bert-nf4"] = Case("bert", (SINGLE, FSDP, DDP), nf4)
    cases |= {
        f"padded-{architecture}": Case(
            architecture,
            (SINGLE,),
            none | {"data": {"packing": False}},
            steps=cases[f"{architecture}-none"].steps,
        )
        for architecture in ARCHITECTURES
        if architecture != "bert"
    }
    cases |= {
        f"{option}-{name}": Case(
            "qwen2",
            (SINGLE, FSDP, DDP)[: some(3 if option == "dora" else 2, 3)],
            sections | {"method": changes},
        )
        for option, changes in lora.items()
        for name, sections in (("nf4", nf4), ("none", none))[: 2 if IS_LONG else 1]
    }
    cases |= {
        "odd-nf4": Case("odd", (*everywhere, FSDP4), nf4 | {"method": {"rank": 3}}),
        "odd-none": Case(
            "odd", (SINGLE, FSDP4, *everywhere[1:])[: some(2, 5)], none | {"method": {"rank": 3}}
        ),
        "files": Case("files", sections=nf4),
        "packed-before": Case("bnb", sections=nf4),
        "packed-twice": Case("bnb-double", sections=nf4),
        "gpt2-trunk": Case("gpt2-trunk", sections=nf4, steps=5),
        "bert-trunk": Case("bert-trunk", (SINGLE, FSDP, DDP)[: some(2, 3)], none),
        "bert-trunk-nf4": Case("bert-trunk", sections=nf4),
        "half-nf4": Case("half", (SINGLE, FSDP, DDP)[: some(2, 3)], nf4),
        "half-none": Case("half", sections=none),
        "half-tied": Case("half-tied", sections=nf4),
        "damaged": Case("damaged", (SINGLE, HSDP, FSDP, DDP)[: some(2, 4)], nf4, damage=True),
        "gpt2-dora": Case("gpt2", sections=nf4 | {"method": {"dora": True}}),
        "gpt2-biases": Case("gpt2", sections=none | {"method": {"bias": "all"}}),
        "bert-biases": Case("bert", sections=none | {"method": {"bias": "all"}}),
        "accumulated": Case(
            "llama", (*everywhere, ZERO2), nf4 | {"train": {"micro_batch_size": 2}}
        ),
        **{
            f"accumulated-{reshard}": Case(
                "llama",
                (SINGLE, *RESHARDED[reshard]),
                nf4 | {"train": {"micro_batch_size": 2}, "parallel": {"reshard": reshard}},
            )
            for reshard in RESHARDED
        },
        "accumulated-dequantized": Case(
            "llama",
            (SINGLE, FSDP, ZERO2, DDP, HSDP)[: some(3, 5)],
            nf4 | {"train": {"micro_batch_size": 2}, "parallel": {"dequantized_blocks": 1}},
        ),
        "accumulated-step-dequantized": Case(
            "llama",
            (SINGLE, FSDP, HSDP)[: some(2, 3)],
            nf4
            | {
                "train": {"micro_batch_size": 2},
                "parallel": {"reshard": "step", "dequantized_blocks": 2},
            },
        ),
        "checkpointed": Case(
            "llama", (SINGLE, FSDP), nf4 | {"train": {"activation_checkpointing": True}}
        ),
        "words-tied": Case("qwen2", sections=nf4 | {"method": {"trainable_tokens": [270, 1]}}),
        "words-untied": Case("llama", sections=nf4 | {"method": {"trainable_tokens": [270, 1]}}),
        "words-head": Case("llama", sections=nf4 | {"method": {"modules_to_save": ["lm_head"]}}),
        "bfloat16-nf4": Case("llama", (SINGLE, FSDP, DDP), nf4 | {"model": {"dtype": "bfloat16"}}),
        "float16-nf4": Case(
            "llama",
            (SINGLE, FSDP, ZERO3, HSDP, DDP, ZERO2)[: some(4, 6)],
            nf4 | {"model": {"dtype": "float16"}},
        ),
        "bfloat16-none": Case("llama", sections=none | {"model": {"dtype": "bfloat16"}}),
        "three-rows": Case(
            "llama",
            (SINGLE, FSDP, FSDP4, DDP, HSDP)[: some(3, 5)],
            nf4 | {"train": {"global_batch_size": 3}},
        ),
        "tokens": Case(
            "llama",
            (SINGLE, FSDP),
            nf4 | {"train": {"global_batch_size": None, "global_batch_tokens": 90}},
        ),
        "written": Case(
            "llama",
            (SINGLE, FSDP, ZERO3, DDP, HSDP, ZERO2)[: some(3, 6)],
            nf4 | {"evaluate": {"choices": [], "sample_tokens": 5}},
            steps=20,
        ),
        "repeated": Case("llama", (SINGLE, *MATRIX_ENGINES), nf4),
        "repeated-again": Case("llama", (SINGLE, *MATRIX_ENGINES), nf4),
        "own-dropout-off": Case("gpt2-dropout", (SINGLE,), none, steps=5),
        **dict.fromkeys(("own-dropout", "own-dropout-again"), dropping),
    }
    cases |= compiled_cases() if IS_LONG else {}
    return (
        cases | objective_cases() | matrix_cases() | expert_cases() | start_cases() | muon_cases()
    )


def compiled_cases() -> dict[str, Case]:
    """Return trainings of compiled blocks, by the name of that of the same blocks as they are."""
    engines = {"lora": (SINGLE, FSDP, DDP, HSDP, ZERO2)}
    cells = [(name, "nf4", "recomputed") for name in MATRIX_METHODS] + [("lora", "none", "kept")]
    return {
        f"compiled-matrix-{name}-{quantization}-{recomputed}": Case(
            "llama",
            engines.get(name, (SINGLE, FSDP)),
            {
                "quantization": quantization,
                "method": MATRIX_METHODS[name],
                "model": {"compile": "blocks"},
                "train": {"activation_checkpointing": recomputed == "recomputed"},
            },
            steps=STEPS,
        )
        for name, quantization, recomputed in cells
    }


def start_cases() -> dict[str, Case]:
    """Return LoRAs whose start is computed from weights or from rows, on a base in shards."""
    starts = {"eva": "nf4", "loftq": "nf4", "corda": "none", "lora_ga": "none"}
    return {
        f"start-{init}": Case(
            "llama",
            (SINGLE, *STARTED[init]),
            {
                "quantization": quantization,
                "method": {"init": init, "rank": 4, "init_rows": 11},
                "train": {"activation_checkpointing": init == "lora_ga"},
            },
            steps=4,
        )
        for init, quantization in starts.items()
    }


def muon_cases() -> dict[str, Case]:
    """Return a training with Muon, whose matrices every process updates alike."""
    sections = {"quantization": "nf4", "train": {"optimizer": "muon"}, "method": {"dora": True}}
    return {"muon-lora": Case("llama", (SINGLE, FSDP, HSDP), sections)}


def expert_cases() -> dict[str, Case]:
    """Return mixtures of experts in 4 bits, whose router is trained and whose experts adapted."""
    experts = {"target_parameters": ["gate_up_proj", "down_proj"]}
    return {
        f"experts-{model_type}": Case(
            model_type,
            (SINGLE, FSDP, ZERO3, DDP, HSDP, ZERO2)[
                : some(3, 6) if model_type == MIXTURES[0] else 2
            ],
            {"quantization": "nf4", "method": experts, "train": {"micro_batch_size": 4}},
        )
        for model_type in MIXTURES
    }


def objective_cases() -> dict[str, Case]:
    """Return trainings on preferences: a few of them, or all with every method."""
    engines = (SINGLE, FSDP, DDP, ZERO3, HSDP, ZERO2)[: some(4, 6)]
    lora = {"objective": "dpo", "quantization": "nf4"}
    cases = {
        "objective-dpo-lora-nf4": Case("llama", engines, lora, steps=STEPS),
        "objective-dpo-accumulated": Case(
            "llama", (SINGLE, FSDP), lora | {"train": {"micro_batch_size": 3}}, steps=STEPS
        ),
        "objective-kto-lora-nf4": Case(
            "llama", (SINGLE, FSDP, ZERO3)[: some(2, 3)], lora | {"objective": "kto"}, steps=STEPS
        ),
        "objective-reward-lora-nf4": Case(
            "llama", (SINGLE, FSDP, ZERO3), lora | {"objective": "reward"}, steps=STEPS
        ),
    }
    if IS_LONG:
        cases |= {
            f"objective-{kind}-{name}-{quantization}": Case(
                "llama",
                engines,
                {"objective": kind, "method": method, "quantization": quantization},
                steps=STEPS,
            )
            for kind in ("dpo", "ipo", "kto", "orpo", "simpo", "reward")
            for name, method in MATRIX_METHODS.items()
            for quantization in ("none", "nf4")
            if not (kind == "reward" and name in ("prefix", "prompt"))
        }
    return cases


def matrix_cases() -> dict[str, Case]:
    """Return every method with every engine in two variants, or in all four."""
    return {
        f"matrix-{name}-{quantization}-{recomputed}": Case(
            "llama",
            (SINGLE, *MATRIX_ENGINES),
            {
                "quantization": quantization,
                "method": method,
                "train": {"activation_checkpointing": recomputed == "recomputed"},
            },
            steps=STEPS,
        )
        for name, method in MATRIX_METHODS.items()
        for quantization, recomputed in MATRIX_VARIANTS
    }


CASES = _cases()
SAVED = {
    (name, engine)
    for name, case in CASES.items()
    for engine in case.engines
    if IS_LONG
    or name.startswith(("matrix-", "repeated"))
    or engine == (FSDP if FSDP in case.engines else SINGLE)
}
"""Trainings that leave their adapter: in short, every cell's, and else that of a base in shards."""


class Recorder:
    """A tracker that keeps what the ledger would hold."""

    def __init__(self) -> None:
        """Start with none."""
        self.records: list[dict[str, Any]] = []

    def write(self, event: LedgerEvent) -> None:
        """Keep one event."""
        self.records.append(event.fields())

    def close(self) -> None:
        """Nothing is held back."""


def main(folder: Path) -> None:
    """Run every case that belongs to this number of processes."""
    world = read_world()
    process_group.start(world)
    run_cases(folder, CASES, world, SAVED)
    process_group.stop()


def run_cases(
    folder: Path,
    cases: Mapping[str, Case],
    world: World,
    saved: Container[tuple[str, str]],
) -> None:
    """Run those of some cases that belong to this number of processes."""
    for name, case in cases.items():
        for engine in case.engines:
            processes, strategy = engine.split("-")
            if int(processes) == world.size:
                run_case(folder, name, case, strategy, world, is_saved=(name, engine) in saved)


def run_case(
    folder: Path, name: str, case: Case, strategy: str, world: World, *, is_saved: bool
) -> None:
    """Train one case and leave `outcome.json` and, where that is wanted, the adapter."""
    started = time.monotonic()
    out = folder / "outcomes" / name / f"{world.size}-{strategy}"
    kind = case.rows
    size = {"steps": case.steps, "global_batch_size": 8, "micro_batch_size": 8}
    train = {**size, "learning_rate": 5e-3, **case.sections.get("train", {})}
    data = {"eval": str(folder / f"{kind}-eval.jsonl"), **case.sections.get("data", {})}
    task = "sequence-classification" if kind == "labelled" else "causal-lm"
    sections = case.sections | {
        "train": train,
        "data": data,
        "model": {"task": task, **case.sections.get("model", {})},
        "parallel": {
            "strategy": strategy,
            **({"shard_size": 2} if strategy == "hsdp" else {}),
            **case.sections.get("parallel", {}),
        },
    }
    if kind == "completion":
        sections["evaluate"] = {
            "choices": [" cat", " dog"],
            **case.sections.get("evaluate", {}),
        }
    recipe = tiny_recipe(folder / "models" / case.model, folder / f"{kind}.jsonl", **sections)
    # Caches are not shared between numbers of processes, so that what they hold can be compared.
    cache = folder / f"cache-{world.size}"
    rows = tokenize_rows(recipe, "train", cache / "rows")
    held = make_eval_set(recipe, tokenize_rows(recipe, "eval", cache / "rows"))
    warnings = _Warnings()
    logging.getLogger("peft_dist").addHandler(warnings)
    if case.damage:
        flip_a_byte(set_up_model(recipe, world, find_base(recipe, cache)))
    torch.manual_seed(world.rank)  # whatever a process did before: adapters start alike
    with slow_reader(late=case.damage and world.rank == world.size - 1):
        source = find_base(recipe, cache)
        setup = set_up_model(recipe, world, source, label_names=rows.label_names, rows=rows)
    logging.getLogger("peft_dist").removeHandler(warnings)
    # At the start: DeepSpeed keeps what it may need again soon, which of a tiny model is all.
    sharded = all(setup.engine.is_shard(parameter) for parameter in setup.base.values())
    saver = AdapterSaver(setup, rows) if is_saved else None
    reference = None
    if recipe.objective.has_reference:
        reference = reference_scores(setup, rows, cache / "reference" / strategy)
        held_scores = reference_scores(setup, held.rows, cache / "reference" / strategy)
        held = replace(held, reference=held_scores)
    before = adapter(setup)
    undisturbed = gradient(setup, rows)
    score(setup, held)
    disturbed = gradient(setup, rows)
    recorder = Recorder()
    trainer = Trainer(setup, rows, held, reference=reference)
    trainer.trackers = [recorder] if world.is_main else []
    outcome = trainer.run()
    setup.check_integrity()
    after = adapter(setup)
    experts = {name: p for name, p in setup.base.items() if ".experts." in name}
    expert_bytes = gather_objects(setup.engine.resident_bytes(experts))
    digests = gather_objects({name: fingerprint(t) for name, t in after.items()})
    nll, logits = probe(setup, rows)
    if saver is not None:
        saver.save(out / "adapter")
    if not world.is_main:
        return
    out.mkdir(parents=True, exist_ok=True)
    facts = {
        "losses": [r["loss"] for r in recorder.records if r["event"] == "step"],
        "norms": [r["grad_norm"] for r in recorder.records if r["event"] == "step"],
        "update": float(torch.cat([(after[n] - before[n]).flatten() for n in after]).norm()),
        "first": [outcome.first.loss, outcome.first.accuracy] if outcome.first else None,
        "samples": [r for r in recorder.records if r["event"] == "sample"],
        "rewards": [r["reward_margin"] for r in recorder.records if "reward_margin" in r],
        "last": [outcome.last.loss, outcome.last.accuracy] if outcome.last else None,
        "base_bytes_total": setup.base_bytes_total,
        "base_bytes_by_rank": setup.base_bytes_by_rank,
        "expert_bytes_total": setup.engine.total_bytes(experts),
        "expert_bytes_by_rank": expert_bytes,
        "base_fingerprint": setup.base_fingerprint,
        "packed_base": None if setup.packed_base is None else str(setup.packed_base),
        "packed_layers": sum(name.endswith(".packed") for name in setup.base),
        "trained": sorted(setup.adapter),
        "base_tensors": len(setup.base),
        "sharded": sharded,
        "still": [name for name in after if torch.equal(before[name], after[name])],
        "adapters_agree": all(digest == digests[0] for digest in digests),
        "gradient": float(undisturbed.abs().max()),
        "gradient_change": float((undisturbed - disturbed).abs().max()),
        "warnings": warnings.lines,
        "probe_nll": nll,
        "probe_logits": logits,
        "seconds": time.monotonic() - started,
    }
    (out / "outcome.json").write_text(json.dumps(facts), encoding="utf-8")


def flip_a_byte(setup: ModelSetup) -> None:
    """Change the packed base on disk in the last of its rows."""
    if setup.world.is_main:
        assert setup.packed_base is not None
        file = setup.packed_base / "model.safetensors"
        data = bytearray(file.read_bytes())
        data[-4] ^= 1
        file.write_bytes(data)
    barrier()


@contextmanager
def slow_reader(*, late: bool) -> Iterator[None]:
    """Let this process open the packed base after the others are through with it."""
    prompt = packed_base.WeightFiles

    def opened(folder: Path) -> WeightFiles:
        time.sleep(0.5)
        return prompt(folder)

    if late:
        packed_base.WeightFiles = opened  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        packed_base.WeightFiles = prompt  # type: ignore[misc]


class _Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def adapter(setup: ModelSetup) -> dict[str, torch.Tensor]:
    """Return a copy of every trained tensor."""
    return {name: parameter.detach().clone() for name, parameter in setup.adapter.items()}


def fingerprint(tensor: torch.Tensor) -> list[float]:
    """Return sums that differ where tensors do."""
    values = tensor.double().flatten()
    return [float(values.sum()), float((values * torch.arange(1, len(values) + 1)).sum())]


def gradient(setup: ModelSetup, rows: TokenizedRows) -> torch.Tensor:
    """Return the adapter's gradient on a few rows; leaves none behind."""
    ids = torch.arange(4).numpy() + setup.world.rank
    setup.model.train()
    with setup.autocast():
        loss = setup.model(setup.pack(rows, ids)).nll.sum()
    loss.backward()
    setup.engine.reduce(loss.detach())
    found = setup.engine.gradients.clone()
    setup.engine.zero_gradients()
    return found


def probe(setup: ModelSetup, rows: TokenizedRows) -> tuple[list[float], list[list[float]]]:
    """Return each target's loss and each row's logits on a fixed micro-batch."""
    batch = setup.pack(rows, torch.arange(PROBE_ROWS).numpy())
    setup.model.eval()
    choices = torch.arange(setup.peft.get_base_model().config.vocab_size)
    with torch.no_grad(), setup.autocast():
        losses = setup.model(batch, choices)
    assert losses.choice_logits is not None
    return losses.nll.tolist(), losses.choice_logits.tolist()


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # as a worker ends: gloo and FSDP2 can abort in the interpreter's teardown
