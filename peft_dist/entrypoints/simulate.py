"""Run a start and two steps of one rank on fake tensors; print what was counted, as JSON.

`peft-dist plan --simulate` starts it, with the model's config.json on standard input.
"""

import argparse
import json
import logging
import sys
import tempfile
import warnings
from dataclasses import asdict
from pathlib import Path

from peft_dist.common.console import show
from peft_dist.common.errors import ERROR_PREFIX, EXIT_DONE, PeftDistError
from peft_dist.config import load_recipe


def main(argv: list[str]) -> int:
    """Simulate one recipe; return the exit code."""
    parser = argparse.ArgumentParser(prog="simulate", description=main.__doc__)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--per-node", type=int, required=True)
    options = parser.parse_intermixed_args(argv)
    warnings.simplefilter("ignore")
    try:
        recipe = load_recipe(options.recipe, options.overrides, check_paths=False)
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "config.json").write_text(sys.stdin.read(), encoding="utf-8")
            import torch

            from peft_dist.distributed.world import World
            from peft_dist.simulation.run import simulate

            logging.disable(logging.WARNING)
            processes = recipe.parallel.processes or 1
            world = World(0, processes, 0, options.per_node, torch.device("cpu"))
            found = simulate(recipe, Path(folder), world)
    except PeftDistError as error:
        show(f"{ERROR_PREFIX}{error}", sys.stderr)
        return error.exit_code
    show(json.dumps(asdict(found)))
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
