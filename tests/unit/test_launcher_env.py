"""What the launcher exported against what the recipe says."""

from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch

from peft_dist.common.errors import LaunchError
from peft_dist.config.parallel import Parallel
from peft_dist.distributed.world import World, read_world
from peft_dist.sharding import deepspeed_zero
from peft_dist.sharding.launcher_env import Launched, deepspeed_exports, resolve

ACCELERATE = {"ACCELERATE_MIXED_PRECISION": "no"}
FSDP = ACCELERATE | {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
HSDP = FSDP | {
    "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2",
    "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2",
}
DEEPSPEED = ACCELERATE | {"ACCELERATE_USE_DEEPSPEED": "true"}
ZERO2 = DEEPSPEED | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}
ZERO3 = DEEPSPEED | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
TO_CPU = {"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"}
# What `accelerate config` writes besides, and what its file exports.
ASKED = {
    "ACCELERATE_MIXED_PRECISION": "bf16",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true",
    "ACCELERATE_GRADIENT_CLIPPING": "1.0",
}
FSDP_ASKED = {
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
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
        (FSDP | FSDP_ASKED, 2, Launched("fsdp", 2)),
        (ZERO2, 2, Launched("zero2", 1)),
        (ZERO3, 4, Launched("zero3", 4)),
        (ZERO2 | ASKED, 2, Launched("zero2", 1)),
        (ZERO3 | ASKED, 2, Launched("zero3", 2)),
        (ZERO2 | TO_CPU, 2, Launched("zero2", 1)),  # asked for every stage, and nothing to move
    ],
)
def test_auto_is_what_the_launcher_says(
    environ: dict[str, str], size: int, expected: Launched
) -> None:
    assert resolve(Parallel(), world(size), environ) == expected
    named = Parallel.model_validate({"strategy": expected.strategy, "processes": size})
    assert resolve(named, world(size), environ) == expected


@pytest.mark.parametrize(
    ("strategy", "shard_size"), [("ddp", 1), ("fsdp", 4), ("hsdp", 2), ("zero2", 1), ("zero3", 4)]
)
def test_the_recipe_decides_where_the_launcher_is_silent(strategy: str, shard_size: int) -> None:
    found = resolve(Parallel.model_validate({"strategy": strategy}), world(4, 2), {})
    assert found == Launched(strategy, shard_size)


@pytest.mark.parametrize(
    ("environ", "strategy"),
    [
        (FSDP | FSDP_ASKED | {"FSDP_OFFLOAD_PARAMS": "true"}, "fsdp"),
        (HSDP | {"FSDP_OFFLOAD_PARAMS": "true"}, "hsdp"),
        (ZERO3 | ASKED | TO_CPU, "zero3"),
    ],
)
def test_offload_is_what_the_launcher_says(environ: dict[str, str], strategy: str) -> None:
    found = resolve(Parallel(), world(2), environ)
    assert (found.strategy, found.offload) == (strategy, True)
    assert resolve(Parallel(offload="cpu"), world(2), environ) == found


@pytest.mark.parametrize("environ", [FSDP | FSDP_ASKED, HSDP, ZERO3, ZERO3 | ASKED, {}])
def test_the_recipe_may_offload_where_the_launcher_does_not(environ: dict[str, str]) -> None:
    assert resolve(Parallel(offload="cpu"), world(2), environ).offload


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"zero_optimization": {"stage": 2}}', Launched("zero2", 1)),
        ('{"zero_optimization": {"stage": 3}, "bf16": {"enabled": true}}', Launched("zero3", 2)),
        (
            '{"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}',
            Launched("zero3", 2, offload=True),
        ),
    ],
)
def test_a_deepspeed_json_file_says_stage_and_offload(
    tmp_path: Path, text: str, expected: Launched
) -> None:
    file = tmp_path / "zero.json"
    file.write_text(text, encoding="utf-8")
    assert resolve(Parallel(), world(2), deepspeed_exports(file)) == expected


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "is no DeepSpeed JSON file"),
        ("[]", "is no DeepSpeed JSON file"),
        ("{}", "is no DeepSpeed JSON file"),
        ('{"zero_optimization": 3}', "zero_optimization is not an object"),
        ('{"zero_optimization": {"offload_param": "cpu"}}', "zero_optimization is not an object"),
        ('{"zero_optimization": {}}', "ZeRO stage 0 is not supported"),
        ('{"zero_optimization": {"stage": "auto"}}', "ZeRO stage auto is not supported"),
        (
            '{"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}',
            "offload_param to nvme is not supported; set cpu or none",
        ),
        (None, "cannot be read: No such file"),
    ],
)
def test_a_deepspeed_json_file_that_cannot_be_followed_is_named(
    tmp_path: Path, text: str | None, problem: str
) -> None:
    file = tmp_path / "zero.json"
    if text is not None:
        file.write_text(text, encoding="utf-8")
    with pytest.raises(LaunchError) as caught:
        resolve(Parallel(), world(2), deepspeed_exports(file))
    assert str(caught.value).startswith(f"{file}: ")
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("environ", "problem"),
    [
        (DEEPSPEED | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}, "ZeRO stage 1 is not supported"),
        (DEEPSPEED, "ZeRO stage 0 is not supported"),
        (
            ZERO3 | {"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "nvme"},
            "offload_param to nvme is not supported",
        ),
    ],
)
def test_what_accelerate_says_and_no_engine_does_is_refused(
    environ: dict[str, str], problem: str
) -> None:
    with pytest.raises(LaunchError, match=f"accelerate launch: {problem}"):
        resolve(Parallel(), world(2), environ)


@pytest.mark.parametrize(
    ("parallel", "environ", "message"),
    [
        ({"processes": 3}, {}, "parallel.processes: the recipe says 3, the launcher started 4"),
        ({"strategy": "fsdp"}, ACCELERATE, "the recipe says fsdp, the launcher says ddp"),
        ({"strategy": "ddp"}, FSDP, "the recipe says ddp, the launcher says fsdp"),
        ({"strategy": "fsdp"}, HSDP, "the recipe says fsdp, the launcher says hsdp"),
        ({"shard_size": 4}, HSDP, "the recipe says 4, the launcher says 2"),
        ({"strategy": "hsdp", "shard_size": 3}, {}, "3 does not divide 4 processes"),
        ({}, FSDP | {"FSDP_VERSION": "1"}, "FSDP version 1; set fsdp_version: 2"),
        ({"strategy": "ddp"}, ZERO2, "the recipe says ddp, the launcher says zero2"),
        ({"strategy": "zero3"}, ZERO2, "the recipe says zero3, the launcher says zero2"),
        ({"strategy": "zero3"}, FSDP, "the recipe says zero3, the launcher says fsdp"),
        (
            {"offload": "none"},
            ZERO3 | TO_CPU,
            "parallel.offload: the recipe says none, the launcher says cpu",
        ),
        (
            {"offload": "none"},
            FSDP | {"FSDP_OFFLOAD_PARAMS": "true"},
            "parallel.offload: the recipe says none, the launcher says cpu",
        ),
        ({"offload": "cpu"}, ACCELERATE, "the recipe says cpu, the launcher says ddp"),
        ({"offload": "cpu"}, ZERO2, "the recipe says cpu, the launcher says zero2"),
        (
            {"reshard": "step"},
            ZERO2,
            "parallel.reshard: has no meaning here: the strategy is zero2",
        ),
        (
            {"dequantized_blocks": 1},
            ZERO3,
            "parallel.dequantized_blocks: has no meaning here: the strategy is zero3",
        ),
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


@pytest.mark.parametrize(
    ("environ", "refused"),
    [
        ({}, True),
        ({"CUDA_VISIBLE_DEVICES": "0"}, True),
        ({"CUDA_VISIBLE_DEVICES": ""}, False),
        ({"ACCELERATE_USE_CPU": "true"}, False),
    ],
)
def test_gpus_that_torch_does_not_see_are_refused_unless_the_cpu_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], refused: bool
) -> None:
    (tmp_path / "nvidia0").touch()
    for name in ("ACCELERATE_USE_CPU", "CUDA_VISIBLE_DEVICES", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, text in environ.items():
        monkeypatch.setenv(name, text)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if not refused:
        assert read_world(tmp_path).device.type == "cpu"
        return
    with pytest.raises(LaunchError, match="1 GPUs are here, and torch .* sees none"):
        read_world(tmp_path)


def test_a_missing_deepspeed_is_one_line_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(deepspeed_zero, "version", missing)
    for engine in (deepspeed_zero.ZeRO2Engine, deepspeed_zero.ZeRO3Engine):
        with pytest.raises(LaunchError) as caught:
            engine(world(1), shard_size=1)
        assert "deepspeed is not installed" in str(caught.value)
        assert "pip install 'peft-dist[deepspeed]'" in str(caught.value)


@pytest.mark.parametrize("found", ["0.18.9", "0.20.0", "1.0.0"])
def test_a_deepspeed_that_was_never_tried_is_refused(
    monkeypatch: pytest.MonkeyPatch, found: str
) -> None:
    monkeypatch.setattr(deepspeed_zero, "version", lambda name: found)
    with pytest.raises(LaunchError, match=f"deepspeed {found} is not"):
        deepspeed_zero.require_deepspeed()


@pytest.mark.parametrize("environ", [ACCELERATE, FSDP, ZERO3, {}])
def test_a_shard_size_is_refused_where_the_launcher_has_no_groups(environ: dict[str, str]) -> None:
    with pytest.raises(LaunchError, match=r"parallel\.shard_size: has no meaning here"):
        resolve(Parallel(shard_size=2), world(4), environ)
    assert resolve(Parallel(shard_size=2), world(4), HSDP) == Launched("hsdp", 2)
