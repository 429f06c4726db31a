"""Sample the node of a process at intervals: processor, memory, disk, network and GPUs.

A thread reads psutil and, where there is an NVIDIA driver, NVML. What fails in it is missing in the
ledger and never affects training.
"""

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from peft_dist.ledger.events import GpuSample, LedgerEvent, SystemEvent

log = logging.getLogger(__name__)

END_TIMEOUT_S = 2.0
"""How long the end of a run waits for a sample, which a dead file server or driver can hold up."""


class SystemSampler:
    """Writes a system event every so many seconds until it is stopped."""

    def __init__(
        self,
        write: Callable[[LedgerEvent], None],
        *,
        every_s: float,
        folder: Path,
        step: Callable[[], int],
        gpu_uuids: Sequence[str] = (),
        others: Callable[[], Iterable[SystemEvent]] | None = None,
        at_end: Callable[[], None] | None = None,
    ) -> None:
        """Start the thread; its first sample comes after `every_s`.

        Args:
            write: Takes an event; called from the thread.
            every_s: Seconds between samples.
            folder: The run's; its disk's free space is sampled.
            step: Returns the steps done so far.
            gpu_uuids: The GPUs to sample, in the order of the event.
            others: Returns samples of other nodes, which are written after this one's.
            at_end: Called by the thread when it ends.
        """
        self._write, self._every_s, self._step = write, every_s, step
        self._folder, self._gpu_uuids = folder, gpu_uuids
        self._others, self._at_end = others, at_end
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="system", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Write no more; waits for a sample that is being taken, but not for long."""
        self._over.set()
        self._thread.join(timeout=END_TIMEOUT_S)

    def _run(self) -> None:
        self._sample()
        if self._at_end is not None:
            self._at_end()

    def _sample(self) -> None:
        node, warned = None, False
        while not self._over.wait(self._every_s if node else 0.0):
            try:
                if node is None:
                    node = _Node(self._folder, self._gpu_uuids)
                    continue
                self._publish(SystemEvent(step=self._step(), **node.sample()))
                for event in self._others() if self._others is not None else ():
                    self._publish(event)
            except Exception as error:  # of whatever kind: a view of the run must not harm it
                if not warned:
                    log.warning("the node could not be sampled: %s; training goes on", error)
                warned = True
                if node is None:
                    return

    def _publish(self, event: SystemEvent) -> None:
        if not self._over.is_set():
            self._write(event)


class _Node:
    """What can be read of this node, from the moment this is made."""

    def __init__(self, folder: Path, gpu_uuids: Sequence[str]) -> None:
        self._folder, self._process = folder, psutil.Process()
        self._gpus = _Gpus(gpu_uuids)
        self._network = psutil.net_io_counters()
        psutil.cpu_percent()

    def sample(self) -> dict[str, Any]:
        """Return the fields of an event; processor and network since the last sample."""
        memory = psutil.virtual_memory()
        found: dict[str, Any] = {
            "cpu_percent": psutil.cpu_percent(),
            "memory_used_bytes": memory.total - memory.available,
            "memory_total_bytes": memory.total,
            "process_rss_bytes": self._process.memory_info().rss,
            "disk_free_bytes": psutil.disk_usage(str(self._folder)).free,
        }
        before, self._network = self._network, psutil.net_io_counters()
        if before is not None and self._network is not None:
            # Where an interface goes away the counters fall.
            sent, received = (
                max(0, now - then) for now, then in zip(self._network[:2], before[:2], strict=True)
            )
            found |= {"network_sent_bytes": sent, "network_received_bytes": received}
        gpus = self._gpus.sample()
        return found | ({"gpus": gpus} if gpus else {})


class _Gpus:
    """GPUs as NVML sees them; none where its package or the driver is missing."""

    def __init__(self, uuids: Sequence[str]) -> None:
        self._handles: list[Any] = []
        if not uuids:
            return
        try:
            import pynvml
        except ImportError:
            log.warning("GPUs are not sampled: pip install 'peft-dist[gpu]'")
            return
        self._nvml = pynvml
        try:
            pynvml.nvmlInit()
            # NVML counts all GPUs of a machine, whatever this process was given of them.
            self._handles = [pynvml.nvmlDeviceGetHandleByUUID(uuid) for uuid in uuids]
        except pynvml.NVMLError as error:
            log.warning("GPUs are not sampled: %s", error)

    def sample(self) -> list[GpuSample]:
        """Return a sample of each; what a card does not report is left out."""
        return [self._read(handle) for handle in self._handles]

    def _read(self, handle: Any) -> GpuSample:
        nvml = self._nvml
        ways: dict[str, Callable[[], float]] = {
            "utilisation_percent": lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu,
            "memory_used_bytes": lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used,
            "memory_total_bytes": lambda: nvml.nvmlDeviceGetMemoryInfo(handle).total,
            "temperature_c": lambda: nvml.nvmlDeviceGetTemperature(
                handle, nvml.NVML_TEMPERATURE_GPU
            ),
            "power_w": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
        }
        found: dict[str, Any] = {}
        for name, read in ways.items():
            with suppress(nvml.NVMLError):
                found[name] = read()
        return GpuSample(**found)
