"""What is installed, against what this version is made for and against known faults."""

import importlib.metadata
import re
from collections.abc import Iterator

from peft_dist.checks.context import CheckContext
from peft_dist.checks.finding import Finding
from peft_dist.checks.known_faults import installed, keeps, known_faults


def check_packages(_context: CheckContext) -> Iterator[Finding]:
    """Compare versions, which are read from metadata: nothing is imported."""
    try:
        required = importlib.metadata.requires("peft-dist") or ()
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        text = "peft-dist is not installed: versions were not compared"
        yield Finding("ok", "versions", text)
        return
    versions = []
    for text in required:
        requirement, _, marker = text.partition(";")
        match = re.match(r"\s*([A-Za-z0-9._-]+)\s*(.*)", requirement)
        if match is None or (marker and not re.search(r"extra\s*==\s*['\"]train['\"]", marker)):
            continue
        name, limits = match[1], match[2].strip()
        if name == "peft-dist":
            continue
        version = installed(name)
        if version is None:
            remedy = "pip install 'peft-dist[train]'"
            yield Finding("bad", "versions", f"{name} is not installed", remedy)
            continue
        versions.append(f"{name} {version}")
        if not all(keeps(version, limit) for limit in limits.split(",") if limit):
            remedy = f"pip install '{name}{limits}'"
            yield Finding("bad", "versions", f"{name} {version} is not {limits}", remedy)
    yield Finding("ok", "versions", f"installed: {', '.join(versions)}")
    yield from known_faults()
