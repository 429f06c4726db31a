"""The method section of a recipe: one class per adapter family, chosen by `kind`.

Each has the learning rate that it learns with where a recipe gives none.
"""

import re
from typing import Annotated, Any, ClassVar, Literal, Self, TypeAlias

from pydantic import ConfigDict, Discriminator, Field, PositiveInt, Tag, model_validator

from peft_dist.config.section import Fraction, PositiveFloat, Section, Text

Targets = Literal["all-linear"] | Annotated[tuple[Text, ...], Field(min_length=1)]


_HUB_ADAPTER = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@(\w[\w./-]*))?")


def hub_adapter(named: str) -> tuple[str, str | None] | None:
    """Return id and revision of an adapter on the hub; None for what can be a path alone."""
    found = _HUB_ADAPTER.fullmatch(named)
    return None if found is None else (found[1], found[2])


class _Adapter(Section):
    """What every adapter family has."""

    start_from: Text | None = None
    """Run directory, checkpoint or adapter folder whose adapter training starts from (relative to
    the recipe), or a hub id such as ORG/NAME or ORG/NAME@REVISION; it must be one that the same
    settings make. Off: a new one."""


class Lora(_Adapter):
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685)."""

    kind: Literal["lora"] = "lora"
    """The adapter family."""
    rank: PositiveInt = 8
    """Rank r of every update; adapter bytes grow with it."""
    alpha: PositiveFloat = 16.0
    """The update is scaled by alpha / rank (alpha / sqrt(rank) with rslora)."""
    dropout: Fraction = 0.0
    """Probability of dropping an adapter input. 0: off."""
    targets: Targets = "all-linear"
    """Names of the linears to adapt, such as [q_proj, v_proj]; all-linear: every linear inside
    the transformer blocks."""
    target_parameters: tuple[Text, ...] = ()
    """Names of the experts' parameters to adapt too, such as [gate_up_proj, down_proj]: every
    expert gets a LoRA of its own. Empty: experts stay as they are."""
    exclude_modules: tuple[Text, ...] = ()
    """Linears of `targets` to leave out: names such as o_proj, or ends such as 0.mlp.up_proj."""
    layers_to_transform: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Numbers of the transformer blocks to adapt, from 0. Empty: all."""
    rank_pattern: dict[Text, PositiveInt] = {}
    """Another rank for some linears, by name or by the end of it: {q_proj: 32}."""
    alpha_pattern: dict[Text, PositiveFloat] = {}
    """Another alpha for some linears, in the same way."""
    modules_to_save: tuple[Text, ...] = ()
    """Modules that are trained whole and saved beside the LoRA, by name or the end of it, such as
    [embed_tokens, lm_head]; every process holds them and their moments in float32. What the base
    ties stays tied."""
    trainable_tokens: tuple[Annotated[int, Field(ge=0)] | Text, ...] = ()
    """Tokens whose rows of the embedding, and of a head that is not tied to it, are trained: ids,
    or tokens such as "<|tool|>"."""
    init: Literal[
        "default",
        "gaussian",
        "orthogonal",
        "eva",
        "loftq",
        "pissa",
        "olora",
        "corda",
        "corda_kpm",
        "lora_ga",
    ] = "default"
    """Start of A and B. default: A Kaiming-uniform, B zero. gaussian: A normal / rank, B zero.
    orthogonal: A and B orthogonal to each other. eva: A the directions in which a layer's inputs
    vary most, B zero (arXiv 2410.07170). On a base in 4 bits only, loftq: the largest part of what
    4 bits have lost of each weight (arXiv 2310.08659). On an unquantized base only, pissa: the
    principal part of each weight (arXiv 2404.02948); olora: the first part of its QR decomposition
    (arXiv 2406.01775); corda, corda_kpm: its part that matters most, or least, for a layer's inputs
    (arXiv 2406.05223); lora_ga: directions of its first gradient (arXiv 2407.05000)."""
    init_rows: PositiveInt = 256
    """Training rows, or pairs, that init eva, corda, corda_kpm and lora_ga look at, at every start:
    so many forward passes, more than once where the model is large."""
    learning_rate_ratio: PositiveFloat = 1.0
    """Learning rate of B over that of A (LoRA+, arXiv 2402.12354). 1: the same."""
    rslora: bool = False
    """Rank-stabilised scaling (arXiv 2312.03732)."""
    dora: bool = False
    """Weight-decomposed updates (arXiv 2402.09353); dequantizes each weight once more per pass."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases of the base are trained too."""
    fused: Literal["off", "auto"] = "off"
    """Whether, on a GPU, B A is added to a 4-bit weight while that is dequantized, and not to the
    layer's output: less memory read and written, fewer kernels, other rounding. auto: in passes of
    so many tokens that it pays, where a start finds the values right."""
    extra: dict[Text, Any] = {}
    """Fields of PEFT's LoraConfig that have no key here, such as {lora_bias: true}, and that
    leave the adapter a plain LoRA."""

    default_learning_rate: ClassVar[float] = 2e-4

    @model_validator(mode="after")
    def _start_from_the_weight_is_plain(self) -> Self:
        if self.dora and (self.splits_weight or self.init == "loftq"):
            raise ValueError(
                f"init: {self.init} and dora both decompose the weight; keep one of them"
            )
        if self.splits_weight and (self.rank_pattern or self.alpha_pattern):
            raise ValueError(
                f"init: {self.init} takes one rank and alpha; remove rank_pattern and alpha_pattern"
            )
        return self

    @model_validator(mode="after")
    def _experts_have_a_plain_lora(self) -> Self:
        if not self.target_parameters:
            return self
        for name, used in (("dropout", self.dropout), ("dora", self.dora)):
            if used:
                raise ValueError(f"{name} has no place in a LoRA on experts; remove it")
        if self.init not in ("default", "gaussian"):
            raise ValueError(f"init: {self.init} has no place on experts; use default")
        return self

    @property
    def splits_weight(self) -> bool:
        """Whether a part of each weight is moved into the adapter."""
        return self.init in ("pissa", "olora", "corda", "corda_kpm", "lora_ga")

    @property
    def starts_from_rows(self) -> bool:
        """Whether the start depends on the training rows."""
        return self.init in ("eva", "corda", "corda_kpm", "lora_ga")


class Bottleneck(_Adapter):
    """Small networks after the sub-layers (Houlsby et al. 2019, arXiv 1902.00751)."""

    kind: Literal["bottleneck"]
    """The adapter family."""
    placement: Literal["houlsby", "pfeiffer", "parallel"] = "houlsby"
    """houlsby: after attention and after the feed-forward. pfeiffer: after the feed-forward
    (arXiv 2005.00052). parallel: beside the feed-forward, from its input to its output
    (arXiv 2110.04366)."""
    bottleneck_size: PositiveInt | None = None
    """Width inside an adapter. Default: hidden size / reduction_factor."""
    reduction_factor: PositiveInt | None = None
    """Hidden size over bottleneck width. Default: 16 where bottleneck_size is not given."""
    activation: Literal["relu", "gelu", "silu", "tanh"] = "relu"
    """Non-linearity inside an adapter."""
    residual: bool = True
    """Add an adapter's input to its output; without it the adapter replaces what it reads. Always
    on beside the feed-forward, where the sub-layer itself is what the adapter adds to."""
    dropout: Fraction = 0.0
    """Probability of dropping a value inside the bottleneck. 0: off."""

    default_learning_rate: ClassVar[float] = 1e-3

    @model_validator(mode="after")
    def _one_width(self) -> Self:
        if self.bottleneck_size is not None and self.reduction_factor is not None:
            raise ValueError("bottleneck_size and reduction_factor are both given; keep one")
        if self.placement == "parallel" and not self.residual:
            raise ValueError("residual cannot be off with placement parallel; remove it")
        return self


class _Virtual(_Adapter):
    """Tokens that are learned instead of written."""

    virtual_tokens: PositiveInt = 20
    """Learned positions in front of every row."""
    init: Literal["auto", "text", "vocabulary", "random"] = "auto"
    """What they start as. text: the tokens of `text`, repeated or cut to fit. vocabulary: tokens
    drawn by train.seed. random: small normal noise, which learns slowly. auto: text where there is
    one, else vocabulary."""
    text: Text | None = None
    """Words to start from; best a plain description of the task."""

    @model_validator(mode="after")
    def _text_has_a_use(self) -> Self:
        if self.init == "text" and self.text is None:
            raise ValueError("init: text needs a text; add it")
        if self.text is not None and self.init in ("vocabulary", "random"):
            raise ValueError(f"text is not used with init: {self.init}; remove one of them")
        return self


class Prefix(_Virtual):
    """Learned keys and values in every layer (Li and Liang 2021, arXiv 2101.00190)."""

    kind: Literal["prefix"]
    """The adapter family."""
    projection: bool = False
    """Learn through a two-layer network, which is left out of what is saved."""
    projection_size: PositiveInt | None = None
    """Width of that network. Default: the model's hidden size."""

    default_learning_rate: ClassVar[float] = 3e-2


class Prompt(_Virtual):
    """Learned embeddings in front of every row (Lester et al. 2021, arXiv 2104.08691)."""

    kind: Literal["prompt"]
    """The adapter family."""

    default_learning_rate: ClassVar[float] = 3e-2


class BitFit(_Adapter):
    """The biases alone (Ben Zaken et al. 2022, arXiv 2106.10199)."""

    kind: Literal["bitfit"]
    """The adapter family."""
    targets: Literal["all"] | Annotated[tuple[Text, ...], Field(min_length=1)] = "all"
    """Whose bias is trained: parts of layer names, such as [q_proj, mlp]; all: every layer inside
    the transformer blocks that has one."""
    add_bias: bool = False
    """Give the linears that have none a bias of zeros to train."""

    default_learning_rate: ClassVar[float] = 1e-2


class AnyPeft(_Adapter):
    """Any other method of the peft library, by its own names."""

    model_config = ConfigDict(frozen=True, extra="allow", use_attribute_docstrings=True)

    kind: Literal["peft"]
    """A method of the peft library."""
    type: Text
    """Its name there, such as IA3; every other key here goes to its configuration class."""

    default_learning_rate: ClassVar[float] = 1e-3


def _kind(section: Any) -> Any:
    if isinstance(section, dict):
        return section.get("kind", "lora")
    return getattr(section, "kind", None)


Method: TypeAlias = Annotated[
    Annotated[Lora, Tag("lora")]
    | Annotated[Bottleneck, Tag("bottleneck")]
    | Annotated[Prefix, Tag("prefix")]
    | Annotated[Prompt, Tag("prompt")]
    | Annotated[BitFit, Tag("bitfit")]
    | Annotated[AnyPeft, Tag("peft")],
    Discriminator(_kind),
]
