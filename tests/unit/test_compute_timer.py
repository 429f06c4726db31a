"""A process's own part of a step: without waiting for others."""

import time

import pytest
import torch

from peft_dist.sharding.compute_timer import ComputeTimer


def spend(seconds: float) -> None:
    time.sleep(seconds)


def test_what_a_process_waits_for_while_it_gathers_is_not_its_own_time() -> None:
    own = ComputeTimer(torch.device("cpu"))
    own.begin()
    spend(0.05)
    with own.gathering():
        spend(0.5)
    own.gathering()(spend)(0.5)
    own.end()
    spend(0.5)  # the exchange
    assert own.latest_s() == pytest.approx(0.05, abs=0.04)


def test_a_step_that_begins_anew_leaves_out_what_was_before() -> None:
    own = ComputeTimer(torch.device("cpu"))
    assert own.latest_s() is None
    own.begin()
    spend(0.5)  # an evaluation
    own.begin()
    spend(0.05)
    own.end()
    assert own.latest_s() == pytest.approx(0.05, abs=0.04)


def test_what_is_gathered_outside_a_step_counts_nowhere() -> None:
    own = ComputeTimer(torch.device("cpu"))
    with own.gathering():
        spend(0.01)
    own.end()
    assert own.latest_s() is None


def test_a_gather_that_fails_passes_its_error_on() -> None:
    own = ComputeTimer(torch.device("cpu"))
    own.begin()
    with pytest.raises(RuntimeError, match="peer"), own.gathering():
        raise RuntimeError("lost a peer")
