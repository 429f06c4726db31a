"""How the machine of a process fares: processor, memory, disk, network and GPUs, now and then.

Read by a thread of its own, from psutil and, where there is an NVIDIA driver, NVML. What fails in
it is missing in the ledger; training never hears of it.
"""

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from peft_dist.ledger.writer import Record

log = logging.getLogger(__name__)

END_TIMEOUT_S = 2.0
"""How long the end of a run waits for a sample, which a dead file server or driver can hold up."""


class SystemSampler:
    """Writes a `system` record every so many seconds until it is stopped."""

    def __init__(
        self,
        write: Callable[[Record], None],
        *,
        every_s: float,
        folder: Path,
        step: Callable[[], int],
        gpu_uuids: Sequence[str] = (),
        others: Callable[[], Iterable[Record]] | None = None,
        at_end: Callable[[], None] | None = None,
    ) -> None:
        """Start the thread; its first sample comes after `every_s`.

        Args:
            write: Takes a record; called from the thread.
            every_s: Seconds between samples.
            folder: The run's; the room on its disk is told.
            step: Returns the steps done so far.
            gpu_uuids: The GPUs to watch, in the order of their records.
            others: Returns records of other machines, which are written after this one's.
            at_end: Called by the thread when it writes no more.
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
        self._watch()
        if self._at_end is not None:
            self._at_end()

    def _watch(self) -> None:
        machine, warned = None, False
        while not self._over.wait(self._every_s if machine else 0.0):
            try:
                if machine is None:
                    machine = _Machine(self._folder, self._gpu_uuids)
                    continue
                self._tell({"event": "system", "step": self._step(), **machine.sample()})
                for record in self._others() if self._others is not None else ():
                    self._tell(record)
            except Exception as error:  # of whatever kind: a view of the run must not harm it
                if not warned:
                    log.warning("the machine could not be looked at: %s; training goes on", error)
                warned = True
                if machine is None:
                    return

    def _tell(self, record: Record) -> None:
        if not self._over.is_set():
            self._write(record)


class _Machine:
    """What can be read of this machine, from the moment this is made."""

    def __init__(self, folder: Path, gpu_uuids: Sequence[str]) -> None:
        self._folder, self._process = folder, psutil.Process()
        self._gpus = _Gpus(gpu_uuids)
        self._network = psutil.net_io_counters()
        psutil.cpu_percent()

    def sample(self) -> Record:
        """Return how it is now; processor and network are those of the time since the last one."""
        memory = psutil.virtual_memory()
        found: Record = {
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
            log.warning("GPUs are not watched: pip install 'peft-dist[gpu]'")
            return
        self._nvml = pynvml
        try:
            pynvml.nvmlInit()
            # NVML counts all GPUs of a machine, whatever this process was given of them.
            self._handles = [pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}") for uuid in uuids]
        except pynvml.NVMLError as error:
            log.warning("GPUs are not watched: %s", error)

    def sample(self) -> list[Record]:
        """Return the figures of each; what a card does not tell is left out."""
        return [self._figures(handle) for handle in self._handles]

    def _figures(self, handle: Any) -> Record:
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
        found: Record = {}
        for name, read in ways.items():
            with suppress(nvml.NVMLError):
                found[name] = read()
        return found
