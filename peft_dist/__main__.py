"""Run the `peft-dist` command: `python -m peft_dist`."""

import sys

from peft_dist.cli.main import main

sys.exit(main())
