"""What travels with the gradients: one list from the sum of what each process adds."""

import torch

from peft_dist.distributed.world import World
from peft_dist.metrics.step import FiguresReader, make_riders

CPU = torch.device("cpu")
GIGABYTES_80 = 85_899_345_920


def summed(*own_s: float | None) -> torch.Tensor:
    """Return the riders of so many processes, summed as an exchange would."""
    worlds = [World(rank, len(own_s), rank, len(own_s), CPU) for rank in range(len(own_s))]
    return torch.stack(
        [
            make_riders(
                world,
                torch.tensor(1.5),
                told=(world.rank == 1, False, world.rank < 2),
                step_s=seconds,
                memory_bytes=GIGABYTES_80 - world.rank * 1_000_000,
            )
            for world, seconds in zip(worlds, own_s, strict=True)
        ]
    ).sum(0)


def test_each_process_finds_its_figures_at_its_place() -> None:
    riders = summed(0.25, 1.75, 0.5)
    reader = FiguresReader(CPU)
    reader.put({"step": 7}, torch.cat([torch.tensor([2.0, 3.0]), riders[1:]]))
    ((record, figures),) = reader.take(keep=0)
    assert record == {"step": 7}
    assert (figures.loss, figures.norm) == (2.0, 3.0)
    assert (figures.stop, figures.save, figures.give_up) == (1.0, 0.0, 2.0)
    facts = figures.facts()
    assert riders[0] == 4.5
    assert facts["rank_step_s"] == [0.25, 1.75, 0.5]
    for rank, memory in enumerate(facts["rank_memory_bytes"]):
        assert abs(memory - (GIGABYTES_80 - rank * 1_000_000)) <= 4096  # of 80 GB, in float32


def test_times_that_are_not_known_yet_are_left_out() -> None:
    reader = FiguresReader(CPU)
    for seconds in (None, 0.0):
        reader.put({}, torch.cat([torch.zeros(2), summed(seconds, 0.5)[1:]]))
    for _, figures in reader.take(keep=0):
        assert "rank_step_s" not in figures.facts()
        assert len(figures.facts()["rank_memory_bytes"]) == 2
