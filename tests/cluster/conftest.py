"""The cluster that tests share, and what brings it back after each of them."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.slurm import SlurmCluster, why_not
from tests.cluster.submitted import Runs
from tests.faults.project import Project, make_project

REQUIRED = "PEFT_DIST_CLUSTER"
"""Set to `required`, tests fail where there can be no cluster; else they are skipped."""


@pytest.fixture(scope="session")
def able() -> None:
    """Skip the test where this machine cannot run a cluster, or fail it where it has to."""
    reason = why_not()
    if reason is not None:
        if os.environ.get(REQUIRED) == "required":
            pytest.fail(f"{REQUIRED}=required, but {reason}", pytrace=False)
        pytest.skip(reason)


@pytest.fixture
def base() -> Iterator[Path]:
    """Return a folder for a cluster of a test's own; its path is short, as those of sockets are."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    yield folder / "cluster"
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def slurm(able: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """Return four nodes that all tests share; a test that leaves anything there takes `cluster`."""
    with SlurmCluster.start(tmp_path_factory.mktemp("slurm") / "cluster", nodes=4) as cluster:
        yield cluster


@pytest.fixture
def cluster(slurm: SlurmCluster) -> Iterator[SlurmCluster]:
    """Return the shared cluster; afterwards its jobs are ended and its nodes are brought back."""
    yield slurm
    slurm.restore()


@pytest.fixture(scope="session")
def project(able: None, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Return model, rows and recipe of every run; to be read only."""
    return make_project(tmp_path_factory.mktemp("project"))


@pytest.fixture
def runs(cluster: SlurmCluster, project: Project, tmp_path: Path) -> Runs:
    """Return what submits runs to the shared cluster."""
    return Runs(cluster, project, tmp_path)


@pytest.fixture(scope="session")
def reference(
    slurm: SlurmCluster, project: Project, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Return a run of two processes on this machine, without Slurm, that nothing happened to."""
    return Runs(slurm, project, tmp_path_factory.mktemp("reference")).train_here("undisturbed")
