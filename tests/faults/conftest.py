"""What the tests of faults share: the nursery, one project, and runs without any fault."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

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
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Return model, rows and recipe; to be read only."""
    return make_project(tmp_path_factory.mktemp("project"))


@pytest.fixture
def harness(nursery: Nursery, tmp_path: Path) -> Iterator[Harness]:
    """Return what starts groups of ranks; at the end nothing of theirs may be left."""
    harness = Harness(nursery, tmp_path)
    yield harness
    harness.close()


@pytest.fixture(scope="session")
def undisturbed(
    nursery: Nursery, project: Project, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Undisturbed]:
    """Return a function from world size, strategy and overrides to the run they give; kept."""
    harness = Harness(nursery, tmp_path_factory.mktemp("undisturbed"))
    made: dict[tuple[int, str, tuple[str, ...]], Path] = {}

    def run(world_size: int, strategy: str, *overrides: str) -> Path:
        key = (world_size, strategy, overrides)
        if key not in made:
            folder = harness.run_dir(f"run-{len(made)}")
            group = harness.start(
                project, folder, world_size=world_size, strategy=strategy, overrides=overrides
            )
            assert set(group.wait()) == {0}, group.told()
            made[key] = folder
        return made[key]

    yield run
    harness.close()
