"""MFU: which device can compute how much, and what of it a run uses."""

import pytest

from peft_dist.metrics.mfu import Utilisation, peak_flops


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100-PCIE-40GB", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("Tesla V100-SXM2-32GB", 125e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A10G", None),
        ("NVIDIA GeForce RTX 4090 D", 165e12),
        ("AMD Instinct MI300X", None),
        ("cpu", None),
        ("", None),
    ],
)
def test_a_device_is_known_by_the_words_of_its_name(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak


def test_mfu_is_four_operations_per_token_and_parameter_over_the_peak_of_all_devices() -> None:
    eight = Utilisation.of(8_000_000_000, device_name="NVIDIA H100 80GB HBM3", devices=8)
    assert eight.mfu(100_000.0) == pytest.approx(4 * 8e9 * 1e5 / (8 * 989e12))
    assert eight.mfu(100_000.0) == pytest.approx(0.404, abs=1e-3)


def test_on_a_device_that_is_not_known_there_is_no_mfu() -> None:
    assert Utilisation.of(1000, device_name="cpu", devices=2).mfu(5.0) is None
