"""Start one training process: `accelerate launch`, `torchrun` or plain `python` run this file."""

import sys

if __name__ == "__main__":  # processes that tokenise for it read this file too
    from peft_dist.entrypoints.train import main

    sys.exit(main(sys.argv[1:]))
elif __name__ == "preload":  # once a node: its processes are forks of the one that runs this
    from peft_dist.entrypoints.libraries import preload as preload
