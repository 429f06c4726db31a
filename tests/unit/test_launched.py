"""What the launcher exported against what the recipe says."""

import pytest
import torch

from peft_dist.config.recipe import Parallel
from peft_dist.dist import World, read_world
from peft_dist.errors import LaunchError
from peft_dist.shard.launched import Launched, resolve

ACCELERATE = {"ACCELERATE_MIXED_PRECISION": "no"}
FSDP = ACCELERATE | {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
HSDP = FSDP | {
    "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2",
    "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2",
}


def world(size: int, local_size: int | None = None) -> World:
    return World(0, size, 0, local_size or size, torch.device("cpu"))


@pytest.mark.parametrize(
    ("environ", "size", "expected"),
    [
        (ACCELERATE, 2, Launched("ddp", 1)),
        (FSDP, 2, Launched("fsdp", 2)),
        (HSDP, 4, Launched("hsdp", 2)),
        (HSDP | {"PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "1"}, 2, Launched("hsdp", 2)),
        ({}, 3, Launched("fsdp", 3)),  # torchrun and plain python say nothing
    ],
)
def test_auto_is_what_the_launcher_says(
    environ: dict[str, str], size: int, expected: Launched
) -> None:
    assert resolve(Parallel(), world(size), environ) == expected
    named = Parallel.model_validate({"strategy": expected.strategy, "processes": size})
    assert resolve(named, world(size), environ) == expected


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "hsdp"])
def test_the_recipe_decides_where_the_launcher_is_silent(strategy: str) -> None:
    found = resolve(Parallel.model_validate({"strategy": strategy}), world(4, 2), {})
    assert found == Launched(strategy, {"ddp": 1, "fsdp": 4, "hsdp": 2}[strategy])


@pytest.mark.parametrize(
    ("parallel", "environ", "message"),
    [
        ({"processes": 3}, {}, "parallel.processes: the recipe says 3, the launcher started 4"),
        ({"strategy": "fsdp"}, ACCELERATE, "the recipe says fsdp, accelerate launch says ddp"),
        ({"strategy": "ddp"}, FSDP, "the recipe says ddp, accelerate launch says fsdp"),
        ({"strategy": "fsdp"}, HSDP, "the recipe says fsdp, accelerate launch says hsdp"),
        ({"shard_size": 4}, HSDP, "the recipe says 4, accelerate launch says 2"),
        ({"strategy": "hsdp", "shard_size": 3}, {}, "3 does not divide 4 processes"),
        ({}, FSDP | {"FSDP_VERSION": "1"}, "FSDP version 1; set fsdp_version: 2"),
        ({}, ACCELERATE | {"ACCELERATE_USE_DEEPSPEED": "true"}, "says deepspeed"),
    ],
)
def test_a_contradiction_is_one_line_that_names_both_sides(
    parallel: dict[str, object], environ: dict[str, str], message: str
) -> None:
    with pytest.raises(LaunchError) as caught:
        resolve(Parallel.model_validate(parallel), world(4), environ)
    assert message in str(caught.value)
    assert str(caught.value).startswith("parallel.")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "environ",
    [
        {"RANK": "2", "WORLD_SIZE": "2"},
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "3"},
        {"RANK": "-1"},
        {"RANK": "x"},
        {"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "2"},
    ],
)
def test_numbers_that_no_launcher_exports_are_refused(
    monkeypatch: pytest.MonkeyPatch, environ: dict[str, str]
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, text in environ.items():
        monkeypatch.setenv(name, text)
    with pytest.raises(LaunchError, match="environment"):
        read_world()
