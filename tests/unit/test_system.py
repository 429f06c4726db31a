"""The machine of a run, watched by a thread that harms nothing."""

import logging
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import psutil
import pytest

from peft_dist.ledger.events import LedgerEvent
from peft_dist.ledger.writer import LedgerWriter
from peft_dist.tracking.system import SystemSampler

FIELDS = {
    "event", "step", "cpu_percent", "memory_used_bytes", "memory_total_bytes", "process_rss_bytes",
    "disk_free_bytes", "network_sent_bytes", "network_received_bytes",
}  # fmt: skip


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def watched(folder: Path, *, count: int = 2, **more: Any) -> list[dict[str, Any]]:
    """Return the first samples of a machine."""
    events: list[LedgerEvent] = []
    sampler = SystemSampler(events.append, every_s=0.05, folder=folder, step=lambda: 7, **more)
    wait_until(lambda: len(events) >= count)
    sampler.stop()
    return [event.fields() for event in events]


def test_a_sample_has_what_psutil_sees(tmp_path: Path) -> None:
    for record in watched(tmp_path):
        assert record.keys() == FIELDS
        assert (record["event"], record["step"]) == ("system", 7)
        assert 0 <= record["cpu_percent"] <= 100
        assert 0 < record["process_rss_bytes"] < record["memory_used_bytes"]
        assert record["memory_used_bytes"] < record["memory_total_bytes"]
        assert record["memory_total_bytes"] == psutil.virtual_memory().total
        assert record["disk_free_bytes"] > 0
        assert record["network_sent_bytes"] >= 0


def test_the_network_is_that_since_the_last_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real counters are those of the whole machine, on which other tests talk as well."""
    counted = [(0, 0), (0, 5), (1_000_000, 5), (1_000_007, 6)]

    def counters() -> tuple[int, int]:
        return counted.pop(0) if len(counted) > 1 else counted[0]

    monkeypatch.setattr(psutil, "net_io_counters", counters)
    records: list[dict[str, Any]] = []
    sampler = SystemSampler(
        lambda event: records.append(event.fields()), every_s=0.01, folder=tmp_path, step=lambda: 0
    )
    wait_until(lambda: len(records) >= 4)
    sampler.stop()
    found = [(one["network_sent_bytes"], one["network_received_bytes"]) for one in records[:4]]
    assert found == [(0, 5), (1_000_000, 0), (7, 1), (0, 0)]


def test_after_the_stop_nothing_is_written(tmp_path: Path) -> None:
    records: list[LedgerEvent] = []
    sampler = SystemSampler(records.append, every_s=0.01, folder=tmp_path, step=lambda: 0)
    wait_until(lambda: bool(records))
    sampler.stop()
    count = len(records)
    time.sleep(0.1)
    assert len(records) == count
    assert "system" not in [thread.name for thread in threading.enumerate()]


def test_a_sample_that_fails_is_told_once_and_the_next_one_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "late"
    records: list[LedgerEvent] = []
    sampler = SystemSampler(records.append, every_s=0.02, folder=folder, step=lambda: 0)
    wait_until(lambda: bool(caplog.records))
    time.sleep(0.2)
    assert not records
    folder.mkdir()
    wait_until(lambda: bool(records))
    sampler.stop()
    (warning,) = caplog.records
    assert "No such file" in warning.message and "training goes on" in warning.message


def test_a_ledger_that_is_another_attempts_by_now_ends_no_thread_and_no_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def check() -> None:
        raise RuntimeError("taken over")

    ledger = LedgerWriter(tmp_path / "l", check=check)
    sampler = SystemSampler(ledger.write, every_s=0.01, folder=tmp_path, step=lambda: 0)
    wait_until(lambda: bool(caplog.records))
    time.sleep(0.1)
    sampler.stop()
    ledger.close()
    assert (tmp_path / "l").read_bytes() == b""
    assert len(caplog.records) == 1


def test_the_end_does_not_wait_for_a_disk_that_does_not_answer(tmp_path: Path) -> None:
    release, asked = threading.Event(), threading.Event()
    records: list[LedgerEvent] = []

    def step() -> int:
        asked.set()
        release.wait()
        return 0

    sampler = SystemSampler(records.append, every_s=0.01, folder=tmp_path, step=step)
    assert asked.wait(30)
    begun = time.monotonic()
    sampler.stop()
    assert time.monotonic() - begun < 5.0
    release.set()
    wait_until(lambda: "system" not in [thread.name for thread in threading.enumerate()])
    assert not records


def test_without_a_driver_gpus_are_left_out_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pynvml = pytest.importorskip("pynvml")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        records = watched(tmp_path, gpu_uuids=["12345678-1234-1234-1234-123456789012"])
        assert all(record.keys() == FIELDS for record in records)
        assert [record.levelno for record in caplog.records] == [logging.WARNING]
        return
    pytest.skip("there is a driver")


def test_without_nvml_gpus_are_left_out_and_the_remedy_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "gpus" not in watched(tmp_path, gpu_uuids=["one"])[0]
    assert "pip install 'peft-dist[gpu]'" in caplog.text


class CardError(Exception):
    """What a card does not tell."""


def nvml_of_two_cards() -> ModuleType:
    """Return what stands for the driver's library: one card, and one that tells no power."""

    def power(handle: str) -> int:
        if handle == "GPU-mute":
            raise CardError("Not Supported")
        return 312_500

    module = ModuleType("pynvml")
    vars(module).update(
        NVMLError=CardError,
        NVML_TEMPERATURE_GPU=0,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda name: name,
        nvmlDeviceGetUtilizationRates=lambda handle: SimpleNamespace(gpu=97, memory=40),
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(used=10**10, total=8 * 10**10),
        nvmlDeviceGetTemperature=lambda handle, sensor: 61,
        nvmlDeviceGetPowerUsage=power,
    )
    return module


def test_each_gpu_has_its_figures_and_what_a_card_does_not_tell_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml_of_two_cards())
    one, other = watched(tmp_path, gpu_uuids=["GPU-loud", "GPU-mute"])[0]["gpus"]
    assert one == {
        "utilisation_percent": 97, "memory_used_bytes": 10**10, "memory_total_bytes": 8 * 10**10,
        "temperature_c": 61, "power_w": 312.5,
    }  # fmt: skip
    assert other == {name: value for name, value in one.items() if name != "power_w"}
