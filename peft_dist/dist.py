"""Rank and world facts, and the few collectives that move bytes of the base.

Reads the environment that torchrun and Accelerate export. Knows no model and no sharding engine.
"""

import json
import os
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as torch_dist

from peft_dist.errors import LaunchError

MEETING_TIMEOUT = timedelta(seconds=28)
"""How long a process tries to reach the others, so that a wrong address is told within 30 s."""
COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""A collective that waits longer than this ends the run. Downloads, hashing and tokenising run
before there is a group; writing the packed base is what may take minutes inside it."""


@dataclass(frozen=True)
class World:
    """Where this process stands among all of them."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Say whether this is the one process that writes files and talks."""
        return self.rank == 0

    @property
    def device_name(self) -> str:
        """Return the name of the GPU, or `cpu`."""
        on_gpu = self.device.type == "cuda"
        return str(torch.cuda.get_device_name(self.device)) if on_gpu else "cpu"

    def gpu_uuids(self) -> list[str]:
        """Return what tells the GPUs that this process sees from all others; none on a CPU."""
        count = torch.cuda.device_count() if self.device.type == "cuda" else 0
        return [str(torch.cuda.get_device_properties(index).uuid) for index in range(count)]


def _env_int(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise LaunchError(
            f"{text!r} is not a number", where=f"environment {name}", remedy="start with a launcher"
        ) from None


def read_world() -> World:
    """Read this process's place from the environment; one process without a launcher is a world.

    Raises:
        LaunchError: For numbers that contradict each other, or more processes than GPUs.
    """
    rank, size = _env_int("RANK", 0), _env_int("WORLD_SIZE", 1)
    local_rank = _env_int("LOCAL_RANK", 0)
    local_size = _env_int("LOCAL_WORLD_SIZE", size)
    if not (0 <= rank < size and 0 <= local_rank < local_size <= size):
        raise LaunchError(
            f"RANK={rank} WORLD_SIZE={size} LOCAL_RANK={local_rank} LOCAL_WORLD_SIZE={local_size} "
            "contradict each other",
            where="environment",
            remedy="start with accelerate launch, torchrun or peft-dist train",
        )
    wants_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    if wants_cpu or not torch.cuda.is_available():
        return World(rank, size, local_rank, local_size, torch.device("cpu"))
    if local_rank >= torch.cuda.device_count():
        raise LaunchError(
            f"LOCAL_RANK {local_rank} has no GPU of its own ({torch.cuda.device_count()} here)",
            where="environment",
            remedy="start one process per GPU",
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return World(rank, size, local_rank, local_size, device)


def meet(world: World, *, within: timedelta = MEETING_TIMEOUT) -> torch_dist.Store:
    """Connect to the store that all processes share; a wrong address is known in seconds.

    Raises:
        LaunchError: Naming host and port, where nobody answers there, they are taken, or a process
            does not come.
    """
    if world.size == 1:
        # No launcher exported a rendezvous: a group of one needs neither a host nor a port.
        return torch_dist.HashStore()
    host, port = os.environ.get("MASTER_ADDR", ""), _env_int("MASTER_PORT", 0)
    if not host or not port:
        raise LaunchError(
            f"MASTER_ADDR={host} MASTER_PORT={port or ''} name no host and port to meet at",
            where="environment",
            remedy="start with accelerate launch, torchrun or peft-dist train",
        )
    of_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE", "") == str(True)
    serves = world.is_main and not of_launcher
    deadline = time.monotonic() + within.total_seconds()
    while True:
        try:
            store = connect(host, port, serves, within)
            break
        except (torch_dist.DistError, RuntimeError, TimeoutError) as error:
            taken = "EADDRINUSE" in str(error)
            if taken and time.monotonic() < deadline:
                time.sleep(0.5)  # the attempt before this one may still be letting go of the port
                continue
            raise _cannot_meet(
                "the port is taken" if taken else "nobody answers there", within
            ) from error
    # The launcher's store outlives a group that it starts again.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if of_launcher else "0"
    meeting = torch_dist.PrefixStore(f"/worker/attempt_{attempt}", store)
    if not of_launcher:  # which has seen all its nodes before it starts a process
        _wait_for_all(meeting, world, within, deadline)
    store.set_timeout(COLLECTIVE_TIMEOUT)
    return meeting


def connect(host: str, port: int, serves: bool, within: timedelta) -> torch_dist.TCPStore:
    """Connect to the store, or serve it.

    Raises:
        TimeoutError: Where another program has the port, and says nothing.
        DistError, RuntimeError: torch's own, for everything else.
    """
    outcome: list[torch_dist.TCPStore | Exception] = []

    def connect() -> None:
        try:
            outcome.append(
                torch_dist.TCPStore(
                    host, port, None, is_master=serves, timeout=within, wait_for_workers=False
                )
            )
        except Exception as error:  # for the main thread to raise
            outcome.append(error)

    # torch waits for the first answer without any limit.
    thread = threading.Thread(target=connect, name="meet", daemon=True)
    thread.start()
    thread.join(within.total_seconds() + 1.0)
    if not outcome:
        raise TimeoutError(f"{host}:{port} says nothing")
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]


def _wait_for_all(
    meeting: torch_dist.Store, world: World, within: timedelta, deadline: float
) -> None:
    """Wait until every process has come to the store.

    Raises:
        LaunchError: Naming the first that has not.
    """
    everyone = [f"here/{rank}" for rank in range(world.size)]
    try:
        meeting.set(everyone[world.rank], "")
        left_s = max(1.0, deadline - time.monotonic())
        meeting.wait(everyone, timedelta(seconds=left_s))
    except (torch_dist.DistError, RuntimeError) as error:
        absent = 0  # it serves, and may have given up just now
        with suppress(torch_dist.DistError, RuntimeError):
            absent = next(rank for rank, key in enumerate(everyone) if not meeting.check([key]))
        raise _cannot_meet(f"rank {absent} has not come, or is gone", within) from error


def _cannot_meet(problem: str, within: timedelta) -> LaunchError:
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    return LaunchError(
        f"processes cannot meet at {host}:{port}: {problem} ({within.total_seconds():g} s tried)",
        where="MASTER_ADDR, MASTER_PORT",
        remedy="see that rank 0 runs on that host, and that the port is free and open",
    )


def start(world: World, store: torch_dist.Store | None = None) -> None:
    """Start the process group, of one process too, so that every engine has its collectives.

    Args:
        world: This process's place.
        store: What `meet` returned. Default: meet now.
    """
    if torch_dist.is_initialized():
        return
    on_gpu = world.device.type == "cuda"
    torch_dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=meet(world) if store is None else store,
        rank=world.rank,
        world_size=world.size,
        timeout=COLLECTIVE_TIMEOUT,
        device_id=world.device if on_gpu else None,
    )


def stop() -> None:
    """End the process group."""
    if torch_dist.is_initialized():
        torch_dist.destroy_process_group()


def row_share(rows: int, *, index: int, count: int) -> tuple[int, int]:
    """Return the rows [start, stop) that shard `index` of `count` holds of a tensor.

    The same rule as `torch.chunk`, which FSDP2 shards by: equal chunks of ceil(rows / count),
    the last ones shorter or empty.
    """
    chunk = -(-rows // count)
    start = min(index * chunk, rows)
    return start, min(start + chunk, rows)


@dataclass(frozen=True)
class Shard:
    """The part of every base tensor that one process reads: rows `index` of `count`."""

    index: int
    count: int
    group: torch_dist.ProcessGroup | None = None

    def rows(self, rows: int) -> tuple[int, int]:
        """Return this shard's [start, stop) of a tensor with so many rows."""
        return row_share(rows, index=self.index, count=self.count)

    def gather(self, local: torch.Tensor, rows: int) -> torch.Tensor:
        """Return all rows of a tensor of which each shard holds its share. Collective."""
        if self.count == 1:
            return local
        chunk = -(-rows // self.count)
        padded = local.new_zeros(chunk, *local.shape[1:])
        padded[: local.shape[0]] = local
        out = local.new_empty(chunk * self.count, *local.shape[1:])
        torch_dist.all_gather_into_tensor(out, padded, group=self.group)
        return out[:rows]


def sum_over(value: torch.Tensor, group: torch_dist.ProcessGroup | None = None) -> torch.Tensor:
    """Sum a tensor over the processes, in place. Collective."""
    if torch_dist.get_world_size(group) > 1:
        torch_dist.all_reduce(value, group=group)
    return value


def first_of_all(value: torch.Tensor) -> torch.Tensor:
    """Return rank 0's tensor on every process. Collective."""
    value = value.contiguous()
    if torch_dist.get_world_size() > 1:
        torch_dist.broadcast(value, src=0)
    return value


def gather_objects(value: Any) -> list[Any]:
    """Return every process's value, in rank order. Collective.

    Values travel as JSON: torch's own object collectives unpickle what a peer sends.
    """
    on_gpu = torch_dist.get_backend() == "nccl"
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)
    world_size = torch_dist.get_world_size()
    sizes = torch.zeros(world_size, dtype=torch.int64, device=device)
    sizes[torch_dist.get_rank()] = text.numel()
    longest = int(sum_over(sizes).max())
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    padded[: text.numel()] = text
    out = torch.empty(world_size * longest, dtype=torch.uint8, device=device)
    torch_dist.all_gather_into_tensor(out, padded)
    parts = out.cpu().split(longest)
    return [
        json.loads(bytes(part[:size].tolist()))
        for part, size in zip(parts, sizes.tolist(), strict=True)
    ]


def broadcast_object(value: Any) -> Any:
    """Return rank 0's value on every process. Collective; the value travels as JSON."""
    return gather_objects(value if torch_dist.get_rank() == 0 else None)[0]


def any_of(flag: bool, device: torch.device) -> bool:
    """Say whether the flag is set on any process. Collective."""
    return bool(sum_over(torch.tensor(float(flag), device=device)) > 0)


def barrier() -> None:
    """Wait until every process is here."""
    if torch_dist.get_world_size() > 1:
        torch_dist.barrier()
