"""What a run keeps on disk: adapters in PEFT's format, and checkpoints to go on from."""
