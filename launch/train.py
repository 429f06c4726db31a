"""Start one training process: `accelerate launch`, `torchrun` or plain `python` run this file."""

import sys

from peft_dist.entrypoints.train import main

sys.exit(main(sys.argv[1:]))
