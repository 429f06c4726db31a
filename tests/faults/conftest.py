"""What the tests of faults share: the nursery, one project, and runs without any fault."""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from tests.faults.client import Nursery
from tests.faults.harness import Harness
from tests.faults.project import Project, make_project

Undisturbed = Callable[..., Path]


@pytest.fixture(scope="session")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    """Return the process that forks all ranks."""
    nursery = Nursery(tmp_path_factory.mktemp("nursery"))
    yield nursery
    nursery.close()


@pytest.fixture(scope="session")
def of_all_workers(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that has a folder made once, by the first worker that asks for it.

    Of its name and of what makes it, given the folder.
    """
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def made(name: str, make: Callable[[Path], object]) -> Path:
        folder, mark = base / name, base / f"{name}.made"
        with FileLock(base / f"{name}.lock"):
            if not mark.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of one that failed
                folder.mkdir()
                make(folder)
                mark.touch()
        return folder

    return made


@pytest.fixture(scope="session")
def project(of_all_workers: Callable[..., Path]) -> Project:
    """Return model, rows and recipe; to be read only."""
    return Project(of_all_workers("project", make_project))


@pytest.fixture
def harness(nursery: Nursery, tmp_path: Path) -> Iterator[Harness]:
    """Return what starts groups of ranks; at the end nothing of theirs may be left."""
    harness = Harness(nursery, tmp_path)
    yield harness
    harness.close()


@pytest.fixture(scope="session")
def undisturbed(
    nursery: Nursery, project: Project, of_all_workers: Callable[..., Path]
) -> Undisturbed:
    """Return a function from world size, strategy and overrides to the run they give; kept."""

    def run(world_size: int, strategy: str, *overrides: str) -> Path:
        def make(folder: Path) -> None:
            harness = Harness(nursery, folder)
            how = {"world_size": world_size, "strategy": strategy, "overrides": overrides}
            group = harness.start(project, harness.run_dir(), **how)
            try:
                assert set(group.wait()) == {0}, group.told()
            finally:
                harness.close()

        key = "\n".join([f"{world_size} {strategy}", *sorted(overrides)])
        name = hashlib.sha256(key.encode()).hexdigest()[:12]
        return of_all_workers(f"undisturbed-{name}", make) / "run"

    return run
