"""Connect the processes of a run to the store through which they find each other."""

import os
import threading
import time
from contextlib import suppress
from datetime import timedelta

import torch.distributed as torch_dist

from peft_dist.common import env
from peft_dist.common.errors import LaunchError
from peft_dist.common.library_messages import is_port_taken
from peft_dist.distributed.private_store import PrivateStore, StoreServer
from peft_dist.distributed.secret_channel import WrongSecret
from peft_dist.distributed.world import World, env_int

MEETING_TIMEOUT = timedelta(seconds=28)
"""How long a process tries to reach the others, so that a wrong address is reported within 30 s."""
COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""A collective that waits longer than this ends the run. Downloads, hashing and tokenising run
before there is a group; writing the packed base is what may take minutes inside it."""


def meet(world: World, *, within: timedelta = MEETING_TIMEOUT) -> torch_dist.Store:
    """Connect to the store that all processes share; a wrong address is known in seconds.

    Raises:
        LaunchError: Naming host and port, where nobody answers there, they are taken, or a process
            does not come.
    """
    if world.size == 1:
        # No launcher exported a rendezvous: a group of one needs neither a host nor a port.
        return torch_dist.HashStore()
    host, port = os.environ.get("MASTER_ADDR", ""), env_int("MASTER_PORT", 0)
    if not host or not port:
        raise LaunchError(
            f"MASTER_ADDR={host} MASTER_PORT={port or ''} name no host and port to meet at",
            where="environment",
            remedy="start with accelerate launch, torchrun or peft-dist train",
        )
    of_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE", "") == str(True)
    serves = world.is_main and not of_launcher
    round_ = os.environ.get(env.ROUND)  # of our own rendezvous; another one has torch's store
    deadline = time.monotonic() + within.total_seconds()
    while True:
        try:
            store = connect(host, port, serves, within, private=not of_launcher or bool(round_))
            break
        except (torch_dist.DistError, RuntimeError, OSError) as error:
            taken = is_port_taken(error)
            if taken and time.monotonic() < deadline:
                time.sleep(0.5)  # the attempt before this one may still be letting go of the port
                continue
            problem = "the port is taken" if taken else "nobody answers there"
            if isinstance(error, WrongSecret):
                problem = "who answers there has another secret"
            raise _cannot_meet(problem, within) from error
    # The launcher's store outlives a group that it starts again. Our rendezvous counts its rounds;
    # torchrun counts on each node the restarts that this node's own processes have caused.
    attempt = round_ or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    attempt = attempt if of_launcher else "0"
    meeting = torch_dist.PrefixStore(f"/worker/attempt_{attempt}", store)
    if not of_launcher:  # which has seen all its nodes before it starts a process
        _wait_for_all(meeting, world, within, deadline)
    store.set_timeout(COLLECTIVE_TIMEOUT)
    return meeting


def connect(
    host: str, port: int, serves: bool, within: timedelta, *, private: bool = True
) -> torch_dist.Store:
    """Connect to the store, or serve it.

    Args:
        host: Where it is.
        port: Its port.
        serves: Whether this process serves it.
        within: How long to try.
        private: Take a private store where the environment has a secret, else torch's own.

    Raises:
        OSError: Where the port is taken, or nobody who knows the secret answers (a TimeoutError).
        DistError, RuntimeError: torch's own.
    """
    secret = os.environ.get(env.STORE_SECRET)
    if private and secret:
        if serves:
            StoreServer(host, port, secret)  # until the process ends
        return PrivateStore(host, port, secret, within)
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
    except (torch_dist.DistError, RuntimeError, OSError) as error:
        absent = 0  # it serves, and may have given up just now
        with suppress(torch_dist.DistError, RuntimeError, OSError):
            absent = next(rank for rank, key in enumerate(everyone) if not meeting.check([key]))
        raise _cannot_meet(f"rank {absent} has not come, or is gone", within) from error


def _cannot_meet(problem: str, within: timedelta) -> LaunchError:
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    return LaunchError(
        f"processes cannot meet at {host}:{port}: {problem} ({within.total_seconds():g} s tried)",
        where="MASTER_ADDR, MASTER_PORT",
        remedy="see that rank 0 runs on that host, and that the port is free and open",
    )
