"""One node of a pre-flight with a fault of its own: FAULT and then the pre-flight's arguments."""

import ctypes
import json
import os
import signal
import sys
import time
from typing import Any

from peft_dist.preflight import head, main, network, node_info


def other_version() -> None:
    """Have another peft, and other code of our own."""
    versions = node_info.versions()
    node_info.versions = lambda: {**versions, "peft": "0.20.1"}  # type: ignore[assignment]
    node_info.code_digest = lambda: "0" * 64  # type: ignore[assignment]


def other_model() -> None:
    """Have a stale copy of the model."""
    copies = {"/models/tiny": os.environ["STALE_MODEL"]}
    os.environ["PEFT_DIST_STAGED"] = json.dumps(copies)


def fast_clock() -> None:
    """Have a clock that is an hour ahead."""
    real = time.time
    time.time = lambda: real() + 3600  # type: ignore[assignment]


def stops() -> None:
    """Come, and be stopped before the all-reduce."""
    _before_the_all_reduce(lambda: os.kill(os.getpid(), signal.SIGSTOP))


def dies() -> None:
    """Come, and be killed before the all-reduce."""
    _before_the_all_reduce(lambda: os.kill(os.getpid(), signal.SIGKILL))


def unreachable() -> None:
    """Talk to the head, and to nobody by gloo."""

    def refuse(_self: Any, _order: Any) -> float:
        raise RuntimeError("[/pytorch/third_party/gloo/pair.cc:1] no route to host")

    network.Member._all_reduce = refuse  # type: ignore[method-assign]


def hangs() -> None:
    """Wait for the others for ever."""
    head.HeadNode.wait_for_all = lambda *_, **__: time.sleep(1000)  # type: ignore[assignment, method-assign]


def holds_the_interpreter() -> None:
    """Hang in C, so that no thread of Python can run."""
    sleep = ctypes.PyDLL(None).sleep
    head.HeadNode.wait_for_all = lambda *_, **__: sleep(1000)  # type: ignore[assignment, method-assign]


def _before_the_all_reduce(act: Any) -> None:
    do = network.Member.do

    def acting(self: network.Member, order: network.Order) -> network.Answer:
        if order["do"] == "sum":
            act()
        return do(self, order)

    network.Member.do = acting  # type: ignore[method-assign]


if __name__ == "__main__":
    globals()[sys.argv[1]]()
    main.main(sys.argv[2:])
