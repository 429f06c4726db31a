"""What a process tells torch about its device, before it uses it."""

import pytest
import torch

from peft_dist.distributed.stop_vote import StopVote
from peft_dist.distributed.world import World
from peft_dist.model import varlen
from peft_dist.model.device_settings import DETERMINISTIC, export_determinism, set_up_device
from peft_dist.worker.process import set_allocator


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_memory_grows_in_place_unless_the_user_has_said_otherwise(name: str) -> None:
    empty: dict[str, str] = {}
    set_allocator(empty)
    assert empty == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
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
