"""How many cases of a fault are tried: a few in `make test`, many in `make faults`."""

import os


def cases(short: int, long: int) -> int:
    """Return how many cases to try; PEFT_DIST_FAULTS=long asks for the many."""
    return long if os.environ.get("PEFT_DIST_FAULTS") == "long" else short
