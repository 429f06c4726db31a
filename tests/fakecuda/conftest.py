"""Tests of CUDA code on a machine without a GPU; `make fakegpu` runs them."""

import gc
from collections.abc import Iterator

import pytest
import torch

from tests.fakecuda.device import is_here


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is here where the fake runtime is not."""
    if is_here():
        return
    for item in items:
        if "fakecuda" in item.path.parts:
            item.add_marker(pytest.mark.skip(reason="needs the fake CUDA runtime: make fakegpu"))


@pytest.fixture(autouse=True)
def empty_device() -> Iterator[None]:
    """Leave nothing of one test on the device for the next."""
    yield
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
