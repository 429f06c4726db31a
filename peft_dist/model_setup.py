"""Put a run's model together on one process: base, adapter and engine, proven to be sharded.

The order is what makes it right: build on `meta`, swap linears, attach adapters, shard, and only
then read the rows that belong here. Trains nothing. A long file, so that this order can be read in
one place.
"""

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import nn

from peft_dist.common.errors import TrainingError
from peft_dist.common.paths import TOKENIZER_FILES
from peft_dist.common.screen import stage
from peft_dist.common.sizes import megabytes
from peft_dist.config import Recipe
from peft_dist.data.encode import load_tokenizer
from peft_dist.data.order import RowIds
from peft_dist.data.pack import Batch, Everyone, everyone_of, pack
from peft_dist.data.stream import TrainingRows
from peft_dist.data.token_cache import TokenizedRows
from peft_dist.distributed.world import World
from peft_dist.methods import METHODS, Method
from peft_dist.methods.base_access import LoadedBase
from peft_dist.methods.fill import fill_fresh_heads, fill_from_files, frozen_and_trained
from peft_dist.methods.fused import fuse
from peft_dist.methods.method import base_name_in
from peft_dist.methods.trained_parts import left_frozen
from peft_dist.model import architectures, attention, compiled, precision
from peft_dist.model.device_settings import set_up_device
from peft_dist.model.fitting_rows import refuse_rows_that_do_not_fit
from peft_dist.model.fp8 import linears_in_fp8, multiply_in_fp8
from peft_dist.model.loss import CausalLM, Decoder, RewardModel, SequenceClassifier
from peft_dist.model.nf4 import weights_per_element
from peft_dist.model.plan import plan_base
from peft_dist.model.proof import ProofRun, Way
from peft_dist.model.recompute import recompute_blocks
from peft_dist.model.source import BaseSource, Released
from peft_dist.model.vocabulary import untrained_rows, with_token_ids
from peft_dist.model.ways import compiles, kernel_to_build_with, prove_once, ways_of
from peft_dist.sharding import ENGINES, Engine, Group
from peft_dist.sharding.chosen_optimizer import refuse_muon
from peft_dist.sharding.dequantized import keep_dequantized, verify_dequantized
from peft_dist.sharding.launcher_env import resolve
from peft_dist.sharding.verify import verify_one_base, verify_sharded

log = logging.getLogger(__name__)

Prover = Callable[[ProofRun, list[Way], list[Any], Path], Way]

_HEADS = {
    "causal-lm": CausalLM,
    "sequence-classification": SequenceClassifier,
    "reward": RewardModel,
}


@dataclass
class ModelSetup:
    """A loaded, sharded model with its adapters."""

    recipe: Recipe
    world: World
    strategy: str
    engine: Engine
    method: Method[Any]
    model: nn.Module
    peft: PeftModel
    compute_dtype: torch.dtype
    base: dict[str, nn.Parameter]
    adapter: dict[str, nn.Parameter]
    base_bytes_total: int
    base_bytes_by_rank: list[int]
    released_fingerprint: dict[str, int]
    """Of the base as its files have it; that it trains with may be changed by the method."""
    base_fingerprint: dict[str, int]
    packed_base: Path | None
    position_table: int | None
    """Positions of the model's table, where it has one."""
    packing: bool
    """Whether the rows of a micro-batch are laid end to end."""
    load_seconds: float
    released: Released
    """What the adapter names as its base."""
    tokenizer_files: list[Path]
    """Of the tokenizer and its chat template, which are saved beside the adapter."""
    start_sha256: str | None = None
    """Of the file of the adapter that training starts from; None for a new one."""

    @property
    def base_parameters(self) -> int:
        """Return how many parameters the base has, however they are stored."""
        return sum(
            self.engine.shape(parameter).numel() * weights_per_element(name)
            for name, parameter in self.base.items()
        )

    def everyone(
        self, rows: TokenizedRows, shares: Sequence[Sequence[RowIds]]
    ) -> Sequence[Everyone | None]:
        """Return what `pack` is told of each micro-batch, where all processes know all shares.

        It takes time for each process there is, so nothing is found out that nobody asks for.

        Args:
            rows: All rows.
            shares: Row ids by process and micro-batch.
        """
        if not self.engine.exchanges_rows:
            return [None] * len(shares[0])
        return everyone_of(
            rows, shares, packing=self.packing, virtual_tokens=self.method.virtual_tokens
        )

    def pack(self, rows: TokenizedRows, ids: RowIds, everyone: Everyone | None = None) -> Batch:
        """Return the rows `ids` as one micro-batch of this model."""
        pad_id = None
        if rows.class_ids is not None:  # a decoder finds a row's end by it
            pad_id = architectures.pad_id(architectures.bare_model(self.peft).config)
        return pack(
            rows,
            ids,
            packing=self.packing,
            pad_id=pad_id,
            virtual_tokens=self.method.virtual_tokens,
            everyone=everyone,
        )

    @property
    def max_positions(self) -> int | None:
        """Most tokens of a row, where the model has a table of positions; None where it has not."""
        places = self.position_table
        return None if places is None else places - self.method.learned_positions

    def check_rows(self, rows: TokenizedRows) -> None:
        """Compare rows with the positions and the embedding that the model has.

        Raises:
            DataError: Where a model with a table of positions has none for the end of a row.
            ModelError: For a token that the model has no row for.
        """
        config = architectures.bare_model(self.peft).config
        learned = self.method.learned_positions
        refuse_rows_that_do_not_fit(config, self.recipe, rows, self.max_positions, learned)

    def warn_of_untrained_rows(self, rows: TokenizedRows) -> None:
        """Say which tokens of the rows stand for nothing yet and stay so. Collective."""
        weight, used = left_frozen(self.peft, np.unique(rows.tokens).astype(np.int64))
        if weight is None:
            return
        odd = untrained_rows(self.engine.full_tensor(weight), used)
        if odd and self.world.is_main:
            words = load_tokenizer(self.recipe).convert_ids_to_tokens(odd[:3])
            log.warning(
                "%d tokens of the rows have an embedding that nobody has trained, %s first; "
                "method.trainable_tokens trains them",
                len(odd),
                ", ".join(map(repr, words)),
            )

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context every pass runs in: adapters are float32, the base may be less."""
        return precision.autocast(self.world.device, self.compute_dtype)

    def note_base(self) -> None:
        """Take the base for right as it is, once an adapter was read. Collective."""
        if self.method.changes_base:
            self.base_fingerprint = self.engine.fingerprint(self.base)

    def check_integrity(self) -> None:
        """Hash the base again and compare, and the adapter over processes. Collective.

        Raises:
            TrainingError: Naming the first tensor that changed.
        """
        now = self.engine.fingerprint(self.base)
        changed = [name for name, value in self.base_fingerprint.items() if now[name] != value]
        if changed:
            raise TrainingError(
                f"{len(changed)} frozen tensors changed in training, {changed[0]} first",
                remedy="the adapter is not to be trusted; please report this",
            )
        verify_dequantized(self.peft, self.engine)
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


def set_up_model(
    recipe: Recipe,
    world: World,
    source: BaseSource,
    *,
    label_names: tuple[str, ...] = (),
    rows: TrainingRows | None = None,
    engines: Mapping[str, type[Engine]] = ENGINES,
    prover: Prover = prove_once,
    began_in: str = "",
) -> ModelSetup:
    """Build, shard and load the model. Collective.

    Args:
        recipe: The run's recipe.
        world: Rank and size of this process's world.
        source: What `find_base` found.
        label_names: Class names, for sequence classification.
        rows: Training rows, for an adapter that starts from them. Default: what it starts as is
            replaced by what was saved.
        engines: By strategy, what shards.
        prover: Compares losses with those of transformers; see `prove_once`.
        began_in: The dtype in which the run began, where it goes on.

    Raises:
        PeftDistError: For what cannot work; before weights are read, wherever that can be known.
    """
    started = time.monotonic()
    launched = resolve(recipe.parallel, world, os.environ)
    refuse_muon(recipe.train, launched.strategy)
    set_up_device(world.device, deterministic=recipe.train.deterministic)
    dtype, why = precision.compute_dtype(recipe.model, world.device, began_in)
    if world.is_main:
        level = logging.WARNING if why.startswith(":") else logging.INFO
        log.log(level, "computing in %s%s", precision.name_of(dtype), why)
    config = architectures.read_config(source.files.folder, task=recipe.model.task)
    if recipe.model.dropout == "off":
        architectures.turn_dropout_off(config)
    skeleton = architectures.build_skeleton(
        config,
        task=recipe.head,
        dtype=dtype,
        attention=kernel_to_build_with(recipe, world.device, dtype),
        label_names=("reward",) if recipe.head == "reward" else label_names,
    )
    released = source.released(recipe)
    settings = with_token_ids(recipe, config.get_text_config().vocab_size)
    method = METHODS[recipe.method.kind](settings, seed=recipe.train.seed)
    compiling = compiles(recipe, world.device, launched.strategy)
    ways = ways_of(
        recipe,
        picked=skeleton.config._attn_implementation,
        ours=attention.kernels_of(world.device, dtype) if recipe.model.task == "causal-lm" else [],
        own_attention=method.own_attention,
        compiled=compiling,
    )
    if recipe.model.task == "causal-lm":
        attention.register()
        attention.use_kernel(skeleton, ways[0].attention)
    has_conv1d = architectures.has_conv1d(skeleton)
    plan = plan_base(skeleton, source.files, quantization=recipe.quantization)
    if world.is_main:
        for warning in plan.warnings:
            log.warning(warning)
    of_base = {name for name, _ in skeleton.named_parameters(remove_duplicate=False)}
    blocks = architectures.transformer_blocks(skeleton)
    if launched.strategy in ("fsdp", "hsdp"):
        architectures.require_own_weights(blocks, config.model_type)
    position_table = architectures.position_table(skeleton)
    in_fp8 = linears_in_fp8(recipe, blocks.values(), world.device, dtype)
    peft = method.attach(
        skeleton,
        task=recipe.head,
        base_name=released.name,
        has_conv1d=has_conv1d,
    )
    peft.peft_config[peft.active_adapter].revision = released.commit
    fused = fuse(recipe, peft, world, dtype, source.cache_dir)
    if recipe.train.activation_checkpointing is True:
        # After the adapter: PEFT refuses a prefix on a model that has it on already.
        recompute_blocks(skeleton)
    model = _HEADS[recipe.head](peft)
    engine = engines[launched.strategy](
        world, shard_size=launched.shard_size, offload=launched.offload
    )
    engine.reshard, engine.dequantized_blocks = launched.reshard, launched.dequantized_blocks
    engine.wrap(model, blocks.values(), [p for p in model.parameters() if p.requires_grad])
    engine.materialize(model)
    if isinstance(model, CausalLM) and (most := model.most_in_slices(dtype)):
        log.info("head: in slices up to %d labelled tokens of a process in a step", most)
    code = compiled.of(recipe, skeleton, blocks if compiling else {}, world, source.cache_dir)
    frozen, trained = frozen_and_trained(peft)
    log.info("built: %s with %s adapters", type(skeleton).__name__, recipe.method.kind)
    packed = fill_from_files(peft, frozen, trained, plan, source, engine, of_base)
    fill_fresh_heads({**frozen, **trained}, plan, peft, engine, seed=recipe.train.seed)
    as_released = engine.fingerprint(frozen)
    verify_one_base(as_released)
    log.info("base: %s, built and loaded  %.1f s", recipe.quantization, time.monotonic() - started)
    keep_dequantized([*blocks.values()][: engine.dequantized_blocks], engine, dtype)
    by_name = {base_name_in(peft, name): parameter for name, parameter in frozen.items()}
    loaded = LoadedBase(recipe, source, plan, by_name, engine, model, peft, dtype, rows)
    with stage("filling and sharding the adapters", log) as told:
        method.initialise(peft, loaded.access())
        engine.flatten_adapter(
            trained,
            lambda n: Group(trained[n].dim() > 1, method.rate_factor(n)),
            figures=len(recipe.objective.metrics) + recipe.source_losses,
        )
        total, by_rank = verify_sharded(engine, frozen, trained, launched.strategy)
        told.append(
            f"shards: {megabytes(by_rank[world.rank])} of {megabytes(total)} of the base here "
            f"({launched.strategy}), {sum(map(torch.numel, trained.values())):,} trained parameters"
        )
    setup = ModelSetup(
        recipe=recipe,
        world=world,
        strategy=launched.strategy,
        engine=engine,
        method=method,
        model=model,
        peft=peft,
        compute_dtype=dtype,
        base=frozen,
        adapter=trained,
        base_bytes_total=total,
        base_bytes_by_rank=by_rank,
        released_fingerprint=as_released,
        base_fingerprint=engine.fingerprint(frozen) if method.changes_base else as_released,
        packed_base=packed,
        position_table=position_table,
        packing=False,
        load_seconds=time.monotonic() - started,
        released=released,
        tokenizer_files=source.files.others(TOKENIZER_FILES),
    )
    setup.check_adapters_agree()
    if isinstance(model, Decoder | SequenceClassifier):
        passes = (setup.autocast, engine.gradient_of, engine.disturbed_adapter)
        run = ProofRun(model, peft, blocks, world, dtype, *passes, method.virtual_tokens, code)
        facts = [launched.strategy, recipe.quantization, fused, setup.released_fingerprint]
        setup.packing = prover(run, ways, facts, source.cache_dir).packing
    multiply_in_fp8(in_fp8, world.device)  # once the model itself was compared with transformers'
    return setup
