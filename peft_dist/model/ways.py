"""The ways to compute a micro-batch, and the memory of which one was proven for a base.

A proof takes seconds; it is made again for another base, other versions of the libraries, another
engine or device, or a change of the code that it proves.
"""

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
import transformers

from peft_dist.common.errors import RecipeError
from peft_dist.common.screen import stage
from peft_dist.config import Recipe
from peft_dist.distributed.collectives import broadcast_object
from peft_dist.model import attention, varlen
from peft_dist.model.architectures import bare_model
from peft_dist.model.proof import ProofRun, Way, prove

log = logging.getLogger(__name__)


def kernel_to_build_with(recipe: Recipe, device: torch.device, dtype: torch.dtype) -> str:
    """Return the kernel to build the model with, which ours may take the place of."""
    if recipe.model.attention != "auto" or device.type != "cuda" or dtype == torch.float32:
        return recipe.model.attention
    if varlen.has_kernel(device, dtype):
        return "auto"  # torch's own kernels do the same, and need no package
    from transformers.utils import is_flash_attn_2_available

    return "flash_attention_2" if is_flash_attn_2_available() else "auto"


def compiles(recipe: Recipe, device: torch.device, strategy: str) -> bool:
    """Whether blocks are to be compiled, where they can be.

    Raises:
        RecipeError: For an engine under which they cannot.
    """
    wanted = recipe.model.compile
    if strategy == "zero3":
        if wanted == "blocks":
            raise RecipeError(
                "zero3 gathers each layer inside a block, which cannot be compiled then",
                where="model.compile",
                remedy="set parallel.strategy: fsdp, or compile: auto",
            )
        return False
    return wanted == "blocks" or (wanted == "auto" and device.type == "cuda")


def ways_of(
    recipe: Recipe, *, picked: str, ours: list[str], own_attention: bool, compiled: bool
) -> list[Way]:
    """Return the ways to compute a micro-batch, best first.

    Our attention does the same as transformers' with less work; where it does not, the kernel that
    transformers picks for the model does. Rows lie end to end unless the model mixes them then.

    Args:
        recipe: The recipe.
        picked: The kernel that the model was built with.
        ours: Those of our own that the device has; see `attention.kernels_of`.
        own_attention: Whether what is trained works through our attention alone.
        compiled: Whether each is first tried with compiled blocks.

    Raises:
        RecipeError: Where the recipe wants another kernel then.
    """
    chosen = recipe.model.attention
    if own_attention and chosen not in ("auto", "sdpa"):
        raise RecipeError(
            f"{chosen} has no place for what method {recipe.method.kind} learns",
            where="model.attention",
            remedy="set it to auto",
        )
    kernels = [picked]
    if own_attention:
        kernels = ours
    elif picked == "sdpa" or (chosen == "auto" and picked == "eager"):
        kernels = [*ours, picked]
    if chosen == "auto" and not own_attention and "eager" not in kernels:
        kernels.append("eager")
    packing = False if recipe.head == "sequence-classification" else recipe.data.packing
    layouts = [True, False] if packing is None else [packing]
    ways = []
    for layout in layouts:
        # Padded rows are one call as they are.
        usable = [kernel for kernel in kernels if layout or kernel != attention.VARLEN_ATTENTION]
        # One call for each row would be other code for other rows. More than the best is not tried:
        # each takes a minute to compile, and most of what is wrong with one is so with all.
        best = None if layout and usable[0] != attention.VARLEN_ATTENTION else usable[0]
        for kernel in usable:
            if compiled and kernel == best:
                ways.append(Way(kernel, layout, compiled=True))
            ways.append(Way(kernel, layout))
    if recipe.model.compile == "blocks":
        ways.sort(key=lambda way: not way.compiled)
        if not ways[0].compiled:
            raise RecipeError(
                "packed rows are compiled on GPUs alone, in 16 bits",
                where="model.compile",
                remedy="set data.packing: false, or compile: off",
            )
    return ways


def prove_once(run: ProofRun, ways: list[Way], facts: list[Any], cache_dir: Path) -> Way:
    """Return a way that is proven, or was, and let the model use its kernel. Collective.

    Args:
        run: What the proof runs.
        ways: To be tried in this order.
        facts: What else a proof depends on, the base's fingerprint among it.
        cache_dir: Where proofs are remembered; each is a small file.

    Raises:
        ModelError: Where there is none; see `prove`.
    """
    bare, is_main = bare_model(run.peft), run.world.is_main
    name = f"{bare.config.model_type}: losses are those of transformers"
    file = cache_dir / "proofs" / f"{_key(run, ways, facts)}.json"
    proven = broadcast_object(_read(file, ways) if is_main else None)
    if proven is not None:
        way = ways[int(proven)]
        if attention.use_kernel(bare, way.attention):
            run.compile_blocks(way.compiled, told=True)
            log.info("%s, with %s, as was proven before", name, way)
            return way
    with stage("comparing losses with those of transformers", log) as told:
        way, problems = prove(run, ways)
        told.append(f"{name}, with {way}")
    run.compile_blocks(way.compiled, told=True)
    for problem in problems:
        log.info("not used: %s", problem)
    if is_main:
        if problems and (not way.packing or not way.attention.startswith("peft_dist")):
            log.warning("%s: computed with %s; see docs/models.md", bare.config.model_type, way)
        elif problems and ways[0].compiled and not way.compiled:
            log.warning("%s: its blocks run as they are; %s", bare.config.model_type, problems[0])
        _write(file, way)
    return way


def _key(run: ProofRun, ways: list[Way], facts: list[Any]) -> str:
    """Return a hash of everything that a proof depends on."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    config = bare_model(run.peft).config.to_dict()
    method = str(run.peft.active_peft_config.peft_type)
    versions = [torch.__version__, transformers.__version__]
    place = [run.world.device_name, run.world.size, str(run.dtype)]
    everything = [facts, config, method, versions, place, ways]
    digest.update(json.dumps(everything, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:32]


def _read(file: Path, ways: list[Way]) -> int | None:
    try:
        return ways.index(Way(**json.loads(file.read_text(encoding="utf-8"))))
    except (OSError, ValueError, TypeError):
        return None


def _write(file: Path, way: Way) -> None:
    partial = file.with_suffix(f".{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(way._asdict()), encoding="utf-8")
        partial.replace(file)
    except OSError:
        return  # a read-only cache costs another proof next time and nothing else
