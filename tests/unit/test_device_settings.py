"""What a process tells torch about its device, before it uses it."""

import pytest
import torch

from peft_dist.distributed.stop_vote import MOST, StopVote, questions_until_next
from peft_dist.distributed.world import World
from peft_dist.model import varlen
from peft_dist.model.device_settings import DETERMINISTIC, export_determinism, set_up_device
from peft_dist.worker import process
from peft_dist.worker.process import set_allocator


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_memory_grows_in_place_unless_the_user_has_said_otherwise(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for installed, more in (("2.13.0+cu130", ",pinned_max_round_threshold_mb:1"), ("2.11.0", "")):
        monkeypatch.setattr(process, "version", lambda _, number=installed: number)
        empty: dict[str, str] = {}
        set_allocator(empty)
        assert empty == {"PYTORCH_ALLOC_CONF": f"expandable_segments:True{more}"}
    theirs = {name: "max_split_size_mb:64"}
    set_allocator(theirs)
    assert theirs == {name: "max_split_size_mb:64"}


def test_what_determinism_needs_is_exported_and_nothing_of_the_users_is_lost() -> None:
    environ = {"NCCL_ALGO": "Tree"}
    export_determinism(environ)
    assert environ == DETERMINISTIC | {"NCCL_ALGO": "Tree"}


def test_on_a_cpu_nothing_is_set() -> None:
    set_up_device(torch.device("cpu"), deterministic=True)
    assert not torch.are_deterministic_algorithms_enabled()
    assert not varlen.has_kernel(torch.device("cpu"), torch.bfloat16)


def test_on_a_cpu_a_vote_is_known_at_once(alone: World) -> None:
    vote = StopVote(alone.device)
    assert [vote.ask(wants) for wants in (False, True, False)] == [False, True, False]


@pytest.mark.parametrize(
    ("questions", "seconds", "expected"),
    [(0, 0.0, 3), (3, 0.3, 10), (10, 1.0, 10), (10, 30.0, 1), (1000, 0.0, MOST), (7, 0.0, MOST)],
)
def test_a_gpu_is_asked_once_a_second(questions: int, seconds: float, expected: int) -> None:
    assert questions_until_next(questions, seconds) == expected
