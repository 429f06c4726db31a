"""Start `quantize` or `merge` with its libraries quiet: they talk as soon as they are imported."""

import importlib
import sys
from collections.abc import Sequence

from peft_dist.common import logs
from peft_dist.common.imports import without_collector
from peft_dist.worker.process import quieten_libraries


def main(argv: Sequence[str]) -> int:
    """Run a tool; return its exit code.

    Args:
        argv: The module's name, then its own arguments.
    """
    logs.begin()
    quieten_libraries()
    name, *arguments = argv
    with without_collector():
        tool = importlib.import_module(f"peft_dist.entrypoints.{name}")
    code: int = tool.main(arguments)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
