"""Hold the plan's model of the network against gloo over shaped links between network namespaces.

Every namespace is a node; its one link has a rate that the kernel keeps (`tc tbf`), processes of
one node talk over its loopback. The product's own trainer runs, first with free links and then with
shaped ones: the plan is told the rate, and how long a step takes without the network, and says what
a node receives in a step and how long a step takes. Needs Linux, root, `ip` and `tc`.

Where two single processes gather (`--nodes 2 --per-node 1`, fsdp), gloo takes one and a half times
the link's time: docs/scale.md says why. The plan counts no such thing, and the exit code is 1.

    PYTHONPATH=. python benchmarks/wire.py --nodes 2 --per-node 2 --json wire.json
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

LINK = "eth0"
"""Name of a node's link, inside its namespace."""
QUEUE = "60s"
"""Longest that a packet waits for its turn: long enough that none is lost, as on InfiniBand."""
TCP = ("congestion_control=reno", "slow_start_after_idle=0",
       "rmem=4096 16777216 16777216", "wmem=4096 16777216 16777216")  # fmt: skip
"""TCP is not to look for a link's rate anew after each pause, nor to wait for acknowledgements that
stand behind data of the other direction."""
BURST = "80kb"
"""Larger than any packet that the kernel hands over at once."""
SHAPE = {
    "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 2048,
}  # fmt: skip
LENGTH = 32
FREE_STEPS, SHAPED_STEPS, SETTLING = 10, 5, 2
"""Steps with free and with shaped links; the first of each, which settle, do not count."""


def arguments() -> argparse.Namespace:
    """Read the command line."""
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("--nodes", type=int, default=2)
    made.add_argument("--per-node", type=int, default=1)
    made.add_argument("--mb-s", type=float, default=4.0, help="rate of a node's link, in MB/s")
    made.add_argument("--strategies", default="fsdp,ddp", help="such as fsdp,hsdp,ddp")
    made.add_argument("--json", type=Path, help="also write the figures to this file")
    made.add_argument("--rank-out", type=Path, help=argparse.SUPPRESS)
    return made.parse_args()


class Nodes:
    """Namespaces with a link each, joined by a bridge in one more namespace; gone at the end."""

    def __init__(self, count: int) -> None:
        """Make them; names hold this process's id."""
        self.names = [f"wire-{os.getpid()}-{index}" for index in range(count)]
        self._switch = f"wire-{os.getpid()}-switch"

    def __enter__(self) -> "Nodes":
        """Make namespaces, bridge and links."""
        try:
            for name in (self._switch, *self.names):
                _ip("netns", "add", name)
                _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", self._switch, "link", "add", "bridge", "type", "bridge")
            _ip("-n", self._switch, "link", "set", "bridge", "up")
            for index, name in enumerate(self.names):
                port = f"port{index}"
                _ip("-n", self._switch, "link", "add", port, "type", "veth",
                    "peer", "name", LINK, "netns", name)  # fmt: skip
                _ip("-n", self._switch, "link", "set", port, "master", "bridge", "up")
                _ip("-n", name, "addr", "add", f"10.77.0.{index + 1}/24", "dev", LINK)
                _ip("-n", name, "link", "set", LINK, "up")
                for rule in TCP:
                    _ip("netns", "exec", name, "sysctl", "-qw", f"net.ipv4.tcp_{rule}")
        except BaseException:
            self.__exit__()
            raise
        return self

    def free_links(self) -> None:
        """Take away what shapes the links."""
        for name in self.names:
            words = ["tc", "-n", name, "qdisc", "del", "dev", LINK, "root"]
            subprocess.run(words, check=False, capture_output=True)

    def __exit__(self, *_error: object) -> None:
        """Remove them; links and bridge go with their namespaces."""
        for name in (*self.names, self._switch):
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def main() -> int:
    """Measure every strategy, print model and measurement; return 1 where they are far apart."""
    args = arguments()
    if args.rank_out is not None:
        return _run_rank(args)
    found = []
    with (
        Nodes(args.nodes) as nodes,
        tempfile.TemporaryDirectory(prefix="peft-dist-wire-") as folder,
    ):
        for strategy in args.strategies.split(","):
            nodes.free_links()
            out = Path(folder, f"{strategy}.json")
            _run_ranks(args, nodes, strategy, out)
            found.append(_compared(args, strategy, json.loads(out.read_text())))
    _print(args, found)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    far = [one for one in found if abs(one["bytes_off"]) > 0.02 or abs(one["seconds_off"]) > 0.2]
    return 1 if far else 0


def _run_ranks(args: argparse.Namespace, nodes: Nodes, strategy: str, out: Path) -> None:
    """Start every rank in its node's namespace, and wait for all.

    Raises:
        RuntimeError: Where one fails.
    """
    size = args.nodes * args.per_node
    words = [sys.executable, __file__, "--nodes", str(args.nodes), "--per-node",
             str(args.per_node), "--mb-s", str(args.mb_s), "--strategies", strategy,
             "--rank-out", str(out)]  # fmt: skip
    ranks = []
    for rank in range(size):
        node, local = divmod(rank, args.per_node)
        variables = {
            "RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": local,
            "LOCAL_WORLD_SIZE": args.per_node, "MASTER_ADDR": "10.77.0.1", "MASTER_PORT": 29517,
            "GLOO_SOCKET_IFNAME": LINK, "OMP_NUM_THREADS": 1, "CUDA_VISIBLE_DEVICES": "",
        }  # fmt: skip
        environment = {**os.environ, **{name: str(value) for name, value in variables.items()}}
        inside = ["ip", "netns", "exec", nodes.names[node], *words]
        ranks.append(subprocess.Popen(inside, env=environment))
    try:
        codes = [rank.wait(timeout=900) for rank in ranks]
    finally:
        for process in ranks:
            process.kill()
    if any(codes):
        raise RuntimeError(f"ranks ended with {codes}")


def _run_rank(args: argparse.Namespace) -> int:
    """Train as one rank; rank 0 writes what its node received, and how long steps took."""
    import gpu
    import torch.distributed as torch_dist

    from peft_dist.checkpoint.progress import NoHooks
    from peft_dist.distributed import process_group
    from peft_dist.distributed.world import read_world

    gpu.SHAPES["wire"] = SHAPE
    counter = Path("/sys/class/net") / LINK / "statistics" / "rx_bytes"
    marks: list[tuple[float, int]] = []

    class Clock(NoHooks):
        """Notes time and received bytes at the start of every step; shapes the link."""

        def phase(self, name: str, step: int) -> None:
            if name != "step":
                return
            torch_dist.barrier()
            if step == FREE_STEPS + 1 and world.local_rank == 0:
                rate = f"{args.mb_s * 8e6:.0f}bit"
                shape = ["tc", "qdisc", "replace", "dev", LINK, "root", "tbf", "rate", rate,
                         "burst", BURST, "latency", QUEUE]  # fmt: skip
                subprocess.run(shape, check=True)
            if step == FREE_STEPS + 1:
                torch_dist.barrier()
            marks.append((time.monotonic(), int(counter.read_text())))

    world = read_world()
    process_group.start(world)
    steps = FREE_STEPS + SHAPED_STEPS + 1
    options = gpu.arguments(["--shape", "wire", "--length", str(LENGTH), "--steps", str(steps)])
    options.strategy = args.strategies
    with tempfile.TemporaryDirectory() as folder:
        trainer = gpu.make_trainer(options, world, Path(folder))
        config = json.loads(Path(folder, "config.json").read_text())
    trainer.hooks = Clock()
    trainer.run()
    if world.is_main:
        recipe = trainer.recipe.model_dump(mode="json")
        report = {"marks": marks, "recipe": recipe, "config": config}
        args.rank_out.write_text(json.dumps(report))
    process_group.stop()
    return 0


def _compared(args: argparse.Namespace, strategy: str, report: dict[str, Any]) -> dict[str, Any]:
    """Return what was measured of a strategy, and what the plan says."""
    from peft_dist.config import Recipe
    from peft_dist.plan.candidate import Candidate
    from peft_dist.plan.hardware import Assumed, GpuKind, Hardware
    from peft_dist.plan.learn import solve
    from peft_dist.plan.plan import subject_of

    marks = report["marks"]
    pairs = list(zip(marks, marks[1:], strict=False))
    free = pairs[SETTLING:FREE_STEPS]
    shaped = pairs[FREE_STEPS + 1 : FREE_STEPS + SHAPED_STEPS]
    # Whatever else the machine does only adds: the fastest step is the one to compare.
    free_s = min(after[0] - before[0] for before, after in free)
    step_s = min(after[0] - before[0] for before, after in shaped)
    received = median(after[1] - before[1] for before, after in shaped)

    subject = subject_of(Recipe.model_validate(report["recipe"]), report["config"])
    processes = args.nodes * args.per_node
    shards = {"ddp": 1, "hsdp": args.per_node}.get(strategy, processes)
    one = Candidate(strategy, args.nodes, processes, shards, 1, recompute=False, offload=False)
    cpu = GpuKind("cpu", 16, 10, 1e3, bfloat16=False, measured_flops=1e11)
    assumed = Assumed(hop_inside_us=0.0, hop_between_us=0.0)
    no_network = Hardware(cpu, args.per_node, 1e3, 1e3, None, assumed)
    factor = solve(
        lambda value: (
            subject.estimate(one, replace(no_network, assumed=assumed.times(value))).seconds.total
        ),
        free_s,
    )
    assert factor is not None, f"no efficiency gives a step of {free_s} s"
    rate_gb_s = args.mb_s / 1e3 / args.per_node
    hardware = replace(no_network, between_gb_s=rate_gb_s, assumed=assumed.times(factor))
    planned = subject.estimate(one, hardware)
    planned_bytes = planned.sent_between_bytes * args.per_node
    return {
        "strategy": strategy,
        "nodes": args.nodes,
        "per_node": args.per_node,
        "mb_s": args.mb_s,
        "free_step_s": free_s,
        "measured_bytes": received,
        "planned_bytes": planned_bytes,
        "bytes_off": planned_bytes / received - 1,
        "measured_step_s": step_s,
        "planned_step_s": planned.seconds.total,
        "seconds_off": planned.seconds.total / step_s - 1,
        "planned_seconds": asdict(planned.seconds),
    }


def _print(args: argparse.Namespace, found: list[dict[str, Any]]) -> None:
    print(f"{args.nodes} nodes of {args.per_node}, each with a link of {args.mb_s:g} MB/s")
    for one in found:
        size, planned = one["measured_bytes"] / 1e6, one["planned_bytes"] / 1e6
        seconds, planned_s = one["measured_step_s"], one["planned_step_s"]
        print(
            f"{one['strategy']:5} MB a step: {size:.3f}, planned {planned:.3f} "
            f"({one['bytes_off']:+.1%}); s a step: {seconds:.3f}, planned {planned_s:.3f} "
            f"({one['seconds_off']:+.1%}), {one['free_step_s']:.3f} over free links"
        )


if __name__ == "__main__":
    sys.exit(main())
