"""Put a run's model together on one process: base, adapter and engine, proven to be sharded.

The order is what makes it right: build on `meta`, swap linears, attach adapters, shard, and only
then read the rows that belong here. Trains nothing.
"""

import logging
import os
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn
from torch.distributed.tensor import DTensor

from peft_dist import dist
from peft_dist.config import Recipe
from peft_dist.errors import ModelError, TrainingError
from peft_dist.methods import METHODS
from peft_dist.methods.init import assign, generator_for
from peft_dist.model import architectures, attention, base, cache
from peft_dist.model.base import BasePlan
from peft_dist.model.heads import CausalLM, SequenceClassifier
from peft_dist.model.weights import WeightFiles, model_folder
from peft_dist.shard import ENGINES, Engine
from peft_dist.shard.launched import resolve

log = logging.getLogger(__name__)

_HEADS = {"causal-lm": CausalLM, "sequence-classification": SequenceClassifier}


@dataclass
class Session:
    """A loaded, sharded model with its adapters."""

    recipe: Recipe
    world: dist.World
    strategy: str
    engine: Engine
    model: nn.Module
    peft: PeftModel
    compute_dtype: torch.dtype
    base: dict[str, nn.Parameter]
    adapter: dict[str, nn.Parameter]
    base_bytes_total: int
    base_bytes_by_rank: list[int]
    base_fingerprint: dict[str, int]
    packed_base: Path | None
    load_seconds: float

    @property
    def packing(self) -> bool:
        """Say whether the rows of a micro-batch are laid end to end."""
        packing = self.recipe.data.packing
        return self.recipe.model.task == "causal-lm" if packing is None else packing

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context every pass runs in: adapters are float32, the base may be less."""
        device = self.world.device.type
        return torch.autocast(device, torch.bfloat16, self.compute_dtype == torch.bfloat16)

    def check_integrity(self) -> None:
        """Hash the base again and compare, and the adapter over processes. Collective.

        Raises:
            TrainingError: Naming the first tensor that changed.
        """
        now = base.live_fingerprint(self.base, self.engine.shard)
        changed = [name for name, value in self.base_fingerprint.items() if now[name] != value]
        if changed:
            raise TrainingError(
                f"{len(changed)} frozen tensors changed in training, {changed[0]} first",
                remedy="the adapter is not to be trusted; please report this",
            )
        self.check_adapters_agree()

    def check_adapters_agree(self) -> None:
        """Compare the adapter over processes, to the bit. Collective.

        Raises:
            TrainingError: Where one has drifted: its gradients were not reduced.
        """
        if not self.engine.adapters_agree():
            raise TrainingError(
                "the processes hold different adapters", remedy="please report this"
            )


def compute_dtype(recipe: Recipe, device: torch.device) -> torch.dtype:
    """Return the dtype a recipe computes in on this device."""
    if recipe.model.dtype != "auto":
        return getattr(torch, recipe.model.dtype)
    on_gpu = device.type == "cuda" and torch.cuda.is_bf16_supported()
    # Without matrix units for it, bfloat16 is slower than float32 on a CPU.
    return torch.bfloat16 if on_gpu else torch.float32


def _attention(recipe: Recipe, device: torch.device, dtype: torch.dtype) -> str:
    if recipe.model.attention != "auto" or device.type != "cuda" or dtype == torch.float32:
        return recipe.model.attention
    from transformers.utils import is_flash_attn_2_available

    return "flash_attention_2" if is_flash_attn_2_available() else "auto"


@dataclass(frozen=True)
class BaseSource:
    """Where the base comes from."""

    files: WeightFiles
    entry: Path | None
    """Where its packed form belongs in the cache; None where it has none of its own."""


def find_base(recipe: Recipe, cache_dir: Path) -> BaseSource:
    """Download the model where it is not local, and hash it for the cache.

    Both can take minutes, so call it before the process group exists.

    Raises:
        ModelError: Where there is no such model, or a file of it is broken.
    """
    files = WeightFiles(model_folder(recipe.model.name, recipe.model.revision))
    packs = recipe.quantization == "nf4" and not files.packed
    return BaseSource(files, cache.entry_folder(cache_dir, files) if packs else None)


def open_session(
    recipe: Recipe, world: dist.World, source: BaseSource, *, label_names: tuple[str, ...] = ()
) -> Session:
    """Build, shard and load the model. Collective.

    Args:
        recipe: The run's recipe.
        world: This process's place.
        source: What `find_base` found.
        label_names: Class names, for sequence classification.

    Raises:
        PeftDistError: For a model, launcher or option that cannot work; before weights are read
            wherever that can be known.
    """
    started = time.monotonic()
    launched = resolve(recipe.parallel, world, os.environ)
    dtype = compute_dtype(recipe, world.device)
    config = architectures.read_config(source.files.folder, task=recipe.model.task)
    skeleton = architectures.build_skeleton(
        config,
        task=recipe.model.task,
        dtype=dtype,
        attention=_attention(recipe, world.device, dtype),
        label_names=label_names,
    )
    if recipe.model.task == "causal-lm" and skeleton.config._attn_implementation == "sdpa":
        attention.register()
        skeleton.set_attn_implementation(attention.ROW_ATTENTION)
    has_conv1d = architectures.has_conv1d(skeleton)
    plan = base.plan_base(skeleton, source.files, quantization=recipe.quantization)
    if world.is_main:
        for warning in plan.warnings:
            log.warning(warning)
    blocks = list(architectures.transformer_blocks(skeleton).values())
    if recipe.train.activation_checkpointing:
        skeleton.gradient_checkpointing_enable({"use_reentrant": False})
    peft = METHODS[recipe.method.kind].attach(
        skeleton,
        recipe.method,
        task=recipe.model.task,
        base_name=recipe.model.name,
        has_conv1d=has_conv1d,
    )
    model = _HEADS[recipe.model.task](peft)
    engine = ENGINES[launched.strategy](world, shard_size=launched.shard_size)
    engine.wrap(model, blocks, [p for p in model.parameters() if p.requires_grad])
    base.materialize(model, world.device)

    frozen, trained = _split(peft)
    packed = _load_base(frozen, trained, plan, source, engine)
    _initialise_adapter(peft, frozen, trained, plan, recipe, engine)
    engine.hold_adapter(trained)
    total, by_rank = _prove_sharded(engine, frozen, trained, launched.strategy)
    session = Session(
        recipe=recipe,
        world=world,
        strategy=launched.strategy,
        engine=engine,
        model=model,
        peft=peft,
        compute_dtype=dtype,
        base=frozen,
        adapter=trained,
        base_bytes_total=total,
        base_bytes_by_rank=by_rank,
        base_fingerprint=base.live_fingerprint(frozen, engine.shard),
        packed_base=packed,
        load_seconds=time.monotonic() - started,
    )
    session.check_adapters_agree()
    return session


def base_name(name: str) -> str:
    """Return the name a parameter has in the bare model, given its name in the PEFT model."""
    for inserted in ("base_layer.", "original_module.", "modules_to_save.default."):
        name = name.replace(inserted, "")
    return name.removeprefix("base_model.model.")


def _split(peft: PeftModel) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    frozen: dict[str, nn.Parameter] = {}
    trained: dict[str, nn.Parameter] = {}
    for name, parameter in peft.named_parameters():
        (trained if parameter.requires_grad else frozen)[name] = parameter
    return frozen, trained


def _load_base(
    frozen: dict[str, nn.Parameter],
    trained: dict[str, nn.Parameter],
    plan: BasePlan,
    source: BaseSource,
    engine: Engine,
) -> Path | None:
    """Fill every parameter that the files hold; return the cache entry that holds them, if any.

    Of these some may be trained: biases, and the trained copy of a head. Collective.
    """
    # Of a head and its trained copy, both have one name in the files; the frozen one is filled.
    by_name = {base_name(name): parameter for name, parameter in {**trained, **frozen}.items()}
    device = engine.world.device
    packed = None
    if source.entry is None:
        base.fill_base(by_name, plan, source.files, engine.shard, device=device)
    else:
        packed = cache.fill_through_cache(
            by_name, plan, source.files, engine.shard, world=engine.world, entry=source.entry
        )
    for name, parameter in trained.items():
        twin = by_name.get(base_name(name))
        if twin is not None and twin is not parameter:
            base.copy_rows(parameter, twin.full_tensor() if isinstance(twin, DTensor) else twin)
    return packed


def _initialise_adapter(
    peft: PeftModel,
    frozen: dict[str, nn.Parameter],
    trained: dict[str, nn.Parameter],
    plan: BasePlan,
    recipe: Recipe,
    engine: Engine,
) -> None:
    """Fill what no file holds: heads the checkpoint lacks, and the adapter. Collective."""
    std = getattr(peft.get_base_model().config, "initializer_range", 0.02)
    for name, parameter in {**frozen, **trained}.items():
        plain = base_name(name)
        if plain in plan.fresh:
            full = torch.zeros(parameter.shape)
            if parameter.dim() > 1:
                full.normal_(std=std, generator=generator_for(recipe.train.seed, plain))
            assign(parameter, full, engine.shard)
    method = METHODS[recipe.method.kind]
    method.initialise(peft, recipe.method, seed=recipe.train.seed, shard=engine.shard)


def _prove_sharded(
    engine: Engine,
    frozen: dict[str, nn.Parameter],
    trained: dict[str, nn.Parameter],
    strategy: str,
) -> tuple[int, list[int]]:
    """Count the bytes every rank holds and refuse to train where they are not what they must be.

    Silent replication is how sharded fine-tuning usually fails: finite loss, no error, no memory
    saved. Collective.
    """
    for name, parameter in {**frozen, **trained}.items():
        sharded = engine.sharded and name in frozen
        if parameter.is_meta or isinstance(parameter, DTensor) != sharded:
            raise TrainingError(
                f"{name} is not placed as strategy {strategy} says",
                where="parallel.strategy",
                remedy="please report this",
            )
    expected = dist.gather_objects(engine.expected_bytes(frozen))
    held = dist.gather_objects(engine.held_bytes(frozen))
    wrong = [rank for rank, (e, h) in enumerate(zip(expected, held, strict=True)) if e != h]
    if wrong:
        rank = wrong[0]
        raise TrainingError(
            f"rank {rank} holds {held[rank]} bytes of the base, {expected[rank]} expected",
            where="parallel.strategy",
            remedy="please report this",
        )
    if not trained:
        raise ModelError("nothing to train", where="method", remedy="choose other targets")
    return sum(p.numel() * p.element_size() for p in frozen.values()), held
