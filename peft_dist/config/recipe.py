"""The recipe: every setting of a run, its meaning, unit and default.

Models are frozen, refuse unknown keys and never change what they were given: numbers that follow
from a recipe and a placement are functions elsewhere. The docstring under a field is its text in
the JSON Schema.
"""

from typing import Annotated, Any, ClassVar, Literal, Self, TypeAlias

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    PositiveInt,
    Tag,
    model_validator,
)

NonNegativeFloat = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Text = Annotated[str, Field(min_length=1)]
Targets = Literal["all-linear"] | Annotated[tuple[Text, ...], Field(min_length=1)]


class Section(BaseModel):
    """Shared rules of every part of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Model(Section):
    """The frozen base."""

    name: Text
    """Folder with config.json and safetensors files (relative to the recipe), or a hub id."""
    revision: Text | None = None
    """Branch, tag or commit of a hub model. Off: the hub's default branch."""
    task: Literal["causal-lm", "sequence-classification"] = "causal-lm"
    """What the model is trained to do; classification trains a new head beside the adapter."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute dtype and dtype of unquantized base weights. auto: bfloat16 on GPUs that have it,
    float32 on CPU."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    """Attention kernel. auto: flash_attention_2 where installed on a GPU, else what the
    architecture supports."""


class Lora(Section):
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
    init: Literal["default", "gaussian", "orthogonal", "pissa"] = "default"
    """Start of A and B. default: A Kaiming-uniform, B zero. gaussian: A normal / rank, B zero.
    orthogonal: A and B orthogonal to each other. pissa: the principal part of each weight
    (arXiv 2404.02948), on an unquantized base only."""
    learning_rate_ratio: PositiveFloat = 1.0
    """Learning rate of B over that of A (LoRA+, arXiv 2402.12354). 1: the same."""
    rslora: bool = False
    """Rank-stabilised scaling (arXiv 2312.03732)."""
    dora: bool = False
    """Weight-decomposed updates (arXiv 2402.09353); dequantizes each weight once more per pass."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases of the base are trained too."""

    default_learning_rate: ClassVar[float] = 2e-4

    @model_validator(mode="after")
    def _pissa_is_plain(self) -> Self:
        if self.init == "pissa" and self.dora:
            raise ValueError("init: pissa and dora both decompose the weight; keep one of them")
        return self


class Bottleneck(Section):
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


class _Virtual(Section):
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


class BitFit(Section):
    """The biases alone (Ben Zaken et al. 2022, arXiv 2106.10199)."""

    kind: Literal["bitfit"]
    """The adapter family."""
    targets: Literal["all"] | Annotated[tuple[Text, ...], Field(min_length=1)] = "all"
    """Whose bias is trained: parts of layer names, such as [q_proj, mlp]; all: every layer inside
    the transformer blocks that has one."""
    add_bias: bool = False
    """Give the linears that have none a bias of zeros to train."""

    default_learning_rate: ClassVar[float] = 1e-2


class AnyPeft(Section):
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


class Data(Section):
    """The rows."""

    train: Text
    """JSONL, JSON, CSV or Parquet file or `datasets` folder (relative to the recipe), or a hub
    name."""
    eval: Text | None = None
    """Held-out rows in any form `train` takes. Off: no evaluation."""
    train_split: Text = "train"
    """Split to read where `train` is a hub name or a folder with several splits."""
    eval_split: Text = "test"
    """Split to read where `eval` is a hub name or a folder with several splits."""
    max_length: Annotated[int, Field(ge=2)] = 1024
    """Most tokens of one row; see `truncation`."""
    truncation: Literal["end", "start", "drop", "error"] = "end"
    """What happens to a longer row: cut its end, cut its start, leave it out, or stop."""
    packing: bool | None = None
    """Lay the rows of a micro-batch end to end, without padding and without attention between
    rows; the loss is the same. Default: on for causal-lm, off for classification."""
    max_bad_rows: Annotated[int, Field(ge=0)] = 0
    """Malformed rows to leave out, each reported with file and line, before stopping."""


class Train(Section):
    """The optimisation."""

    steps: PositiveInt | None = None
    """Optimizer steps. Default: as `epochs` says."""
    epochs: PositiveFloat | None = None
    """Passes over the training rows. Default: 1 where `steps` is not given."""
    global_batch_size: PositiveInt | None = None
    """Rows per optimizer step over all processes. Default: 16 where `global_batch_tokens` is not
    given."""
    global_batch_tokens: PositiveInt | None = None
    """Tokens per optimizer step over all processes: as many whole rows as fit, at least one."""
    micro_batch_size: PositiveInt = 4
    """Most rows per process and pass; accumulation follows from it. Memory grows with it."""
    learning_rate: PositiveFloat | None = None
    """Peak learning rate. Default: what suits the method (lora 2e-4, bottleneck 1e-3, prefix and
    prompt 3e-2, bitfit 1e-2, peft 1e-3)."""
    warmup_fraction: Fraction = 0.05
    """Share of all steps in which the learning rate rises linearly from 0. 0: off."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning rate after warm-up: decay to 0, or stay."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW decay of adapter matrices; biases and other vectors never decay. 0: off."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """AdamW moment decay rates."""
    epsilon: PositiveFloat = 1e-8
    """AdamW denominator term."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Clip the global gradient norm to this. 0: off."""
    activation_checkpointing: bool = False
    """Recompute each block in backward: less memory, about a third more time."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of adapter initialisation, row order and dropout."""

    @model_validator(mode="after")
    def _one_length_and_one_batch(self) -> Self:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("steps and epochs are both given; keep one of them")
        if self.global_batch_size is not None and self.global_batch_tokens is not None:
            raise ValueError("global_batch_size and global_batch_tokens are both given; keep one")
        return self


class Evaluate(Section):
    """Scoring on `data.eval`, always done before the first and after the last step."""

    every_steps: PositiveInt | None = None
    """Steps between evaluations. Off: only before and after training."""
    choices: Annotated[tuple[Text, ...], Field(max_length=1024)] = ()
    """Completions to choose from, such as [" animal", " plant"]; accuracy is the share of rows
    whose own completion is the most likely of them. Empty: loss only."""
    max_rows: PositiveInt | None = None
    """Rows to score. Default: all."""
    micro_batch_size: PositiveInt = 16
    """Rows per process and pass."""

    @model_validator(mode="after")
    def _choices_differ(self) -> Self:
        if len(self.choices) == 1 or len(set(self.choices)) != len(self.choices):
            raise ValueError(f"choices must be two or more different texts, got {self.choices!r}")
        return self


class Parallel(Section):
    """How processes share the work."""

    strategy: Literal["auto", "ddp", "fsdp", "hsdp", "zero2", "zero3"] = "auto"
    """ddp: base on every process. fsdp: base sharded over all. hsdp: sharded inside groups,
    groups are replicas. zero2: ddp with the optimizer sharded by DeepSpeed. zero3: base sharded by
    DeepSpeed too. auto: what the launcher says, else fsdp."""
    processes: PositiveInt | None = None
    """Processes in all. Default: what the launcher says, else one per GPU, else 1."""
    shard_size: PositiveInt | None = None
    """Processes per shard group, hsdp only. Default: the processes of one node."""
    offload: Literal["none", "cpu"] = "none"
    """Where this process's part of the base waits while it is not needed: on the device, or in
    host memory (fsdp, hsdp and zero3)."""

    @model_validator(mode="after")
    def _offload_needs_shards(self) -> Self:
        if self.offload != "none" and self.strategy in ("ddp", "zero2"):
            raise ValueError(
                f"offload {self.offload} is for a sharded base, not {self.strategy}; remove it"
            )
        return self

    @model_validator(mode="after")
    def _shard_size_belongs_to_hsdp(self) -> Self:
        if self.shard_size is None:
            return self
        if self.strategy not in ("hsdp", "auto"):
            raise ValueError(f"shard_size is for strategy hsdp, not {self.strategy}; remove it")
        if self.processes is not None and self.processes % self.shard_size:
            raise ValueError(
                f"shard_size {self.shard_size} does not divide processes {self.processes}"
            )
        return self


class Checkpoint(Section):
    """Copies of the adapter kept during training."""

    every_steps: PositiveInt | None = None
    """Steps between copies. Off: only the final adapter."""
    keep_last: PositiveInt = 2
    """Newest copies to keep."""


class Wandb(Section):
    """Weights & Biases, a view of the ledger that never stops training."""

    mode: Literal["disabled", "offline", "online"] = "disabled"
    """Whether and how to log."""
    project: Text = "peft-dist"
    """W&B project."""
    entity: Text | None = None
    """W&B team or user. Off: the account's default."""


class Tracking(Section):
    """Where progress is shown besides the ledger in the run directory."""

    wandb: Wandb = Wandb()
    """Weights & Biases."""


class Recipe(Section):
    """One fine-tuning run."""

    model: Model
    """The frozen base."""
    quantization: Literal["none", "nf4"] = "nf4"
    """Storage of the linears inside the blocks: 4-bit NormalFloat, or as in the model file."""
    method: Method = Lora()
    """The adapter."""
    data: Data
    """The rows."""
    train: Train = Train()
    """The optimisation."""
    evaluate: Evaluate = Evaluate()
    """Scoring during training."""
    parallel: Parallel = Parallel()
    """How processes share the work."""
    checkpoint: Checkpoint = Checkpoint()
    """Copies of the adapter kept during training."""
    tracking: Tracking = Tracking()
    """Where progress is shown."""

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        classify = self.model.task == "sequence-classification"
        if classify and self.data.packing:
            raise ValueError("data.packing cannot be on for sequence-classification; remove it")
        if classify and self.method.kind == "prefix":
            raise ValueError("method prefix is for causal-lm; encoders have no past to put it in")
        if self.quantization != "none" and getattr(self.method, "init", None) == "pissa":
            raise ValueError(
                "method.init pissa splits the full weights; set quantization: none, or another init"
            )
        if classify and self.evaluate.choices:
            raise ValueError("evaluate.choices is for causal-lm; classification has its labels")
        if (self.evaluate.every_steps or self.evaluate.choices) and self.data.eval is None:
            raise ValueError("evaluate needs held-out rows; set data.eval")
        return self
