"""The wheel: everything in it, installed in a clean environment, used without a checkout."""

import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SHARED = ("launch", "configs", "slurm")


def canonical(requirement: str) -> str:
    name = re.split(r"[\[<>=!~; ]", requirement, maxsplit=1)[0]
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    lines = (ROOT / "configs" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonical(name): version for name, version in pinned}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy, so that the checkout stays clean."""
    source = tmp_path_factory.mktemp("source") / "tree"
    source.mkdir()
    for name in ("peft_dist", *SHARED):
        shutil.copytree(ROOT / name, source / name)  # stray __pycache__ too: it must not ship
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    out = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out)],
        cwd=source,
        check=True,
        capture_output=True,
        timeout=120,
    )
    (built,) = out.glob("peft_dist-*.whl")
    return built


@pytest.fixture(scope="module")
def clean_venv(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel, and borrow this environment's libraries but not its peft_dist."""
    folder = tmp_path_factory.mktemp("venv") / "v"
    venv.create(folder, with_pip=False, symlinks=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install",
         "--no-deps", "--no-index", str(wheel)],
        check=True,
        capture_output=True,
        timeout=120,
    )  # fmt: skip
    # Libraries come after the wheel; .pth files of that folder (an editable install) are not read.
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return folder


def test_every_package_of_the_checkout_is_in_the_list() -> None:
    found = {
        ".".join(path.parent.relative_to(ROOT).parts) for path in ROOT.glob("peft_dist/**/*.py")
    }
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    assert {name for name in listed if "_share" not in name} == found
    assert {f"peft_dist._share.{name}" for name in SHARED} <= listed


def test_the_wheel_holds_every_file_and_no_rubbish(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for shared in SHARED:
        for path in (ROOT / shared).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert f"peft_dist/_share/{path.relative_to(ROOT)}" in names
    assert "peft_dist/py.typed" in names
    assert {f"peft_dist/report/page.{kind}" for kind in ("html.j2", "css", "js")} <= names
    assert not [name for name in names if "__pycache__" in name or name.endswith(".pyc")]
    (entry_points,) = (name for name in names if name.endswith(".dist-info/entry_points.txt"))
    text = zipfile.ZipFile(wheel).read(entry_points).decode()
    # By which torchrun knows `--rdzv-backend peft-dist`.
    assert "[torchrun.handlers]\npeft-dist = peft_dist.distributed.fixed_nodes:handler" in text
    tops = {name.split("/")[0] for name in names}
    assert len(tops) == 2  # peft_dist and its dist-info: no top-level `launch` or `configs`


@pytest.mark.slow
def test_the_installed_wheel_works_without_a_checkout(clean_venv: Path, tmp_path: Path) -> None:
    def run(*argv: str) -> str:
        done = subprocess.run(
            [str(clean_venv / "bin" / "peft-dist"), *argv],
            cwd=tmp_path,
            env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "peft-dist" in run("--version")
    assert '"Recipe"' in run("schema")
    assert "launch" in run("init", "mine")
    assert "valid" in run("validate", "mine/configs/recipes/chat.yaml")
    command = run("train", "mine/configs/recipes/chat.yaml", "--nproc", "1", "--dry-run")
    assert f"{clean_venv}/lib" in command
    assert "peft_dist/_share/launch/train.py" in command


def test_the_base_install_has_no_torch() -> None:
    assert {canonical(line) for line in PROJECT["project"]["dependencies"]} == {
        "filelock",
        "jinja2",
        "pydantic",
        "rich",
        "ruamel-yaml",
    }


def test_everything_that_can_be_installed_is_pinned() -> None:
    project = PROJECT["project"]
    wanted = [*project["dependencies"], *PROJECT["build-system"]["requires"]]
    for extra in project["optional-dependencies"].values():
        wanted += extra
    names = {canonical(line) for line in wanted} - {"peft-dist"}
    assert names <= set(pins())
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for line in makefile.splitlines():
        if "pip install" in line and "apt" not in line:
            assert "-c configs/constraints.txt" in line


def test_the_tested_torch_is_pinned_without_a_build_or_an_address() -> None:
    text = (ROOT / "configs" / "constraints.txt").read_text(encoding="utf-8")
    assert pins()["torch"] == "2.13.0"
    assert "://" not in text
    assert "+" not in "".join(pins().values())
