"""Score held-out examples, and generate answers to a few of them."""
