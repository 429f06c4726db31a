"""Start one training process: `accelerate launch`, `torchrun` or plain `python` run this file."""

import sys

if __name__ == "__main__":  # processes that tokenise for it read this file too
    from peft_dist.entrypoints.train import main

    sys.exit(main(sys.argv[1:]))
