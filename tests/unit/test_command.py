"""Where processes go and the one command that starts them; no process is started here."""

import shlex
from pathlib import Path

import pytest

from peft_dist.common.errors import LaunchError
from peft_dist.config import Recipe, load_recipe
from peft_dist.config.batch_shape import batch_shape
from peft_dist.launch.command import Meeting, launch_environment, shell_line, worker_command
from peft_dist.launch.placement import Machine, plan_processes, this_machine

CPU = Machine(gpus=0, cores=8)


def recipe(**parallel: object) -> Recipe:
    return Recipe.model_validate(
        {"model": {"name": "m"}, "data": {"train": "d"}, "parallel": parallel}
    )


def test_processes_default_to_one_per_gpu_and_one_without() -> None:
    assert plan_processes(recipe(), Machine(gpus=4, cores=64)).processes == 4
    assert plan_processes(recipe(), CPU).processes == 1


def test_auto_is_fsdp_over_all_processes() -> None:
    placement = plan_processes(recipe(processes=4), CPU)
    assert (placement.strategy, placement.shard_size, placement.replicas) == ("fsdp", 4, 1)


def test_ddp_holds_one_copy_per_process() -> None:
    placement = plan_processes(recipe(strategy="ddp", processes=4), CPU)
    assert (placement.shard_size, placement.replicas) == (1, 4)


def test_zero2_is_placed_as_ddp_is_and_zero3_as_fsdp() -> None:
    for strategy, twin in (("zero2", "ddp"), ("zero3", "fsdp")):
        placement = plan_processes(recipe(strategy=strategy, processes=4), CPU)
        expected = plan_processes(recipe(strategy=twin, processes=4), CPU)
        assert (placement.shard_size, placement.replicas) == (
            expected.shard_size,
            expected.replicas,
        )


def test_hsdp_makes_replicas_of_shard_groups() -> None:
    placement = plan_processes(recipe(strategy="hsdp", processes=4, shard_size=2), CPU)
    assert (placement.shard_size, placement.replicas) == (2, 2)


def test_more_processes_than_gpus_are_refused_with_both_ways_out() -> None:
    with pytest.raises(LaunchError, match=r"--nproc 2, or CUDA_VISIBLE_DEVICES="):
        plan_processes(recipe(processes=4), Machine(gpus=2, cores=8))


def test_a_shard_size_that_does_not_divide_is_refused() -> None:
    with pytest.raises(LaunchError, match="3 does not divide 4 processes"):
        plan_processes(recipe(strategy="hsdp", shard_size=3), Machine(gpus=4, cores=8))


def test_threads_are_shared_and_never_none() -> None:
    assert plan_processes(recipe(processes=2), CPU).threads_per_process == 4
    assert plan_processes(recipe(processes=16), CPU).threads_per_process == 1


@pytest.mark.parametrize(
    ("visible", "gpus"),
    [(None, 2), ("", 0), ("0", 1), ("1,0", 2), ("-1", 0), ("0,7,1", 1), ("GPU-8f2a,GPU-91cc", 2)],
)
def test_visible_gpus_are_counted_as_cuda_does(
    tmp_path: Path, visible: str | None, gpus: int
) -> None:
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert this_machine(environ, tmp_path).gpus == gpus


def test_a_setting_cannot_conjure_gpus_on_a_machine_without(tmp_path: Path) -> None:
    assert this_machine({"CUDA_VISIBLE_DEVICES": "0,1"}, tmp_path) == this_machine({}, tmp_path)


def test_the_command_is_accelerate_with_the_strategy_file() -> None:
    command = worker_command(
        plan_processes(recipe(processes=2), CPU),
        "train.py",
        ["/runs/a/recipe.yaml"],
        python="py",
        root=Path("/r"),
    )
    assert command == [
        "py", "-m", "accelerate.commands.launch",
        "--config_file", "/r/launch/strategies/fsdp.yaml", "--num_processes", "2",
        "--rdzv_backend", "peft-dist", "/r/launch/train.py", "/runs/a/recipe.yaml",
    ]  # fmt: skip


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "hsdp", "zero2", "zero3"])
def test_every_strategy_has_its_file(strategy: str) -> None:
    command = worker_command(
        plan_processes(recipe(strategy=strategy, processes=2), CPU), "train.py", []
    )
    file = Path(command[command.index("--config_file") + 1])
    assert file.name == f"{strategy}.yaml"
    assert file.is_file()


def test_restarts_in_place_are_asked_of_the_launcher_not_of_the_script() -> None:
    command = worker_command(
        plan_processes(recipe(processes=2), CPU), "train.py", ["r"], max_restarts=3
    )
    at = command.index("--max_restarts")
    assert command[at + 1] == "3"
    assert Path(command[at + 2]).name == "train.py"
    assert "--max_restarts" not in worker_command(plan_processes(recipe(), CPU), "train.py", [])


def test_hsdp_passes_its_mesh() -> None:
    placement = plan_processes(recipe(strategy="hsdp", processes=4, shard_size=2), CPU)
    line = " ".join(worker_command(placement, "train.py", ["r.yaml"]))
    assert "--parallelism_config_dp_replicate_size 2" in line
    assert "--parallelism_config_dp_shard_size 2" in line


SETTINGS = "node=1,host=node1,port=20120,join_timeout_s=120"
MEETING = Meeting(node="1", host="node1", port="20120", settings=SETTINGS)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "hsdp", "zero2", "zero3"])
def test_the_launchers_of_several_nodes_meet_where_they_are_told(strategy: str) -> None:
    placement = plan_processes(recipe(strategy=strategy), Machine(gpus=4, cores=8), 2)
    command = worker_command(placement, "train.py", ["r"], root=Path("/r"), meeting=MEETING)
    options = dict(zip(command[3:-2:2], command[4:-2:2], strict=True))
    expected = {
        "--config_file": f"/r/launch/strategies/{strategy}.yaml",
        "--num_processes": "8",
        "--num_machines": "2",
        "--machine_rank": "1",
        "--main_process_ip": "node1",
        "--main_process_port": "20120",
        "--rdzv_backend": "peft-dist",
        "--rdzv_conf": SETTINGS,
    }
    if strategy in ("zero2", "zero3"):
        expected["--deepspeed_multinode_launcher"] = "standard"
    if strategy == "hsdp":
        expected["--parallelism_config_dp_replicate_size"] = "2"
        expected["--parallelism_config_dp_shard_size"] = "4"
    assert options == expected


def test_one_node_meets_nobody_else_and_nobody_by_pickles() -> None:
    placement = plan_processes(recipe(processes=2), CPU)
    command = worker_command(placement, "train.py", ["r"])
    assert not {"--num_machines", "--machine_rank", "--rdzv_conf"} & set(command)
    assert command[command.index("--rdzv_backend") + 1] == "peft-dist"
    assert launch_environment(placement, {})["PET_RDZV_ENDPOINT"] == "127.0.0.1:0"
    several = plan_processes(recipe(), Machine(gpus=4, cores=8), 2)
    assert "PET_RDZV_ENDPOINT" not in launch_environment(several, {})


def test_accelerate_knows_every_option_that_it_is_given() -> None:
    from accelerate.commands.launch import launch_command_parser

    for strategy in ("ddp", "hsdp", "zero3"):
        placement = plan_processes(recipe(strategy=strategy), Machine(gpus=4, cores=8), 2)
        command = worker_command(placement, "train.py", ["r"], max_restarts=3, meeting=MEETING)
        parsed = launch_command_parser().parse_args(command[3:])
        assert (parsed.num_machines, parsed.num_processes, parsed.machine_rank) == (2, 8, 1)
        assert parsed.training_script_args == ["r"]


def test_the_environment_says_cpu_only_where_there_is_no_gpu() -> None:
    on_cpu = launch_environment(plan_processes(recipe(processes=2), CPU), {})
    on_gpu = launch_environment(plan_processes(recipe(), Machine(gpus=2, cores=8)), {})
    assert on_cpu["ACCELERATE_USE_CPU"] == "true"
    assert "ACCELERATE_USE_CPU" not in on_gpu
    assert on_cpu["OMP_NUM_THREADS"] == "4"


def test_deepspeed_is_told_that_there_is_no_gpu() -> None:
    for strategy, expected in (("zero2", "cpu"), ("zero3", "cpu"), ("fsdp", None)):
        placement = plan_processes(recipe(strategy=strategy, processes=2), CPU)
        assert launch_environment(placement, {}).get("DS_ACCELERATOR") == expected
    on_gpu = plan_processes(recipe(strategy="zero3"), Machine(gpus=2, cores=8))
    assert "DS_ACCELERATOR" not in launch_environment(on_gpu, {})


def test_threads_that_the_user_chose_are_left_alone() -> None:
    extra = launch_environment(plan_processes(recipe(processes=2), CPU), {"OMP_NUM_THREADS": "3"})
    assert "OMP_NUM_THREADS" not in extra


def test_a_printed_command_survives_hostile_paths() -> None:
    path = Path("/runs/a'; echo foo #/$(x) y/recipe.yaml")
    command = worker_command(plan_processes(recipe(processes=2), CPU), "train.py", [str(path)])
    line = shell_line(command, {"NAME": "a b"})
    assert shlex.split(line) == ["NAME=a b", *command]


@pytest.mark.parametrize(
    ("rows", "micro", "processes", "per_process", "accumulation"),
    [(16, 8, 2, 8, 1), (16, 4, 2, 8, 2), (16, 4, 3, 6, 2), (1, 4, 4, 1, 1)],
)
def test_the_batch_is_spread_over_processes_and_passes(
    recipe_file: Path, rows: int, micro: int, processes: int, per_process: int, accumulation: int
) -> None:
    loaded = load_recipe(
        recipe_file, [f"train.global_batch_size={rows}", f"train.micro_batch_size={micro}"]
    )
    shape = batch_shape(loaded, processes)
    assert shape is not None
    assert (shape.rows_per_process, shape.accumulation) == (per_process, accumulation)
