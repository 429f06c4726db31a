"""The objective section of a recipe: what is learned from the rows, one class per `kind`.

Each names the form of row it reads, and the figures that its steps report besides the loss.
"""

from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import BeforeValidator, Discriminator, Field, Tag

from peft_dist.config.section import NonNegativeFloat, PositiveFloat, Section

Smoothing = Annotated[float, Field(ge=0.0, lt=0.5)]
RowForm = Literal["single", "pair", "judged"]
"""single: one text per example. pair: a chosen and a rejected answer. judged: one answer with a
verdict."""

PAIR_METRICS = ("reward_chosen", "reward_rejected", "reward_accuracy")


class Sft(Section):
    """Supervised fine-tuning: the likelihood of what the row asks to train."""

    kind: Literal["sft"] = "sft"
    """What is learned."""

    rows: ClassVar[RowForm] = "single"
    metrics: ClassVar[tuple[str, ...]] = ()
    has_reference: ClassVar[bool] = False


class Dpo(Section):
    """Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290)."""

    kind: Literal["dpo"]
    """What is learned."""
    beta: PositiveFloat = 0.1
    """How strongly the model is held at its start: a reward is beta times the log-ratio to it."""
    length_normalised: bool = False
    """Whether the loss takes each log-ratio per token, so that long answers weigh no more (Lambert
    et al. 2024, arXiv 2411.15124); beta is larger then, such as 5."""
    label_smoothing: Smoothing = 0.0
    """Share of pairs that are taken to be labelled the wrong way round. 0: off."""
    sft_weight: NonNegativeFloat = 0.0
    """Weight of the chosen answers' own mean loss, nats per token, besides. 0: off."""

    rows: ClassVar[RowForm] = "pair"
    metrics: ClassVar[tuple[str, ...]] = PAIR_METRICS
    has_reference: ClassVar[bool] = True


class Ipo(Section):
    """Identity preference optimisation (Azar et al. 2023, arXiv 2310.12036), per token."""

    kind: Literal["ipo"]
    """What is learned."""
    beta: PositiveFloat = 0.1
    """The paper's tau: the log-ratios per token of a pair are drawn to 1 / (2 beta) apart."""
    sft_weight: NonNegativeFloat = 0.0
    """Weight of the chosen answers' own mean loss, nats per token, besides. 0: off."""

    rows: ClassVar[RowForm] = "pair"
    metrics: ClassVar[tuple[str, ...]] = PAIR_METRICS
    has_reference: ClassVar[bool] = True


class Kto(Section):
    """Kahneman-Tversky optimisation (Ethayarajh et al. 2024, arXiv 2402.01306)."""

    kind: Literal["kto"]
    """What is learned."""
    beta: PositiveFloat = 0.1
    """How strongly the model is held at its start: a reward is beta times the log-ratio to it."""
    desirable_weight: PositiveFloat = 1.0
    """Weight of the answers with label true."""
    undesirable_weight: PositiveFloat = 1.0
    """Weight of the answers with label false."""

    rows: ClassVar[RowForm] = "judged"
    metrics: ClassVar[tuple[str, ...]] = ("reward_chosen", "reward_rejected", "kl")
    has_reference: ClassVar[bool] = True


class Orpo(Section):
    """Odds-ratio preference optimisation (Hong et al. 2024, arXiv 2403.07691); no reference."""

    kind: Literal["orpo"]
    """What is learned."""
    beta: PositiveFloat = 0.1
    """The paper's lambda: weight of the odds-ratio term beside the chosen answers' mean loss."""

    rows: ClassVar[RowForm] = "pair"
    metrics: ClassVar[tuple[str, ...]] = PAIR_METRICS
    has_reference: ClassVar[bool] = False


class Simpo(Section):
    """Simple preference optimisation (Meng et al. 2024, arXiv 2405.14734); no reference."""

    kind: Literal["simpo"]
    """What is learned."""
    beta: PositiveFloat = 2.0
    """Scale of a reward, which is beta times the mean log-likelihood per token."""
    gamma: NonNegativeFloat = 0.5
    """Margin by which the chosen reward is to exceed the rejected one."""
    label_smoothing: Smoothing = 0.0
    """Share of pairs that are taken to be labelled the wrong way round. 0: off."""
    sft_weight: NonNegativeFloat = 0.0
    """Weight of the chosen answers' own mean loss, nats per token, besides. 0: off."""

    rows: ClassVar[RowForm] = "pair"
    metrics: ClassVar[tuple[str, ...]] = PAIR_METRICS
    has_reference: ClassVar[bool] = False


class Reward(Section):
    """A reward model: a new head of one number (Bradley-Terry, as in arXiv 2203.02155)."""

    kind: Literal["reward"]
    """What is learned."""
    center: NonNegativeFloat = 0.0
    """Weight of the squared sum of a pair's rewards, which holds them around 0. 0: off."""

    rows: ClassVar[RowForm] = "pair"
    metrics: ClassVar[tuple[str, ...]] = PAIR_METRICS
    has_reference: ClassVar[bool] = False


def _kind(section: Any) -> Any:
    if isinstance(section, dict):
        return section.get("kind", "sft")
    return getattr(section, "kind", None)


def _spelled_out(section: Any) -> Any:
    return {"kind": section} if isinstance(section, str) else section


_Sections: TypeAlias = Annotated[
    Annotated[Sft, Tag("sft")]
    | Annotated[Dpo, Tag("dpo")]
    | Annotated[Ipo, Tag("ipo")]
    | Annotated[Kto, Tag("kto")]
    | Annotated[Orpo, Tag("orpo")]
    | Annotated[Simpo, Tag("simpo")]
    | Annotated[Reward, Tag("reward")],
    Discriminator(_kind),
]
Kind = Literal["sft", "dpo", "ipo", "kto", "orpo", "simpo", "reward"]
Objective: TypeAlias = Annotated[
    _Sections, BeforeValidator(_spelled_out, json_schema_input_type=Kind | _Sections)
]
"""A section, or the name of its kind alone."""
Preference: TypeAlias = Dpo | Ipo | Kto | Orpo | Simpo
