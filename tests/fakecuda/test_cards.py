"""What other cards and other torch settings lead to, each in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from peft_dist.common.library_messages import LOST_NCCL_PEER, OUT_OF_DEVICE_MEMORY

QUESTIONS = """
import json, os, sys, torch
from peft_dist.config.recipe import Model
from peft_dist.model import attention, varlen
from peft_dist.model.device_settings import set_up_device
from peft_dist.model.precision import compute_dtype
from tests.fakecuda.device import counting

KERNELS = {"flash": "flash_fwd", "efficient": "fmha_cutlass"}
device = torch.device("cuda", 0)
dtype, why = compute_dtype(Model(name="m"), device)

def parts(width):
    made = [torch.empty(1, heads, 256, width, device=device, dtype=dtype) for heads in (32, 8, 8)]
    return [part.requires_grad_() for part in made]

def picked(*, window=None, width=128):
    # The kernels that two rows of a micro-batch are computed with, one row at a time.
    with counting() as counted:
        attention._row_attention(
            None, *parts(width), None, row_lengths=(56, 200), sliding_window=window
        )
    return [name for name, part in KERNELS.items() if counted.kernels_named(part)]

query, key, value = parts(128)
by_torch = torch._fused_sdp_choice(query, key, value, None, 0.0, True, enable_gqa=True)
set_up_device(device, deterministic=False)
answers = {
    "name": torch.cuda.get_device_name(),
    "dtype": str(dtype).removeprefix("torch."),
    "told": why,
    "one call": varlen.has_kernel(device, dtype),
    "planned by torch": by_torch == 3,  # cuDNN
    "causal": picked(),
    "window": picked(window=32),
    "head 256": picked(width=256),
    "grows": torch.cuda.memory._snapshot()["allocator_settings"]["expandable_segments"],
}
print(json.dumps(answers))
sys.stdout.flush()
os._exit(0)
"""


def run(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


CARDS = {
    "H100": ("bfloat16", True, "flash"),
    "A100": ("bfloat16", True, "flash"),
    "L4": ("bfloat16", True, "flash"),
    "T4": ("float32", False, "efficient"),  # it keeps no matrix of scores either
}
"""Dtype, whether attention is one call for all rows, and torch's kernel for one row."""


@pytest.mark.parametrize("card", CARDS)
def test_every_card_gets_its_dtype_and_a_kernel_that_needs_no_plan_per_shape(card: str) -> None:
    done = run(QUESTIONS, FAKE_CUDA_CARD=card)
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout.splitlines()[-1])
    dtype, one_call, kernel = CARDS[card]
    assert (answers["dtype"], answers["one call"]) == (dtype, one_call), answers
    assert answers["causal"] == [kernel], answers
    assert answers["window"] == ["efficient"], answers
    assert len(answers["head 256"]) == 1, answers
    assert answers["grows"], answers
    assert bool(answers["told"]) == (card == "T4"), answers
    # Without the settings an H100 would plan every shape.
    assert answers["planned by torch"] == (card == "H100"), answers


def test_gpus_that_torch_does_not_see_are_refused(tmp_path: Path) -> None:
    (tmp_path / "nvidia0").touch()
    done = run(
        "import os, sys; from pathlib import Path\n"
        "from peft_dist.common.errors import LaunchError\n"
        "from peft_dist.distributed.world import read_world\n"
        f"try: print(read_world(Path({str(tmp_path)!r})))\n"
        "except LaunchError as error: print(error)\n"
        "sys.stdout.flush(); os._exit(0)",
        FAKE_CUDA_DEVICES="0",
    )
    assert "1 GPUs are here" in done.stdout, done
    assert "CUDA_VISIBLE_DEVICES=" in done.stdout


def test_cublas_without_memory_is_known() -> None:
    done = run(
        "import os, sys, torch\n"
        "from peft_dist.common.library_messages import is_out_of_memory\n"
        "one = torch.ones(8, 8, device='cuda')\n"
        "try: one @ one\n"
        "except Exception as error: print(is_out_of_memory(error), error)\n"
        "sys.stdout.flush(); os._exit(0)",
        FAKE_CUDA_NO_BLAS="1",
    )
    assert done.stdout.startswith("True"), done


def test_the_words_of_nccl_are_those_of_the_installed_libraries() -> None:
    """No peer can be lost here: there is no NCCL, but its words stand in the libraries."""
    libraries = [Path(torch.__file__).parent / "lib" / "libtorch_cuda.so"]
    libraries += (Path(torch.__file__).parents[1] / "nvidia" / "nccl" / "lib").glob("libnccl.so*")
    content = b"".join(library.read_bytes() for library in libraries)
    for message in LOST_NCCL_PEER:
        assert message.encode() in content, message
    # NCCL fills in CUDA's number and name of the error.
    for message in OUT_OF_DEVICE_MEMORY:
        pattern = message.replace("'out of memory'", "'%s'").replace(" 2 ", " %d ")
        whole = message == "CUDA error: out of memory"  # two parts, which torch puts together
        assert (b"CUDA error: " if whole else pattern.encode()) in content, message
