"""Our losses, log-likelihoods and rewards are those of TRL's trainers on the same rows."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from peft_dist.config.objective import Dpo, Ipo, Kto, Orpo, Reward, Simpo
from peft_dist.data.token_cache import TokenizedRows, tokenize_rows
from peft_dist.distributed import process_group
from peft_dist.distributed.world import read_world
from peft_dist.model.source import find_base
from peft_dist.model_setup import ModelSetup, set_up_model
from peft_dist.objective.passes import (
    JudgedPass,
    PairPass,
    RewardPass,
    Scores,
    row_scores,
    with_margin,
)
from peft_dist.objective.reference import reference_scores
from tests.tiny import save_adapter, tiny_model, tiny_recipe, write_jsonl

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
TOLERANCE = 1e-4
PAIRS = [
    {"prompt": "the cat sat on the mat and", "chosen": " the dog", "rejected": " cat"},
    {"prompt": "log:", "chosen": " the mat and the log", "rejected": " plant food person"},
    {"prompt": "on the log sat the", "chosen": " dog", "rejected": " diving ducks"},
]
JUDGED = [
    {"prompt": "the cat sat on the mat and", "completion": " the dog", "label": True},
    # TRL pairs the first prompt with the last answer, and we with the second: make them one.
    {"prompt": "log:", "completion": " cat", "label": False},
    {"prompt": "on the log sat the", "completion": " dog and the cat", "label": True},
    {"prompt": "Category", "completion": " cat", "label": False},
]


@dataclass
class Ours:
    """Our model, moved away from its start, with rows scored at that start."""

    folder: Path
    setup: ModelSetup
    rows: dict[str, TokenizedRows]
    reference: dict[str, Scores]

    def share(self, kind: str, make: Callable[..., Any], objective: Any) -> dict[str, float]:
        """Return the loss of all rows of a kind as one batch, and what is reported of it."""
        rows = self.rows[kind]
        passes = make(self.setup, rows, objective, self.reference[kind])
        examples = np.arange(rows.n_examples)
        divisor = passes.begin(examples, [examples])
        batch = self.setup.pack(rows, passes.rows(examples))
        share = passes.share(self.setup.model(batch), batch, examples)
        figures = dict(zip(passes.metrics, share.metrics.tolist(), strict=True))
        return {"loss": float(share.loss.detach()) / divisor, **with_margin(figures)}


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ours]:
    """Return our model with an adapter that has learned something, saved beside it."""
    folder = tmp_path_factory.mktemp("trl")
    tiny_model(folder / "llama", "llama")
    world = read_world()
    process_group.start(world)
    rows, reference = {}, {}
    for kind, content in (("dpo", PAIRS), ("kto", JUDGED)):
        recipe = tiny_recipe(
            folder / "llama",
            write_jsonl(folder / f"{kind}.jsonl", content),
            objective=kind,
            quantization="none",
        )
        rows[kind] = tokenize_rows(recipe, "train", folder / "rows")
    setup = set_up_model(recipe, world, find_base(recipe, folder / "cache"))
    for kind in rows:
        reference[kind] = reference_scores(setup, rows[kind], folder / "reference")
    noise = torch.Generator().manual_seed(3)
    state = {
        name: tensor + 0.1 * torch.randn(tensor.shape, generator=noise)
        for name, tensor in setup.engine.adapter_state().items()
    }
    setup.engine.load_adapter_state(state)
    save_adapter(folder / "adapter", setup.method, setup.peft, state)
    yield Ours(folder, setup, rows, reference)
    process_group.stop()


def test_a_reward_model_has_trls_loss(ours: Ours) -> None:
    folder, world = ours.folder, ours.setup.world
    recipe = tiny_recipe(
        folder / "llama", folder / "dpo.jsonl", objective="reward", quantization="none"
    )
    rows = tokenize_rows(recipe, "train", folder / "rows")
    setup = set_up_model(recipe, world, find_base(recipe, folder / "cache"))
    noise = torch.Generator().manual_seed(3)
    state = {
        name: tensor + 0.1 * torch.randn(tensor.shape, generator=noise)
        for name, tensor in setup.engine.adapter_state().items()
    }
    setup.engine.load_adapter_state(state)
    save_adapter(folder / "reward", setup.method, setup.peft, state)
    passes, examples = RewardPass(setup, rows, Reward(kind="reward", center=0.3)), np.arange(3)
    passes.begin(examples, [examples])
    batch = setup.pack(rows, passes.rows(examples))
    share = passes.share(setup.model(batch), batch, examples)
    base = AutoModelForSequenceClassification.from_pretrained(folder / "llama", num_labels=1)
    trainer = RewardTrainer(
        model=PeftModel.from_pretrained(base, str(folder / "reward"), is_trainable=True),
        args=RewardConfig(
            output_dir=str(folder / "out"), report_to="none", use_cpu=True, bf16=False,
            gradient_checkpointing=False, center_rewards_coefficient=0.3,
        ),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=AutoTokenizer.from_pretrained(folder / "llama"),
    )  # fmt: skip
    inputs = trainer.data_collator([trainer.train_dataset[row] for row in range(3)])
    loss = trainer.compute_loss(trainer.model, dict(inputs))
    assert float(share.loss.detach()) / 3 == pytest.approx(float(loss.detach()), abs=TOLERANCE)
    figures = with_margin(dict(zip(passes.metrics, share.metrics.tolist(), strict=True)))
    kept = trainer._metrics["train"]
    assert figures["reward_margin"] == pytest.approx(kept["margin"][-1], abs=TOLERANCE)
    assert figures["reward_accuracy"] == pytest.approx(kept["accuracy"][-1], abs=1e-6)
    assert abs(figures["reward_margin"]) > 0.01


def theirs(
    ours: Ours, trainer_class: Any, config_class: Any, rows: list[dict[str, Any]], **settings: Any
) -> tuple[Any, Any]:
    """Return a trainer of TRL's with our adapter, and all its rows as one batch."""
    base = AutoModelForCausalLM.from_pretrained(ours.folder / "llama")
    adapted = PeftModel.from_pretrained(base, str(ours.folder / "adapter"), is_trainable=True)
    trainer = trainer_class(
        model=adapted,
        args=config_class(
            output_dir=str(ours.folder / "out"),
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=len(rows),
            **settings,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(ours.folder / "llama"),
    )
    # TRL's reference is a copy of the adapter it was given; ours is the start, where B is zero.
    for name, parameter in trainer.model.named_parameters():
        if "lora_B.ref." in name:
            torch.nn.init.zeros_(parameter)
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(len(rows))])
    return trainer, batch


def reported(trainer: Any, name: str) -> float:
    """Return the last figure of a name that TRL would log."""
    kept = trainer._metrics if hasattr(trainer, "_metrics") else trainer._stored_metrics
    return float(kept["train"][f"rewards/{name}"][-1])


def assert_equal(found: dict[str, float], loss: Any, trainer: Any) -> None:
    assert found["loss"] == pytest.approx(float(loss.detach()), abs=TOLERANCE)
    for name, name_there in (("chosen", "chosen"), ("rejected", "rejected"), ("margin", "margins")):
        there = reported(trainer, name_there)
        assert found[f"reward_{name}"] == pytest.approx(there, abs=TOLERANCE)
    if "reward_accuracy" in found:
        assert found["reward_accuracy"] == pytest.approx(reported(trainer, "accuracies"), abs=1e-6)


def test_the_log_likelihood_of_every_answer_is_trls(ours: Ours) -> None:
    trainer, batch = theirs(ours, DPOTrainer, DPOConfig, PAIRS)
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    outputs = trainer.model(**inputs, labels=labels, fused_lm_head=True)
    rows = ours.rows["dpo"]
    packed = ours.setup.pack(rows, np.arange(rows.n_rows))
    scores = row_scores(ours.setup.model(packed), packed).view(-1, 2).T.reshape(-1)
    torch.testing.assert_close(scores, outputs.log_probs.sum(1), atol=TOLERANCE, rtol=1e-5)
    at_start = torch.tensor(ours.reference["dpo"]).view(-1, 2).T.reshape(-1)
    reference = trainer.compute_ref_log_probs(trainer.model, batch)
    torch.testing.assert_close(at_start, torch.cat(list(reference)), atol=TOLERANCE, rtol=1e-5)
    assert (scores - at_start).abs().min() > 0.01  # the adapter has moved every answer


@pytest.mark.parametrize(
    ("objective", "settings"),
    [
        (Dpo(kind="dpo", beta=0.3), {"beta": 0.3}),
        (
            Dpo(kind="dpo", beta=5.0, length_normalised=True),
            {"beta": 5.0, "loss_type": ["sigmoid_norm"]},
        ),
        (Ipo(kind="ipo", beta=0.2), {"beta": 0.2, "loss_type": ["ipo"]}),
        (
            Dpo(kind="dpo", sft_weight=0.7),
            {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7]},
        ),
    ],
    ids=["dpo", "dpo per token", "ipo", "dpo with sft"],
)
def test_dpo_and_ipo_are_trls(ours: Ours, objective: Any, settings: dict[str, Any]) -> None:
    trainer, batch = theirs(ours, DPOTrainer, DPOConfig, PAIRS, **settings)
    loss = trainer.compute_loss(trainer.model, batch)
    assert_equal(ours.share("dpo", PairPass, objective), loss, trainer)


def test_kto_is_trls(ours: Ours) -> None:
    weights = {"beta": 0.4, "desirable_weight": 1.5, "undesirable_weight": 0.8}
    trainer, batch = theirs(ours, KTOTrainer, KTOConfig, JUDGED, **weights)
    loss = trainer.compute_loss(trainer.model, batch)
    found = ours.share("kto", JudgedPass, Kto(kind="kto", **weights))
    assert_equal(found, loss, trainer)
    assert found["kl"] > 0.01  # so its part in the loss was compared
    assert found["kl"] == pytest.approx(trainer._metrics["train"]["kl"][-1], abs=TOLERANCE)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("sft_weight", [0.0, 0.5])
def test_simpo_is_trls(ours: Ours, sft_weight: float, smoothing: float) -> None:
    trainer, batch = theirs(
        ours, CPOTrainer, CPOConfig, PAIRS, loss_type="simpo", beta=1.7, simpo_gamma=0.6,
        cpo_alpha=sft_weight, label_smoothing=smoothing,
    )  # fmt: skip
    loss = trainer.compute_loss(trainer.model, batch)
    objective = Simpo(
        kind="simpo", beta=1.7, gamma=0.6, sft_weight=sft_weight, label_smoothing=smoothing
    )
    assert_equal(ours.share("dpo", PairPass, objective), loss, trainer)


def test_the_smoothing_of_dpo_is_trls(ours: Ours) -> None:
    trainer, _ = theirs(ours, CPOTrainer, CPOConfig, PAIRS, beta=0.3, label_smoothing=0.2)
    rows = ours.rows["dpo"]
    packed = ours.setup.pack(rows, np.arange(rows.n_rows))
    scores = row_scores(ours.setup.model(packed), packed)
    ratios = (scores - torch.tensor(ours.reference["dpo"])).detach()
    loss, _, _ = trainer.cpo_loss(ratios[::2], ratios[1::2])
    found = ours.share("dpo", PairPass, Dpo(kind="dpo", beta=0.3, label_smoothing=0.2))
    assert found["loss"] == pytest.approx(float(loss.mean()), abs=TOLERANCE)


def test_orpo_is_trls_with_the_likelihood_of_the_answer_alone(ours: Ours) -> None:
    # TRL's own adds the likelihood of the prompt, which no row asks to train.
    trainer, batch = theirs(ours, ORPOTrainer, ORPOConfig, PAIRS, beta=0.4)
    trainer.compute_loss(trainer.model, batch)
    chosen, rejected, *_ = trainer.concatenated_forward(trainer.model, batch)
    odds, *_ = trainer.odds_ratio_loss(chosen, rejected)
    answers, its = theirs(ours, CPOTrainer, CPOConfig, PAIRS)
    _, _, _, _, nll = answers.concatenated_forward(answers.model, its)
    found = ours.share("dpo", PairPass, Orpo(kind="orpo", beta=0.4))
    assert_equal(found, nll - odds.mean(), trainer)
