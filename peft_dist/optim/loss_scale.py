"""The factor of the loss that keeps gradients inside float16: halved on overflow, doubled in time.

It lives on the device, so that no host waits for it. DeepSpeed's own is not used: it sees gradients
when they are float32 and summed.
"""

from collections.abc import Mapping
from typing import Any

import torch

FIRST, LEAST, MOST = 2.0**16, 1.0, 2.0**24
"""All powers of two: scaling rounds nothing."""
DOUBLES_AFTER = 500
"""Steps in a row without an overflow."""


class LossScale:
    """The scale of a training in float16; of any other it is 1 and does nothing."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        """Begin with `FIRST`, or with 1 where gradients are computed in another dtype."""
        self.is_on = dtype == torch.float16
        self.value = torch.full((), FIRST if self.is_on else 1.0, device=device)
        """float32 []."""
        self._sound = torch.zeros((), device=device)

    def scaled(self, loss: torch.Tensor) -> torch.Tensor:
        """Return the loss to go back from."""
        return loss * self.value if self.is_on else loss

    def unscale(self, gradients: torch.Tensor) -> None:
        """Divide gradients by the scale, in place."""
        if self.is_on:
            gradients.mul_(1.0 / self.value)

    def update(self, finite: torch.Tensor) -> None:
        """Take note of a step.

        Args:
            finite: bool [], whether its loss and its gradients were.
        """
        if not self.is_on:
            return
        sound = self._sound + 1.0
        grows = sound >= DOUBLES_AFTER
        larger = torch.where(grows, self.value * 2.0, self.value).clamp(max=MOST)
        self.value = torch.where(finite, larger, (self.value / 2.0).clamp(min=LEAST))
        self._sound = torch.where(finite & ~grows, sound, 0.0)

    def facts(self) -> dict[str, float]:
        """Return what a checkpoint keeps of it; nothing where it is off."""
        if not self.is_on:
            return {}
        return {"loss_scale": self.value.item(), "loss_scale_sound_steps": self._sound.item()}

    def restore(self, facts: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's facts; from `FIRST` where it was made in another dtype."""
        if self.is_on and "loss_scale" in facts:
            self.value.fill_(facts["loss_scale"])
            self._sound.fill_(facts["loss_scale_sound_steps"])
