"""The messages by which errors of other libraries are recognised, each provoked in earnest."""

import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
import torch.distributed as torch_dist

from peft_dist.common.library_messages import (
    LOST_NCCL_PEER,
    LOST_PEER,
    OUT_OF_DEVICE_MEMORY,
    OUT_OF_MEMORY,
    PORT_TAKEN,
    is_lost_peer,
    is_out_of_memory,
    is_port_taken,
)

PEER = """
import sys
from datetime import timedelta
import torch, torch.distributed as dist
rank, port = int(sys.argv[1]), int(sys.argv[2])
store = dist.TCPStore("127.0.0.1", port, 2, is_master=False, timeout=timedelta(seconds=30))
dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
dist.all_reduce(torch.ones(1))
print("here", flush=True)
sys.stdin.read()
"""


def provoked(work: Callable[[], object]) -> BaseException:
    """Return the error that some work ends with."""
    with pytest.raises(Exception) as caught:  # noqa: B017, PT011 (which one is what is tested)
        work()
    return caught.value


def test_torch_without_memory_on_a_cpu() -> None:
    error = provoked(lambda: torch.empty(1 << 60, dtype=torch.uint8))
    assert any(message in str(error) for message in OUT_OF_MEMORY), error
    assert is_out_of_memory(error)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(ValueError("out of order"))


@pytest.mark.parametrize("message", OUT_OF_DEVICE_MEMORY)
def test_libraries_of_a_gpu_without_memory(message: str) -> None:
    """That these are their words, tests/fakecuda asks the libraries."""
    assert is_out_of_memory(RuntimeError(f"a call failed: {message}"))


@pytest.mark.parametrize("message", LOST_NCCL_PEER)
def test_nccl_whose_peer_is_gone(message: str) -> None:
    assert is_lost_peer(torch_dist.DistBackendError(f"[Rank 1] {message} 0."))


def test_a_store_whose_port_is_taken() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        error = provoked(
            lambda: torch_dist.TCPStore(
                "127.0.0.1", port, 1, is_master=True, timeout=timedelta(seconds=5)
            )
        )
    assert any(message in str(error) for message in PORT_TAKEN), error
    assert is_port_taken(error)


@pytest.mark.distributed
@pytest.mark.parametrize("message", LOST_PEER)
def test_gloo_whose_peer_is_gone(message: str) -> None:
    store = torch_dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
    peer = subprocess.Popen(
        [sys.executable, "-c", PEER, "1", str(store.port)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        torch_dist.init_process_group(
            "gloo", store=store, rank=0, world_size=2, timeout=timedelta(seconds=30)
        )
        torch_dist.all_reduce(torch.ones(1))
        assert peer.stdout is not None and peer.stdout.readline() == "here\n"
        if message == "Connection reset":  # what it has not read is what resets the connection
            peer.send_signal(signal.SIGSTOP)
            work = torch_dist.all_reduce(torch.ones(1 << 24), async_op=True)
            assert not work.is_completed()
            peer.kill()
            error = provoked(work.wait)
        else:
            peer.kill()
            peer.wait()
            error = provoked(lambda: torch_dist.all_reduce(torch.ones(1)))
    finally:
        peer.kill()
        peer.wait()
        torch_dist.destroy_process_group()
    assert message in str(error)
    assert is_lost_peer(error)
