"""No version with a known hole is allowed by pyproject.toml, or pinned."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
ADVISORIES = tomllib.loads((ROOT / "tests" / "advisories.toml").read_text(encoding="utf-8"))


def requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    texts = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    return [Requirement(text) for text in texts]


DIRECT = sorted({need.name for need in requirements()} & set(ADVISORIES))


@pytest.mark.parametrize("package", DIRECT)
def test_no_allowed_version_has_a_known_hole(package: str) -> None:
    ranges = [need.specifier for need in requirements() if need.name == package]
    for advisory, fixed in ADVISORIES[package].items():
        for allowed in ranges:
            lowest = [Version(part.version) for part in allowed if part.operator in (">=", "==")]
            assert max(lowest) >= Version(fixed), f"{package}{allowed}: {advisory}"


@pytest.mark.parametrize("package", ADVISORIES)
def test_no_pinned_version_has_a_known_hole(package: str) -> None:
    lines = (ROOT / "configs" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    for advisory, fixed in ADVISORIES[package].items():
        assert Version(pins[package]) >= Version(fixed), f"{package}: {advisory}"
