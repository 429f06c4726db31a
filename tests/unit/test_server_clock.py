"""The clock of a file system's server, beside this machine's."""

import os
import time
from pathlib import Path

import pytest

from peft_dist.common import server_clock
from peft_dist.common.server_clock import ahead_s
from peft_dist.status.run_state import read_run, view
from tests.unit.run_folders import lease, make_run


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_clock, "_ahead_s", {})


def test_this_machines_own_disk_has_its_own_clock_and_is_left_as_it_was(
    fresh: None, tmp_path: Path
) -> None:
    assert abs(ahead_s(tmp_path)) < 60
    assert list(tmp_path.iterdir()) == []
    assert ahead_s(tmp_path / "none") == 0.0


@pytest.mark.parametrize("offset_s", [-3600.0, 3600.0])
def test_a_machine_whose_clock_is_wrong_sees_the_age_of_a_beat_rightly(
    fresh: None, offset_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run")
    lease(run, 1)
    (record,) = (run / "attempts").iterdir()
    os.utime(record, (time.time() - 200, time.time() - 200))
    right = time.time
    monkeypatch.setattr(time, "time", lambda: right() + offset_s)
    age_s = view(read_run(run), {}, name="run", now=time.time()).heartbeat_s
    assert age_s is not None and 190 < age_s < 600
