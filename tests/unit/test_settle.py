"""`auto` in a recipe: what the control plane chooses is written down, and what cannot fit waits."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from peft_dist.cli.main import main
from peft_dist.common.errors import RecipeError
from peft_dist.config import load_recipe
from peft_dist.config.batch_shape import require_settled
from peft_dist.config.parallel import Parallel, least_kept
from peft_dist.launch.placement import Machine
from peft_dist.ledger.read_event import from_fields
from peft_dist.plan.hardware import find_gpu, hardware_of, recognise_gpu
from peft_dist.plan.host_memory import free_memory_bytes, keep_on_host
from peft_dist.plan.plan import choose
from peft_dist.plan.settle import settle
from peft_dist.plan.subject import subject_of
from peft_dist.run.directory import RunDir
from peft_dist.run.prediction import planned_facts
from tests.configs import model_folder
from tests.unit.run_folders import slurm_commands
from tests.unit.slurm_desk import Capture, Desk, told

OPEN = ("train.micro_batch_size=auto", "train.activation_checkpointing=auto",
        "data.max_length=2048", "train.global_batch_size=64")  # fmt: skip


@pytest.fixture
def gpus(desk: Desk) -> Desk:
    """Return a login node whose cluster has GPUs of a known kind, and a model of 8 billion."""
    model_folder(desk.folder / "model", "llama-3.1-8b")
    desk.cluster({"gpu": "a100-40gb"})
    return desk


def test_a_submitted_run_holds_what_was_chosen(gpus: Desk, capsys: Capture) -> None:
    assert gpus.submit(*OPEN) == 0
    recipe = load_recipe(gpus.run / "recipe.yaml", check_paths=False)
    assert recipe.parallel.strategy in ("ddp", "fsdp")
    assert isinstance(recipe.train.micro_batch_size, int)
    assert isinstance(recipe.train.activation_checkpointing, bool)
    require_settled(recipe)
    foreseen = json.loads((gpus.run / "plan.json").read_text())
    assert foreseen["micro_batch_size"] == recipe.train.micro_batch_size
    assert foreseen["strategy"] == recipe.parallel.strategy
    assert 5 * 2**30 < foreseen["bytes_per_rank"] < foreseen["reserved_bytes_per_rank"] < 40 * 2**30
    assert f"strategies/{recipe.parallel.strategy}.yaml" in (gpus.run / "node.sh").read_text()


def test_what_is_given_is_kept(gpus: Desk) -> None:
    given = ("train.micro_batch_size=1", "train.activation_checkpointing=true")
    assert gpus.submit(*given, "parallel.strategy=fsdp") == 0
    recipe = load_recipe(gpus.run / "recipe.yaml", check_paths=False)
    assert (recipe.train.micro_batch_size, recipe.train.activation_checkpointing) == (1, True)
    assert recipe.parallel.strategy == "fsdp"


def test_what_cannot_fit_is_not_queued(gpus: Desk, capsys: Capture) -> None:
    too_long = ("data.max_length=8192", "train.micro_batch_size=4")
    assert gpus.submit(*too_long) == 2
    line = told(capsys)
    assert line.startswith("train.micro_batch_size: ")
    assert "GiB of tensors do not fit into a GPU's 39.4 GiB" in line
    assert "fits with train.micro_batch_size: 1" in line or "activation_checkpointing" in line
    assert (gpus.made(), gpus.calls()) == ([], [])
    assert gpus.submit(*too_long, "--anyway") == 0
    assert "may run out of memory" in capsys.readouterr().err
    assert gpus.run.is_dir()


LARGE = ("data.max_length=2048", "train.micro_batch_size=1", "train.global_batch_size=64",
         "train.activation_checkpointing=true")  # fmt: skip


def test_nodes_time_and_save_lead_are_the_plans_where_nobody_gives_them(
    gpus: Desk, capsys: Capture
) -> None:
    model_folder(gpus.folder / "model", "llama-3.1-405b")
    gpus.cluster({"gpu": "h100-80gb", "gpus_per_node": 4, "max_nodes": 8, "max_time": None})
    assert gpus.submit(*LARGE, "train.steps=100", "parallel.strategy=fsdp") == 0
    assert "on 2 nodes: it does not fit on fewer; --nodes asks" in capsys.readouterr().err
    foreseen = json.loads((gpus.run / "plan.json").read_text())
    script = (gpus.run / "job.sbatch").read_text()
    assert "#SBATCH --nodes=2\n" in script
    (limit,) = re.findall(r"#SBATCH --time=(?:(\d+)-)?(\d+):(\d+):00\n", script)
    given_s = 86400 * int(limit[0] or 0) + 3600 * int(limit[1]) + 60 * int(limit[2])
    planned_s = 3600 * foreseen["hours"]
    assert 2 * planned_s < given_s < 2 * planned_s + 3600 + foreseen["first_start_s"]
    (lead,) = re.findall(r"#SBATCH --signal=B?:?\w+@(\d+)", script)
    assert foreseen["step_s"] > 30 and int(lead) > 30 + 3 * foreseen["step_s"]


def test_what_is_given_of_nodes_and_time_stands(gpus: Desk) -> None:
    model_folder(gpus.folder / "model", "llama-3.1-405b")
    gpus.cluster(
        {"gpu": "h100-80gb", "gpus_per_node": 4, "max_nodes": 8, "default_time": "3:00:00"}
    )
    assert gpus.submit(*LARGE, "train.steps=100", "parallel.strategy=fsdp", "--nodes", "4") == 0
    script = (gpus.run / "job.sbatch").read_text()
    assert "#SBATCH --nodes=4\n" in script and "#SBATCH --time=03:00:00\n" in script


def test_the_runs_of_an_array_share_a_strategy_that_suits_all(gpus: Desk) -> None:
    gpus.cluster({"gpu": "a100-40gb", "gpus_per_node": 8})
    hardware = hardware_of(None, find_gpu("a100-40gb", where="gpu"), gpus_per_node=8)
    short = "data.max_length=256"

    def replicas_fit(rank: int) -> bool:
        recipe = load_recipe(gpus.recipe, [short, f"method.rank={rank}"])
        return settle(recipe, hardware, 1, strategies=["ddp"]).fits

    sharded = next(rank for rank in range(8, 1000, 16) if not replicas_fit(rank))
    own = settle(load_recipe(gpus.recipe, [short, "method.rank=8"]), hardware, 1).recipe.parallel
    assert own.strategy == "ddp" and own.dequantized_blocks == 32
    assert gpus.submit(short, "--array", f"method.rank=8,{sharded}") == 0
    recipes = [load_recipe(gpus.run / n / "recipe.yaml", check_paths=False) for n in ("000", "001")]
    assert [recipe.parallel.strategy for recipe in recipes] == ["fsdp", "fsdp"]
    fewest = {recipe.parallel.dequantized_blocks for recipe in recipes}
    assert len(fewest) == 1 and {*range(32)} > fewest


def test_without_a_kind_of_gpu_nothing_is_refused_or_said(desk: Desk, capsys: Capture) -> None:
    assert desk.submit(*OPEN) == 0
    assert capsys.readouterr().err == ""
    recipe = load_recipe(desk.run / "recipe.yaml", check_paths=False)
    assert (recipe.train.micro_batch_size, recipe.train.activation_checkpointing) == (4, False)
    assert recipe.parallel.strategy == "auto"
    # Whatever GPU it is, its first start measures how many rows fit.
    foreseen = json.loads((desk.run / "plan.json").read_text())
    assert foreseen == {"micro_batch_size": 4, "measures_rows": True}
    other = desk.folder / "runs" / "other"
    assert desk.submit("--run-dir", str(other)) == 0
    assert not (other / "plan.json").exists()


def test_a_model_that_cannot_be_looked_at_is_said(gpus: Desk, capsys: Capture) -> None:
    model_folder(gpus.folder / "model", "llama-3.1-8b", model_type="mamba")
    assert gpus.submit() == 0
    assert "memory was not checked: model.name: no plan for" in capsys.readouterr().err
    assert gpus.submit("train.micro_batch_size=auto", "--fresh") == 2
    assert told(capsys).startswith("model.name: no plan for architecture 'mamba'")


def test_a_local_training_takes_what_suits_its_gpus(
    desk: Desk, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_folder(desk.folder / "model", "llama-3.1-8b")
    slurm_commands(desk.slurm, **{"nvidia-smi": "echo 'NVIDIA H100 80GB HBM3, 81559'"})
    machine = Machine(gpus=4, cores=8)
    monkeypatch.setattr("peft_dist.plan.settle.this_machine", lambda: machine)
    monkeypatch.setattr("peft_dist.launch.run_here.this_machine", lambda: machine)
    assert main(["train", str(desk.recipe), *OPEN, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "micro_batch_size: auto" not in printed
    assert "activation_checkpointing: auto" not in printed
    assert "strategy: ddp" in printed


@pytest.mark.parametrize(
    ("free_gib", "reshard", "blocks"),
    [(1000, "step", 32), (1, "forward", 0), (None, "auto", "auto")],
)
def test_on_a_cpu_as_much_is_kept_as_the_host_has_memory_for(
    recipe_file: Path, tmp_path: Path, free_gib: int | None, reshard: str, blocks: int | str
) -> None:
    model_folder(tmp_path / "model", "llama-3.1-8b")
    free = None if free_gib is None else free_gib * 2**30

    def kept(
        *words: str,
        free: int | None = free,
        strategy: str = "fsdp",
        processes: int = 2,
        here: int = 2,
        longest_row: int = 1024,
    ) -> tuple[str, int | str]:
        found = keep_on_host(
            load_recipe(recipe_file, [*words]),
            strategy,
            processes=processes,
            here=here,
            longest_row=longest_row,
            free_bytes=free,
        )
        return found.reshard, found.dequantized_blocks

    assert kept() == (reshard, blocks)
    for alone in ({"processes": 1, "here": 1}, {"strategy": "ddp"}):
        assert kept(**alone) == ("auto", blocks)
        assert kept("quantization=none", **alone) == ("auto", "auto")
    assert kept("parallel={reshard: backward, dequantized_blocks: 3}") == ("backward", 3)
    free_bytes = [gib * 2**30 for gib in range(100, 400, 20)] if reshard == "step" else []
    some = [kept("parallel.reshard=forward", free=free)[1] for free in free_bytes]
    assert some == sorted(some) and (not some or len({*some} - {0, 32}) > 2)
    # Shorter rows, and shards on other machines, leave room for more.
    for way in ({"longest_row": 16}, {"processes": 4}):
        more = [kept("parallel.reshard=forward", free=free, **way)[1] for free in free_bytes]
        assert all(a >= b for a, b in zip(more, some, strict=True))
        assert more != some or not some


def test_of_processes_that_differ_all_keep_the_least() -> None:
    ways = [
        Parallel(reshard=reshard, dequantized_blocks=blocks)
        for reshard, blocks in (("step", 7), ("backward", 3), ("auto", "auto"))
    ]
    assert least_kept(ways[:2]) == {"reshard": "backward", "dequantized_blocks": 3}
    assert least_kept(ways) == {"reshard": "forward", "dequantized_blocks": 0}
    assert least_kept(ways[:1] * 2) == {}


def test_free_memory_is_what_the_container_leaves(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  99 kB\nMemAvailable:    4096 kB\n")
    assert free_memory_bytes(meminfo, tmp_path) == 4 << 20
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory_bytes(meminfo, tmp_path) == 4 << 20
    (tmp_path / "memory.max").write_text(f"{3 << 20}\n")
    (tmp_path / "memory.current").write_text(f"{1 << 20}\n")
    assert free_memory_bytes(meminfo, tmp_path) == 2 << 20
    assert free_memory_bytes(tmp_path / "none", tmp_path / "none") is None


def test_a_rank_refuses_what_is_still_open(recipe_file: Path) -> None:
    for field in ("micro_batch_size", "activation_checkpointing"):
        recipe = load_recipe(recipe_file, [f"train.{field}=auto"])
        with pytest.raises(RecipeError, match=f"train.{field}: got 'auto'"):
            require_settled(recipe)


def test_a_large_base_is_sharded_and_recomputed(recipe_file: Path, tmp_path: Path) -> None:
    model_folder(tmp_path / "model", "llama-3.1-405b")
    recipe = load_recipe(recipe_file, [*OPEN, "train.global_batch_size=8"])
    hardware = hardware_of(None, find_gpu("h100-80gb", where="gpu"), gpus_per_node=8)
    settled = settle(recipe, hardware, 1)
    assert settled.estimate is not None and settled.estimate.fits
    assert settled.recipe.parallel.strategy == "fsdp"
    assert settled.recipe.train.activation_checkpointing is True
    assert settled.recipe.train.micro_batch_size == 1


@pytest.mark.parametrize(
    ("name", "memory_gib", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 79.6, "NVIDIA H100 80GB HBM3"),
        ("NVIDIA H100 PCIe", 79.6, "NVIDIA H100 PCIe"),
        ("NVIDIA A100-SXM4-40GB", 40.0, "NVIDIA A100-SXM4-40GB"),
        ("NVIDIA A100-SXM4-80GB", 80.0, "NVIDIA A100-SXM4-80GB"),
        ("NVIDIA L4", 22.5, "NVIDIA L4"),
        ("NVIDIA L40S", 45.0, "NVIDIA L40S"),
        ("Quadro P400", 2.0, None),
    ],
)
def test_a_gpu_is_known_by_its_drivers_words(
    name: str, memory_gib: float, expected: str | None
) -> None:
    found = recognise_gpu(name, memory_gib)
    assert (None if found is None else found.name) == expected


def test_the_ledger_notes_what_was_foreseen_and_no_nonsense(gpus: Desk) -> None:
    assert gpus.submit(*OPEN) == 0
    run = RunDir(gpus.run)
    facts = planned_facts(run)
    foreseen = json.loads(run.plan.read_text())
    assert facts == {
        "planned_bytes_per_rank": foreseen["bytes_per_rank"],
        "planned_step_s": foreseen["step_s"],
    }
    assert from_fields({"event": "start", "step": 0, **facts}).step == 0
    for nonsense in ("[]", "{", '{"bytes_per_rank": "many", "step_s": NaN}'):
        run.plan.write_text(nonsense)
        assert planned_facts(run) == {}


@pytest.mark.parametrize("factor", [1.0, 1e-4])
def test_the_fastest_is_chosen_however_slow_all_are(
    recipe_file: Path, tmp_path: Path, factor: float
) -> None:
    model_folder(tmp_path / "model", "llama-3.1-8b")
    recipe = load_recipe(recipe_file, [*OPEN, "data.max_length=64"])
    subject = subject_of(recipe, json.loads((tmp_path / "model" / "config.json").read_text()))
    hardware = hardware_of(None, find_gpu("h100-80gb", where="gpu"), gpus_per_node=8)
    hardware = replace(hardware, assumed=hardware.assumed.times(factor))
    found = choose(subject, hardware, 1, strategies=["ddp"])
    every = [
        subject.estimate(replace(found.candidate, micro_batch=rows, recompute=again), hardware)
        for rows in (1, 2, 4, 8)
        for again in (False, True)
    ]
    fastest = max(one.tokens_per_s for one in every if one.fits)
    assert found.fits and found.tokens_per_s > 0.99 * fastest
