"""What the gradient all-reduce carries: one list from the sum of what each process adds."""

import torch

from peft_dist.distributed.world import World
from peft_dist.metrics.step import StepInputs, StepMetricsReader, make_extras

CPU = torch.device("cpu")
GIGABYTES_80 = 85_899_345_920
INPUTS = StepInputs(step=7, lr=0.1, rows=8, cursor=56, tokens=640)


def summed(*own_s: float | None) -> torch.Tensor:
    """Return the extras of so many processes, summed as an exchange would."""
    worlds = [World(rank, len(own_s), rank, len(own_s), CPU) for rank in range(len(own_s))]
    return torch.stack(
        [
            make_extras(
                world,
                torch.tensor(1.5),
                torch.tensor([0.25, float("nan") if world.rank else 0.0]),
                flags=(world.rank == 1, False, world.rank < 2),
                step_s=seconds,
                memory_bytes=GIGABYTES_80 - world.rank * 1_000_000,
            )
            for world, seconds in zip(worlds, own_s, strict=True)
        ]
    ).sum(0)


def test_each_process_finds_its_figures_at_its_place() -> None:
    extras = summed(0.25, 1.75, 0.5)
    reader = StepMetricsReader(CPU, objective=("reward_accuracy", "kl"))
    reader.put(INPUTS, torch.cat([torch.tensor([2.0, 3.0, 1.0]), extras[1:]]))
    ((inputs, metrics),) = reader.take(keep=0)
    assert inputs == INPUTS
    assert (metrics.loss, metrics.norm) == (2.0, 3.0)
    assert (metrics.stop, metrics.save, metrics.give_up) == (1.0, 0.0, 2.0)
    fields = metrics.fields()
    assert extras[0] == 4.5
    assert fields["reward_accuracy"] == 0.75
    assert "kl" not in fields  # it is not a number on some process: there was nothing to average
    assert fields["rank_step_s"] == [0.25, 1.75, 0.5]
    for rank, memory in enumerate(fields["rank_memory_bytes"]):
        assert abs(memory - (GIGABYTES_80 - rank * 1_000_000)) <= 4096  # of 80 GB, in float32


def test_times_that_are_not_known_yet_are_left_out() -> None:
    reader = StepMetricsReader(CPU, objective=("reward_accuracy", "kl"))
    for seconds in (None, 0.0):
        reader.put(INPUTS, torch.cat([torch.zeros(3), summed(seconds, 0.5)[1:]]))
    for _, metrics in reader.take(keep=0):
        assert "rank_step_s" not in metrics.fields()
        assert len(metrics.fields()["rank_memory_bytes"]) == 2


def test_the_losses_of_sources_are_summed_over_processes_and_divided_by_their_own_count() -> None:
    extras = [
        make_extras(
            World(rank, 2, rank, 2, CPU),
            torch.tensor(0.0),
            torch.zeros(0),
            flags=(False, False, False),
            step_s=0.5,
            memory_bytes=1,
            source_nll=torch.tensor([rank + 1.0, 4.0, 0.0]),
        )
        for rank in range(2)
    ]
    reader = StepMetricsReader(CPU, sources=3)
    reader.put(INPUTS, torch.cat([torch.zeros(3), torch.stack(extras).sum(0)[1:]]))
    ((_, metrics),) = reader.take(keep=0)
    fields = metrics.fields((6, 2, 0))
    assert fields["source_loss"] == [0.5, 4.0, None]
    assert fields["rank_step_s"] == [0.5, 0.5]
    assert fields["rank_memory_bytes"] == [1, 1]
