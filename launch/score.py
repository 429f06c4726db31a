"""Score the adapter of a run directory: `python launch/score.py RUN_DIR`."""

import sys

from peft_dist.entrypoints.evaluate import main

sys.exit(main(sys.argv[1:]))
