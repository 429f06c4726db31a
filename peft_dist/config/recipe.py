"""The recipe: every setting of a run, its meaning, unit and default.

Numbers that follow from a recipe and a placement are functions elsewhere. The docstring under a
field is its text in the JSON Schema.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, field_validator, model_validator

from peft_dist.config.data import Data
from peft_dist.config.method import Lora, Method
from peft_dist.config.objective import Objective, Sft
from peft_dist.config.parallel import Parallel
from peft_dist.config.run_sections import Checkpoint, Profile, Tracking, Watchdog
from peft_dist.config.section import Fraction, NonNegativeFloat, PositiveFloat, Section, Text


class Model(Section):
    """The frozen base."""

    name: Text
    """Folder with config.json and safetensors files (relative to the recipe), or a hub id."""
    revision: Text | None = None
    """Branch, tag or commit of a hub model. Off: the hub's default branch."""
    task: Literal["causal-lm", "sequence-classification"] = "causal-lm"
    """What the model is trained to do; classification trains a new head beside the adapter."""
    dropout: Literal["off", "as-configured"] = "off"
    """Dropout of the base itself, as its config.json has it (GPT-2, OPT, BERT: 0.1); that of an
    adapter is `method.dropout`."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Compute dtype and dtype of unquantized base weights. auto: bfloat16 on GPUs that have it and
    do not emulate it and on processors with AVX512_BF16 or AMX, float16 on other GPUs, float32 on
    other processors; a run goes on in what it began in. In float16 the loss is scaled by a power of
    two, which is halved where gradients overflow; such a step is left out."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    """Attention kernel. auto: torch's own flash kernels on a GPU that has them, in one call for all
    rows; for models that cap their scores torch's flex attention there, which is compiled in a
    first start, or row by row without a compiler; else what the architecture supports."""
    compile: Literal["auto", "off", "blocks"] = "off"
    """Whether transformer blocks are compiled by torch for passes that train: half the kernels, and
    less memory read and written between products, for a minute or so of compiling in a first start.
    What is compiled is kept in the cache folder. auto: on GPUs, but not with zero3; off without
    GPUs. blocks: everywhere, but with zero3; on a CPU with padded rows alone. A model whose blocks
    do not compile, or compute something else then, runs as it is, and says so. What an adapter
    drops is compiled in the first step, and drawn otherwise than without."""
    fp8: bool = False
    """Whether frozen linears of the blocks multiply in FP8, forward and for the gradients of what
    they are given, from weights of 4 bits or of bfloat16: products in half the time on cards that
    have them (L4, H100 and later), and other rounding, 4 % of each. Adapters stay as they are."""


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
    micro_batch_size: PositiveInt | Literal["auto"] = 4
    """Most rows per process and pass; accumulation follows from it. Memory grows with it. auto:
    what `peft-dist plan` finds fastest of what fits, written into the run's recipe; 4 without
    GPUs."""
    learning_rate: PositiveFloat | None = None
    """Peak learning rate. Default: what suits the method (lora 2e-4, bottleneck 1e-3, prefix and
    prompt 3e-2, bitfit 1e-2, peft 1e-3)."""
    warmup_fraction: Fraction = 0.05
    """Share of all steps in which the learning rate rises linearly from 0. 0: off."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning rate after warm-up: decay to 0, or stay."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw, or muon: orthogonalised updates of the adapter's matrices, with AdamW's learning
    rates, and AdamW for its vectors; not with zero2 and zero3."""
    weight_decay: NonNegativeFloat = 0.0
    """Decay of adapter matrices; biases and other vectors never decay. 0: off."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """AdamW moment decay rates; the first one is Muon's momentum too."""
    epsilon: PositiveFloat = 1e-8
    """AdamW denominator term; Muon's smallest norm of a matrix."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Clip the global gradient norm to this. 0: off."""
    activation_checkpointing: bool | Literal["auto"] = False
    """Recompute each block in backward: less memory, about a third more time. auto: where
    `peft-dist plan` finds that it must be; off without GPUs."""
    non_finite: Literal["skip", "rollback", "stop"] = "skip"
    """What happens where loss or gradient is not finite; the adapter is never updated with it.
    skip: leave the step out. rollback: go back to the newest checkpoint's adapter, and on with the
    rows after the step. stop: end the run."""
    max_skipped_steps: Annotated[int, Field(ge=0)] = 10
    """Steps in a row that may be skipped or rolled back before the run ends."""
    deterministic: bool = False
    """On GPUs, use only kernels whose sums come in the same order every time, so that the same
    recipe on as many GPUs of the same kind gives the same bits, and a resumed run those of one
    that was not interrupted; slower. On CPUs that is so anyway."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of adapter initialisation, row order and dropout."""

    @field_validator("optimizer", mode="before")
    @classmethod
    def _schedule_free_is_told_why(cls, value: object) -> object:
        if isinstance(value, str) and value.lower().replace("_", "").startswith("schedulefree"):
            raise ValueError(
                f"{value} is not offered: it trains at other weights than those that are scored "
                "and saved; set adamw with schedule: constant, or muon"
            )
        return value

    @model_validator(mode="after")
    def _one_length_and_one_batch(self) -> Self:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("steps and epochs are both given; keep one of them")
        if self.global_batch_size is not None and self.global_batch_tokens is not None:
            raise ValueError("global_batch_size and global_batch_tokens are both given; keep one")
        return self


class Evaluate(Section):
    """Scoring on `data.eval`, done after the last step, and before the first one."""

    at_start: bool = True
    """Whether to score the base before the first step, for the comparison with what training made
    of it; that takes as long as the scoring at the end."""
    every_steps: PositiveInt | None = None
    """Steps between evaluations. Off: only before (`at_start`) and after training."""
    choices: Annotated[tuple[Text, ...], Field(max_length=1024)] = ()
    """Completions to choose from, such as [" animal", " plant"]; accuracy is the share of rows
    whose own completion is the most likely of them. Empty: loss only."""
    max_rows: PositiveInt | None = None
    """Rows to score. Default: all."""
    samples: Annotated[int, Field(ge=0, le=100)] = 4
    """Held-out rows, evenly spaced, whose prediction is noted before the first step and after the
    last one: the likeliest choice or class, or what the model writes on. They are rows of yours:
    they stay in the run directory and in its report, and are never sent to W&B. 0: off."""
    sample_tokens: Annotated[int, Field(ge=1, le=1024)] = 24
    """Most tokens that the model writes on; each costs a pass over the `samples` rows. Nothing is
    written where there are choices or classes."""
    micro_batch_size: PositiveInt = 16
    """Rows per process and pass."""

    @model_validator(mode="after")
    def _choices_differ(self) -> Self:
        if len(self.choices) == 1 or len(set(self.choices)) != len(self.choices):
            raise ValueError(f"choices must be two or more different texts, got {self.choices!r}")
        return self


class Recipe(Section):
    """One fine-tuning run."""

    model: Model
    """The frozen base."""
    quantization: Literal["none", "nf4"] = "nf4"
    """Storage of the linears inside the blocks: 4-bit NormalFloat, or as in the model file."""
    method: Method = Lora()
    """The adapter."""
    objective: Objective = Sft()
    """What is learned from the rows."""
    data: Data
    """The rows."""
    train: Train = Train()
    """The optimisation."""
    evaluate: Evaluate = Evaluate()
    """Scoring during training."""
    parallel: Parallel = Parallel()
    """How processes share the work."""
    checkpoint: Checkpoint = Checkpoint()
    """What an interrupted run goes on from."""
    watchdog: Watchdog = Watchdog()
    """When a process is taken to hang."""
    tracking: Tracking = Tracking()
    """Where progress is shown."""
    profile: Profile = Profile()
    """Which steps are traced."""

    @property
    def rows_per_example(self) -> int:
        """How many rows are trained together: two, where answers are compared."""
        return 1 if self.objective.rows == "single" else 2

    @property
    def source_losses(self) -> int:
        """How many training sources have a loss of their own in every step; 0: none."""
        return self.data.mixed_sources if self.objective.kind == "sft" else 0

    @property
    def head(self) -> Literal["causal-lm", "sequence-classification", "reward"]:
        """What stands on the model's blocks: `model.task`, or what gives rewards instead."""
        return "reward" if self.objective.kind == "reward" else self.model.task

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        traced, last = self.profile.steps, self.train.steps
        if traced is not None and last is not None and traced[0] > last:
            raise ValueError(f"profile.steps begin at {traced[0]}, but train.steps is {last}")
        classify = self.model.task == "sequence-classification"
        if self.data.streaming:
            self._refuse_streaming()
        if self.data.truncation == "split":
            self._refuse_split()
        if classify and self.data.templates:
            raise ValueError(
                "data.template is for conversations, and sequence-classification reads none; "
                "remove it"
            )
        if classify and self.data.packing:
            raise ValueError("data.packing cannot be on for sequence-classification; remove it")
        if classify and self.method.kind == "prefix":
            raise ValueError("method prefix is for causal-lm; encoders have no past to put it in")
        init = getattr(self.method, "init", "")
        if self.quantization != "none" and getattr(self.method, "splits_weight", False):
            raise ValueError(
                f"method.init {init} splits the full weights; "
                "set quantization: none, or another init"
            )
        kept = self.parallel.dequantized_blocks
        if kept not in ("auto", 0) and self.quantization == "none":
            raise ValueError(
                f"parallel.dequantized_blocks {kept} is for a base in 4 bits; remove it"
            )
        # Each has its own way to multiply by a weight.
        ways = {
            f"parallel.dequantized_blocks {kept}": kept not in ("auto", 0),
            "method.fused auto": getattr(self.method, "fused", "off") != "off",
            "model.fp8": self.model.fp8,
        }
        if len(both := [name for name, is_on in ways.items() if is_on]) > 1:
            raise ValueError(f"{both[0]} and {both[1]} exclude each other; keep one of them")
        if init == "loftq" and self.quantization == "none":
            raise ValueError("method.init loftq is for a base in 4 bits; set quantization: nf4")
        if init == "lora_ga" and self.objective.kind != "sft":
            raise ValueError(
                "method.init lora_ga takes the gradient of objective sft; choose another init"
            )
        if self.train.optimizer == "muon" and self.parallel.strategy in ("zero2", "zero3"):
            raise ValueError(
                f"train.optimizer muon needs whole matrices, which {self.parallel.strategy} shares "
                "out in pieces; set parallel.strategy: ddp or fsdp"
            )
        if classify and self.objective.kind != "sft":
            raise ValueError(
                f"objective {self.objective.kind} is for causal-lm; set objective: {{kind: sft}}"
            )
        if self.objective.kind == "reward" and self.method.kind in ("prompt", "prefix"):
            raise ValueError(
                f"objective reward is not for method {self.method.kind}, with which transformers"
                " reads the reward at another token; set another method"
            )
        if self.objective.kind != "sft" and self.evaluate.choices:
            raise ValueError(
                f"evaluate.choices is for objective sft; {self.objective.kind} compares the answers"
                " of its rows"
            )
        if classify and self.evaluate.choices:
            raise ValueError("evaluate.choices is for causal-lm; classification has its labels")
        if (self.evaluate.every_steps or self.evaluate.choices) and self.data.eval is None:
            raise ValueError("evaluate needs held-out rows; set data.eval")
        if self.checkpoint.keep_best and self.evaluate.every_steps is None:
            raise ValueError(
                "checkpoint.keep_best needs held-out losses; set evaluate.every_steps and data.eval"
            )
        return self

    def _refuse_split(self) -> None:
        """Refuse, beside `data.truncation: split`, what takes every row as a whole."""
        whole = {
            f"model.task {self.model.task}": self.model.task == "sequence-classification",
            f"objective {self.objective.kind}": self.objective.kind != "sft",
            "evaluate.choices": bool(self.evaluate.choices),
        }
        for what, is_set in whole.items():
            if is_set:
                raise ValueError(f"{what} takes rows whole; set data.truncation: end or drop")

    def _refuse_streaming(self) -> None:
        """Refuse, beside `data.streaming`, what takes a look at all rows before training."""
        data, objective, remedy = self.data, self.objective.kind, "remove it"
        if data.held_out is not None:
            what, remedy = f"data.eval {data.eval}", "name a file of held-out rows"
        elif data.max_bad_rows:
            what = "data.max_bad_rows"
        elif self.train.global_batch_tokens is not None:
            what, remedy = "train.global_batch_tokens", "set global_batch_size"
        elif self.model.task == "sequence-classification":
            what, remedy = f"model.task {self.model.task}", "set streaming: false"
        elif self.objective.has_reference:
            what, remedy = f"objective {objective}", "set streaming: false"
        else:
            return
        raise ValueError(
            f"{what} takes a look at all rows before training, and data.streaming has none; "
            f"{remedy}"
        )
