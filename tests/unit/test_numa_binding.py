"""Which CPUs a process keeps to: torch's own rules are the measure, a made /sys the machine."""

import logging
import os
import threading
from pathlib import Path

import pytest
import torch
from torch.numa import binding

from peft_dist.common.env import NUMA_BINDING
from peft_dist.distributed import numa_binding

CORES = {0: {0: {0, 8}, 1: {1, 9}, 2: {2, 10}, 3: {3, 11}, 4: {4, 12}}, 1: {5: {5}, 6: {6}, 7: {7}}}
"""The CPUs of each core of each NUMA node."""
GPUS = [1, 0, 0, 1]
"""The NUMA node of each GPU."""
ALL = {cpu for cores in CORES.values() for cpus in cores.values() for cpu in cpus}


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    """Return a /sys that tells of `CORES`."""
    for node, cores in CORES.items():
        folder = tmp_path / f"devices/system/node/node{node}"
        folder.mkdir(parents=True)
        cpus = set().union(*cores.values())
        (folder / "cpulist").write_text(numa_binding.ranges(cpus) + "\n")
        for own in cores.values():
            for cpu in own:
                topology = tmp_path / f"devices/system/cpu/cpu{cpu}/topology"
                topology.mkdir(parents=True)
                text = ",".join(map(str, sorted(own)))
                (topology / "thread_siblings_list").write_text(f"{text}\n")
    (tmp_path / "devices/system/node/online").write_text("0-1\n")
    return tmp_path


@pytest.mark.parametrize("allowed", [ALL, ALL - {0, 8, 5}, ALL - {8, 9}])
def test_the_cpus_are_those_that_torchrun_would_give(
    kernel: Path, monkeypatch: pytest.MonkeyPatch, allowed: set[int]
) -> None:
    found = numa_binding.cpus_by_numa_node(allowed, kernel)
    nodes = {node: set().union(*cores.values()) for node, cores in CORES.items()}
    siblings = {cpu: own for cores in CORES.values() for own in cores.values() for cpu in own}
    answers = {
        "_get_numa_node_index_for_gpu_index": lambda *, gpu_index: GPUS[gpu_index],
        "_get_gpu_count": lambda: len(GPUS),
        "_get_allowed_logical_cpu_indices_for_numa_node": lambda *, numa_node_index: (
            nodes[numa_node_index] & allowed
        ),
        "_get_logical_cpu_indices_sharing_same_physical_core_as": lambda *, logical_cpu_index: (
            siblings[logical_cpu_index]
        ),
    }
    for name, answer in answers.items():
        monkeypatch.setattr(binding, name, answer)
    for gpu, home in enumerate(GPUS):
        assert found[home] == binding._node_get_logical_cpus_to_bind_to(gpu_index=gpu)
        own = binding._exclusive_get_logical_cpus_to_bind_to(gpu_index=gpu)
        assert numa_binding.share(found[home], GPUS, gpu, kernel) == own


def test_what_a_job_has_nothing_of_is_no_share(kernel: Path) -> None:
    assert numa_binding.cpus_by_numa_node({0, 8}, kernel) == {0: {0, 8}}
    assert numa_binding.share({0, 8}, [0, 0], 0, kernel) == set()  # one core for two
    assert numa_binding.cpus_by_numa_node({0, 1}, kernel / "none") == {0: {0, 1}}


def bound(rank: int, size: int) -> set[int]:
    """Bind a thread, as only threads have CPUs; return those of a thread that it starts."""
    found: list[set[int]] = []

    def start() -> None:
        numa_binding.bind(rank, size, torch.device("cpu"))
        child = threading.Thread(target=lambda: found.append(os.sched_getaffinity(0)))
        child.start()
        child.join()

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
def test_the_processes_of_this_machine_share_its_cpus_out(monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.sched_getaffinity(0)
    nodes = numa_binding.cpus_by_numa_node(before)
    monkeypatch.setenv(NUMA_BINDING, "exclusive")
    both = [bound(rank, 2) for rank in range(2)]
    assert both[0] and both[1] and not both[0] & both[1]
    assert set().union(*both) == set().union(*nodes.values())
    monkeypatch.setenv(NUMA_BINDING, "node")
    assert bound(0, 1) in nodes.values()
    monkeypatch.delenv(NUMA_BINDING)
    assert bound(0, 2) == before


def test_who_cannot_be_bound_says_so_and_runs_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before = os.sched_getaffinity(0)
    monkeypatch.setenv(NUMA_BINDING, "exclusive")
    with caplog.at_level(logging.WARNING):
        numa_binding.bind(0, 10_000, torch.device("cpu"))
    assert "too few CPUs on NUMA node 0" in caplog.text
    assert os.sched_getaffinity(0) == before
