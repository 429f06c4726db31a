"""The layer rule, and the price of importing the control plane."""

import ast
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "transformers", "peft", "accelerate", "deepspeed", "bitsandbytes", "wandb",
         "datasets", "numpy", "plotly")  # fmt: skip
HELP_COST = 4
SUBMIT_COST = FIRST_LINE_COST = 14
"""Of processor time, in imports of pydantic: how many seconds that is depends on the machine."""


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


def test_a_file_is_read_at_one_sitting_and_a_class_name_means_one_thing() -> None:
    places: dict[str, list[str]] = {}
    for path in sorted((ROOT / "peft_dist").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= 350, path
        for node in ast.parse(text).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(str(path))
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def test_the_control_plane_imports_nothing_heavy(recipe_file: Path) -> None:
    code = (
        "import sys\n"
        "from peft_dist.cli.main import main\n"
        "from peft_dist.common import paths\n"
        "from peft_dist.run import directory\n"
        "from peft_dist.launch import command, launcher_process, placement\n"
        "assert main(['train', sys.argv[1], '--dry-run']) == 0\n"
        "assert main(['schema']) == 0\n"
        f"print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(recipe_file)], capture_output=True, text=True, check=False
    )
    assert done.stderr.strip() == "[]"


def cost(*words: str) -> float:
    """Return the processor time of a Python command, in imports of pydantic; least of a few."""

    def least_s(words: Sequence[str]) -> float:
        before_s = used_s()
        subprocess.run([sys.executable, *words], check=True, capture_output=True)
        return used_s() - before_s

    pairs = [(least_s(words), least_s(["-c", "import pydantic"])) for _ in range(4)]
    return min(pair[0] for pair in pairs) / min(pair[1] for pair in pairs)


def used_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_help_starts_at_once() -> None:
    assert cost("-m", "peft_dist", "--help") < HELP_COST


def test_all_that_comes_before_the_first_line_of_a_training_is_little(recipe_file: Path) -> None:
    assert cost("-m", "peft_dist", "train", str(recipe_file), "--dry-run") < FIRST_LINE_COST


@pytest.mark.slow
def test_what_speaks_to_slurm_imports_nothing_heavy_and_costs_little(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = ROOT / "slurm" / "clusters" / "single-node.yaml"
    words = ["submit", str(recipe_file), "--cluster", str(cluster), "--dry-run"]
    code = (
        "import sys\n"
        "from peft_dist.cli.main import main\n"
        "assert main(sys.argv[1:]) == 0\n"
        "from peft_dist.run import sweep\n"
        "from peft_dist.slurm import job_control, probe, submit, supervisor\n"
        "from peft_dist.status import command, logs\n"
        f"heavy = [name for name in {HEAVY} if name in sys.modules]\n"
        "assert not heavy, heavy\n"
    )
    monkeypatch.chdir(tmp_path)
    assert cost("-c", code, *words) < SUBMIT_COST


def test_nothing_in_launch_is_named_after_a_library() -> None:
    names = {path.stem for path in (ROOT / "launch").glob("*.py")}
    assert names == {"train", "score"}  # `evaluate` is one
