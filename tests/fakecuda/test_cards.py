"""What other cards and other torch settings lead to, each in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from peft_dist.common.errors import EXIT_CRASHED
from peft_dist.common.library_messages import LOST_NCCL_PEER, OUT_OF_DEVICE_MEMORY
from peft_dist.run.history import note_crash
from peft_dist.run.restart_policy import Kind

QUESTIONS = """
import json, os, sys, torch
from peft_dist.config.recipe import Model
from peft_dist.model import attention, fused_lora, varlen
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
try:
    torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=True
    )
    refused = False
except RuntimeError as error:  # where torch picks it: there is no cuDNN here
    refused = "CUDNN" in str(error).upper()
by_torch = torch._fused_sdp_choice(query, key, value, None, 0.0, True, enable_gqa=True)
set_up_device(device, deterministic=False)
answers = {
    "name": torch.cuda.get_device_name(),
    "dtype": str(dtype).removeprefix("torch."),
    "told": why,
    "one call": varlen.has_kernel(device, dtype),
    "fused": fused_lora.has_kernel(device, dtype),
    "planned by torch": by_torch == 3,  # cuDNN
    "cudnn was called": refused,
    "causal": picked(),
    "window": picked(window=32),
    "head 256": picked(width=256),
    "grows": torch.cuda.memory._snapshot()["allocator_settings"]["expandable_segments"],
}
print(json.dumps(answers))
sys.stdout.flush()
os._exit(0)
"""


def run(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


CARDS = {
    "H100": ("bfloat16", True, "flash"),
    "A100": ("bfloat16", True, "flash"),
    "L4": ("bfloat16", True, "flash"),
    "T4": ("float16", False, "efficient"),  # it keeps no matrix of scores either
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
    assert answers["fused"] == (card != "T4"), answers  # it multiplies no TF32
    assert bool(answers["told"]) == (card == "T4"), answers
    # Without the settings an H100 would plan every shape.
    assert answers["planned by torch"] == answers["cudnn was called"] == (card == "H100"), answers


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


def test_a_part_of_a_gpu_is_one_process_and_has_its_own_name() -> None:
    """CUDA shows one of them, however many CUDA_VISIBLE_DEVICES lists."""
    script = (
        "import os, sys; from peft_dist.common.errors import LaunchError\n"
        "from peft_dist.distributed.world import read_world\n"
        "try: print(read_world().gpu_uuids())\n"
        "except LaunchError as error: print(error)\n"
        "sys.stdout.flush(); os._exit(0)"
    )
    assert run(script, FAKE_CUDA_CARD="MIG").stdout.startswith("['MIG-")
    assert run(script).stdout.startswith("['GPU-")
    place = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}
    done = run(script, FAKE_CUDA_CARD="MIG", **place)
    assert "LOCAL_RANK 1 has no GPU of its own (1 here, an instance of MIG" in done.stdout, done
    assert "CUDA_VISIBLE_DEVICES naming it" in done.stdout


OUT_OF_MEMORY = """
import os, sys, torch
from pathlib import Path
from peft_dist.run.directory import RunDir
from peft_dist.tracking.memory_file import watch_memory
from peft_dist.worker.process import run_worker

def takes_too_much(context):
    folder = Path(sys.argv[1])
    context.run_dir, context.attempt_number = RunDir(folder), 2
    watch_memory(context, torch.device("cuda", 0), folder=folder)
    held = [torch.empty(1 << 30, dtype=torch.uint8, device="cuda") for _ in range(100)]

code = run_worker(takes_too_much)
sys.stderr.flush()
os._exit(code)
"""


@pytest.mark.parametrize("again", [False, True])
def test_a_process_out_of_memory_leaves_what_held_it(tmp_path: Path, again: bool) -> None:
    (tmp_path / "attempts").mkdir()
    if again:
        error = {"kind": Kind.OUT_OF_MEMORY, "step": 3, "error": "out of memory"}
        note_crash(tmp_path / "attempts", 1, rank=0, **error)
    done = run(OUT_OF_MEMORY, str(tmp_path))
    file = tmp_path / "memory-a2-rank-0.json"
    assert done.returncode == EXIT_CRASHED, done
    assert "train.micro_batch_size: rank 0 is out of memory" in done.stderr
    assert f"; what its memory holds: {file}" in done.stderr
    found = json.loads(file.read_text(encoding="utf-8"))
    assert sum(segment["allocated_size"] for segment in found["segments"]) > 70 << 30
    # Where each was made is recorded once a start has run out of memory.
    assert ("takes_too_much" in json.dumps(found["segments"])) == again


def test_gpus_that_others_use_are_named() -> None:
    script = (
        "import logging, os, sys; import torch.distributed as group\n"
        "from torch.testing._internal.distributed.fake_pg import FakeStore\n"
        "from peft_dist.distributed.world import read_world\n"
        "from peft_dist.tracking.memory_file import warn_of_other_processes\n"
        "logging.basicConfig(stream=sys.stdout, format='%(message)s')\n"
        "group.init_process_group('fake', store=FakeStore(), rank=0, world_size=2)\n"
        "warn_of_other_processes(read_world())\n"
        "sys.stdout.flush(); os._exit(0)"
    )
    place = {"RANK": "0", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    for taken, told in (("0,60", True), ("60", False)):
        done = run(script, FAKE_CUDA_DEVICES="2", FAKE_CUDA_TAKEN=taken, **place)
        assert done.returncode == 0, done
        assert (f"GPU 1 of {os.uname().nodename} (rank 0) has " in done.stdout) == told, done
        assert ("free: other processes hold the rest" in done.stdout) == told


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
