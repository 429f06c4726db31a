"""How many cases of a fault are tried: a few in `make test`, many in `make faults`."""

import os

import pytest

IS_LONG = os.environ.get("PEFT_DIST_FAULTS") == "long"

only_long = pytest.mark.skipif(not IS_LONG, reason="takes minutes: `make faults` runs it")


def cases(short: int, long: int) -> int:
    """Return how many cases to try; PEFT_DIST_FAULTS=long asks for the many."""
    return long if IS_LONG else short
