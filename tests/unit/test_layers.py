"""The layer rule, and the price of importing the control plane."""

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "transformers", "peft", "accelerate", "deepspeed", "bitsandbytes", "wandb",
         "datasets", "numpy", "plotly")  # fmt: skip
HELP_LIMIT_S = 0.4
SUBMIT_LIMIT_S = 0.6
FIRST_LINE_LIMIT_S = 1.0
"""Of processor time: how long it takes besides is the load of the machine."""


def test_every_import_goes_down_the_layers() -> None:
    tool = shutil.which("lint-imports", path=str(Path(sys.executable).parent))
    assert tool is not None
    done = subprocess.run(
        [tool, "--no-cache"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_control_plane_imports_nothing_heavy(recipe_file: Path) -> None:
    code = (
        "import sys\n"
        "from peft_dist.cli.main import main\n"
        "from peft_dist.common import paths\n"
        "from peft_dist.run import directory\n"
        "from peft_dist.launch import command, local, placement\n"
        "assert main(['train', sys.argv[1], '--dry-run']) == 0\n"
        "assert main(['schema']) == 0\n"
        f"print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(recipe_file)], capture_output=True, text=True, check=False
    )
    assert done.stderr.strip() == "[]"


def least_cpu_s(*words: str) -> float:
    """Return the least processor time of a few calls of a command, in seconds."""

    def used_s() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    seconds = []
    for _ in range(3):
        before_s = used_s()
        command = [sys.executable, "-m", "peft_dist", *words]
        subprocess.run(command, check=True, capture_output=True)
        seconds.append(used_s() - before_s)
    return min(seconds)


def test_help_starts_at_once() -> None:
    assert least_cpu_s("--help") < HELP_LIMIT_S


def test_all_that_comes_before_the_first_line_of_a_training_is_little(recipe_file: Path) -> None:
    assert least_cpu_s("train", str(recipe_file), "--dry-run") < FIRST_LINE_LIMIT_S


@pytest.mark.slow
def test_what_speaks_to_slurm_imports_nothing_heavy_and_costs_little(
    recipe_file: Path, tmp_path: Path
) -> None:
    cluster = ROOT / "slurm" / "clusters" / "single-node.yaml"
    words = ["submit", str(recipe_file), "--cluster", str(cluster), "--dry-run"]
    code = (
        "import resource, sys\n"
        "from peft_dist.cli.main import main\n"
        "assert main(sys.argv[1:]) == 0\n"
        "from peft_dist.run import sweep\n"
        "from peft_dist.slurm import job_control, probe, submit, supervisor\n"
        "from peft_dist.status import command, logs\n"
        f"heavy = [name for name in {HEAVY} if name in sys.modules]\n"
        "used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "print(used.ru_utime + used.ru_stime, heavy, file=sys.stderr)\n"
    )
    seconds = []
    for _ in range(5):
        done = subprocess.run(
            [sys.executable, "-c", code, *words],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        used_s, heavy = done.stderr.split(maxsplit=1)
        assert heavy.strip() == "[]"
        assert done.stdout.startswith("==> ")
        seconds.append(float(used_s))
    assert min(seconds) < SUBMIT_LIMIT_S


def test_nothing_in_launch_is_named_after_a_library() -> None:
    names = {path.stem for path in (ROOT / "launch").glob("*.py")}
    assert names == {"train", "score"}  # `evaluate` is one
