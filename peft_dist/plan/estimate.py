"""What one way to run a recipe takes: bytes by kind, seconds by kind, hours."""

from dataclasses import dataclass, replace

from peft_dist.config import Recipe
from peft_dist.config.batch_shape import longest_rows_of_step
from peft_dist.metrics.mfu import FLOPS_PER_TOKEN_AND_PARAMETER
from peft_dist.plan.adapter import AdapterShape
from peft_dist.plan.candidate import Candidate
from peft_dist.plan.gathers import GatherTimes, gather_times, gathered_bytes
from peft_dist.plan.hardware import GIB, Hardware
from peft_dist.plan.memory import (
    REUSE_ELEMENTS,
    Bytes,
    base_bytes,
    dequantized_bytes,
    gathered_block_bytes,
    kept_by_block,
    peak_bytes,
)
from peft_dist.plan.ring import Ring
from peft_dist.plan.setting import FLOAT, Setting
from peft_dist.plan.shapes import ModelShape
from peft_dist.plan.vocabulary_bytes import scored_bytes


@dataclass(frozen=True)
class Seconds:
    """Of one optimizer step, on one GPU; they add up."""

    products: float
    """Matrix products of base, head and adapter."""
    attention: float
    other_kernels: float
    """Norms, activations, the loss: what is bound by memory."""
    dequantize: float
    waits_for_gathers: float
    """What of gathers, or of copies from the host, no computation hides."""
    reduce: float
    """The sum of gradients over all processes."""

    @property
    def total(self) -> float:
        """Return all of them."""
        return (
            self.products
            + self.attention
            + self.other_kernels
            + self.dequantize
            + self.waits_for_gathers
            + self.reduce
        )


@dataclass(frozen=True)
class Estimate:
    """What a candidate takes."""

    candidate: Candidate
    bytes: Bytes
    reserved_bytes: int
    """Allocated, and what the allocator holds back besides."""
    device_bytes: int
    """Reserved, CUDA's and NCCL's own."""
    limit_bytes: int
    """What a GPU has."""
    host_bytes: int
    """Of a node."""
    host_limit_bytes: int | None
    accumulation: int
    seconds: Seconds
    gathers: GatherTimes | None
    """None where nothing is gathered."""
    sent_inside_bytes: int
    """That a GPU receives in a step from others of its node."""
    sent_between_bytes: int
    """From other nodes, all that its node receives shared by the node's GPUs."""
    rows_per_step: int
    tokens_per_step: int
    tokens_per_s: float
    """Of all GPUs, each row of `data.max_length` tokens."""
    mfu: float
    hours: float | None
    """Of all steps; None where the number of steps is not known."""
    gpu_hours: float | None
    first_start_s: float
    """To read and quantize the model."""
    requeue_s: float
    """To read what the first start has packed."""
    save_s: float
    """To write a checkpoint: adapter and moments."""
    head_in_slices: bool
    """Whether positions are scored in slices of the head, and it is never whole."""

    @property
    def fits(self) -> bool:
        """Whether it fits, the assumed parts counted."""
        return self.fits_host and self.device_bytes <= self.limit_bytes

    @property
    def fits_host(self) -> bool:
        """Whether the host's memory is enough, where it is known."""
        return self.host_limit_bytes is None or self.host_bytes <= self.host_limit_bytes

    @property
    def cannot_fit(self) -> bool:
        """Whether its tensors alone are more than the GPU has, whatever the assumptions."""
        return self.bytes.allocated > self.limit_bytes


def setting_of(recipe: Recipe, candidate: Candidate, hardware: Hardware) -> Setting:
    """Return a candidate as the formulas of memory take it."""
    sharded = candidate.strategy in ("fsdp", "hsdp", "zero3")
    wide = recipe.model.dtype == "float32"
    zero = candidate.strategy.startswith("zero")
    return Setting(
        sharded=sharded,
        shards=candidate.shard_size if sharded else 1,
        micro_batch=candidate.micro_batch * recipe.rows_per_example,
        length=recipe.data.max_length,
        recompute=candidate.recompute,
        offload=candidate.offload,
        quantized=recipe.quantization == "nf4",
        compute_bytes=4 if wide else 2,
        one_call=hardware.gpu.bfloat16 and not wide,  # see model.varlen
        moments_shared_by=candidate.processes if zero else 1,
        reshard=candidate.reshard,
        dequantized=candidate.dequantized,
        holds_vocabulary=candidate.strategy == "zero3",
        reuse_elements=REUSE_ELEMENTS if candidate.strategy == "zero3" else 0,
    )


def estimate(
    recipe: Recipe,
    shape: ModelShape,
    adapter: AdapterShape,
    candidate: Candidate,
    hardware: Hardware,
    *,
    steps: int | None,
) -> Estimate:
    """Return what a candidate takes.

    Args:
        recipe: What to train.
        shape: Of its base.
        adapter: Of its adapter.
        candidate: How.
        hardware: Where.
        steps: Optimizer steps of the run; None where nobody knows.
    """
    setting = setting_of(recipe, candidate, hardware)
    assumed, gpu = hardware.assumed, hardware.gpu
    per_process = -(-longest_rows_of_step(recipe) // candidate.processes)
    micro = min(candidate.micro_batch, per_process)
    accumulation = -(-per_process // micro)
    setting = replace(
        setting, micro_batch=micro * recipe.rows_per_example, accumulation=accumulation
    )
    found = peak_bytes(shape, adapter, setting)
    largest = shape.largest_linear
    weight = largest.out_features * largest.in_features * setting.compute_bytes
    gathers = setting.sharded and setting.shards > 1
    margin = (assumed.margin if gathers else 0.01) * found.allocated
    if setting.quantized or gathers:
        margin += assumed.margin_weights * weight
    reserved = found.allocated + int(margin)
    own = assumed.context_gib + (assumed.nccl_gib if candidate.processes > 1 else 0.0)

    seconds, gather_s = _seconds(shape, adapter, setting, candidate, hardware)
    inside, between = _received(shape, adapter, setting, candidate)
    rows = longest_rows_of_step(recipe)
    tokens = rows * setting.length * recipe.rows_per_example
    tokens_per_s = tokens / seconds.total
    hours = None if steps is None else steps * seconds.total / 3600
    work = FLOPS_PER_TOKEN_AND_PARAMETER * shape.parameters * tokens_per_s
    on_node = candidate.processes // candidate.nodes
    first_s, again_s = _start_seconds(shape, setting, candidate, hardware)
    limit = hardware.memory_per_node_gib
    return Estimate(
        candidate=candidate,
        bytes=found,
        reserved_bytes=reserved,
        device_bytes=reserved + int(own * GIB),
        limit_bytes=int(gpu.memory_gib * GIB),
        host_bytes=on_node
        * int(
            assumed.host_process_gib * GIB
            # Page-locked memory is given in powers of two.
            + (2 * base_bytes(shape, setting) if candidate.offload else 0)
        ),
        host_limit_bytes=None if limit is None else int(limit * GIB),
        accumulation=accumulation,
        seconds=seconds,
        gathers=gather_s,
        sent_inside_bytes=inside,
        sent_between_bytes=between,
        rows_per_step=rows,
        tokens_per_step=tokens,
        tokens_per_s=tokens_per_s,
        mfu=work / (gpu.flops * candidate.processes),
        hours=hours,
        gpu_hours=None if hours is None else hours * candidate.processes,
        first_start_s=first_s,
        requeue_s=again_s,
        save_s=3 * FLOAT * adapter.parameters / (assumed.disk_gb_s * 1e9),
        head_in_slices=scored_bytes(shape, setting) is not None,
    )


def block_flops(shape: ModelShape, adapter: AdapterShape, setting: Setting) -> tuple[int, int, int]:
    """Return operations of one forward through one block: products, adapter's, attention's."""
    tokens = setting.micro_batch * (setting.length + adapter.virtual_tokens)
    products = 2 * tokens * shape.active_block_weights
    low_rank = (
        2 * tokens * adapter.rank * sum(t.in_features + t.out_features for t in adapter.targets)
    )
    # A token sees half of its row on average; scores and values take a product each.
    attention = 2 * tokens * setting.length * shape.query_width
    return products, low_rank, attention


def _seconds(
    shape: ModelShape,
    adapter: AdapterShape,
    setting: Setting,
    candidate: Candidate,
    hardware: Hardware,
) -> tuple[Seconds, GatherTimes | None]:
    assumed, gpu, accumulation = hardware.assumed, hardware.gpu, setting.accumulation
    peak = gpu.flops / (1 if setting.compute_bytes == 2 else 2)
    memory = gpu.memory_gb_s * 1e9 * assumed.memory_efficiency
    passes = 3 if setting.recompute else 2  # forward, backward, and forward again
    products, low_rank, attention = block_flops(shape, adapter, setting)
    # Backward of a frozen weight is one product, of a trained one two.
    product_s = (passes * products + (passes + 1) * low_rank) / (peak * assumed.gemm_efficiency)
    attention_s = (passes + 1.5) * attention / (peak * assumed.attention_efficiency)
    kept = kept_by_block(shape, adapter, setting)
    other_s = assumed.passes_over_kept * kept * (passes / 2) ** 0.5 / memory
    written = 2.6 if setting.quantized else 0.0  # bytes per weight: codes and scales, and values
    kept_blocks = min(setting.dequantized, shape.layers)
    kept_weights = dequantized_bytes(shape, setting) // setting.compute_bytes
    made = shape.block_weights - kept_blocks / shape.layers * kept_weights  # of a block on average
    dequantize_s = passes * made * written / memory
    per_block = product_s + attention_s + other_s + dequantize_s

    # A block is gathered for forward and perhaps for backward, where its recomputation runs too.
    forward_s, backward_s = per_block / passes, per_block * (passes - 1) / passes
    waits, gathers = 0.0, None
    if setting.sharded and setting.shards > 1:
        halves = {"forward_s": forward_s, "backward_s": backward_s}
        gathers = gather_times(shape, adapter, setting, candidate, hardware, **halves)
        waits = gathers.waits
    if candidate.offload:
        block = gathered_block_bytes(shape, setting, dequantized=False)
        copy_s = block / setting.shards / (assumed.host_gb_s * 1e9)
        uses = [forward_s, backward_s][: 2 if setting.reshard == "forward" else 1]
        copied = shape.layers - kept_blocks
        waits += copied * sum(max(0.0, copy_s - own_s) for own_s in uses)

    predicted = setting.micro_batch * (setting.length - 1)
    logits = predicted * shape.vocabulary
    head_s = 4 * logits * shape.hidden / (peak * assumed.gemm_efficiency)
    loss_s = 13 * logits * FLOAT / memory  # passes over the logits, which nothing fuses

    summed = adapter.parameters * FLOAT
    everyone = Ring.of(candidate, candidate.processes)
    update_s = 7 * summed / memory
    layers = shape.layers * accumulation
    seconds = Seconds(
        products=layers * product_s + accumulation * head_s,
        attention=layers * attention_s,
        other_kernels=layers * other_s + accumulation * loss_s + update_s,
        dequantize=layers * dequantize_s,
        waits_for_gathers=waits if setting.reshard == "step" else accumulation * waits,
        reduce=2 * everyone.seconds(summed, hardware),
    )
    return seconds, gathers


def _received(
    shape: ModelShape,
    adapter: AdapterShape,
    setting: Setting,
    candidate: Candidate,
) -> tuple[int, int]:
    """Return the bytes that a GPU receives in a step: inside its node, and from others."""
    everyone = Ring.of(candidate, candidate.processes)
    inside, between = everyone.received(2 * adapter.parameters * FLOAT)
    if setting.sharded and setting.shards > 1:
        times = 1 if setting.reshard == "step" else setting.accumulation
        whole = times * gathered_bytes(shape, adapter, setting)
        of_gathers = Ring.of(candidate, setting.shards).received(whole)
        inside, between = inside + of_gathers[0], between + of_gathers[1]
    return inside, between


def _start_seconds(
    shape: ModelShape, setting: Setting, candidate: Candidate, hardware: Hardware
) -> tuple[float, float]:
    """Return the seconds in which the base is there: at first, and once it is packed."""
    released = shape.parameters * setting.stored_bytes
    whole = replace(setting, sharded=False)
    packed = base_bytes(shape, whole)
    on_node = candidate.processes // candidate.nodes
    # Replicas read the whole base each; under ddp all read a share and exchange them.
    copies = 1 if candidate.shard_size == 1 else candidate.processes // candidate.shard_size
    rate = hardware.assumed.disk_gb_s * 1e9
    first = released * copies / candidate.nodes / rate
    if setting.quantized:
        quantized = released * copies / candidate.processes
        first += quantized / (hardware.assumed.quantize_gb_s * 1e9)
    assert on_node >= 1
    return first, packed * copies / candidate.nodes / rate
