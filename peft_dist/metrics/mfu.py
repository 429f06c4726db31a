"""How much of what the devices of a run can compute it does compute: model FLOPs utilisation (MFU).

Knows devices by name; measures nothing.
"""

import re
from dataclasses import dataclass

FLOPS_PER_TOKEN_AND_PARAMETER = 4
"""2 forward, and 2 backward for the gradient of activations: a frozen base has no gradient of
weights, which is why the 6 of training a whole model does not hold."""
PEAK_FLOPS = {
    "H100 PCIE": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A40": 149.7e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "V100": 125e12,
    "A6000": 154.8e12,
    "4090": 165e12,
}
"""Dense bfloat16 operations per second by the words of a device's name, from the data sheets (V100:
float16). Where several fit, the first."""


def peak_flops(device_name: str) -> float | None:
    """Return what a device computes per second at most; None for a CPU, or one not known."""
    words = set(re.split(r"[\s-]+", device_name.upper()))
    if "MIG" in words:  # a slice of one
        return None
    fits = (peak for name, peak in PEAK_FLOPS.items() if words.issuperset(name.split()))
    return next(fits, None)


@dataclass(frozen=True)
class Utilisation:
    """What a run's MFU is taken of.

    Counted are 4 N operations per token of a row, padding left out, where N is the number of
    parameters of the frozen base, the input embedding among them, as published LoRA figures count.
    Attention scores, adapters, dequantizing and recomputed activations are not. The peak is that of
    dense bfloat16, whatever the run computes in.
    """

    base_parameters: int
    peak_flops: float | None
    """Of all devices together; None: not known."""

    @classmethod
    def of(cls, base_parameters: int, *, device_name: str, devices: int) -> "Utilisation":
        """Return that of a run on so many devices, all taken to be alike."""
        one = peak_flops(device_name)
        return cls(base_parameters, None if one is None else one * devices)

    def mfu(self, tokens_per_s: float) -> float | None:
        """Return the utilisation at this speed, of all devices together; None: not known."""
        if self.peak_flops is None:
            return None
        return FLOPS_PER_TOKEN_AND_PARAMETER * self.base_parameters * tokens_per_s / self.peak_flops
