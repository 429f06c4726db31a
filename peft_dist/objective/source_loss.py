"""The loss of each source in a mixture, summed over the passes of a step."""

import numpy as np
import torch

from peft_dist.config import Recipe
from peft_dist.data.order import RowIds
from peft_dist.data.pack import Batch, to_device
from peft_dist.data.token_cache import TokenizedRows


class SourceLosses:
    """Sums of this process's losses by source. Does nothing where there is one source."""

    def __init__(self, recipe: Recipe, rows: TokenizedRows, device: torch.device) -> None:
        """Begin at 0."""
        self._count, self.rows, self._device = recipe.source_losses, rows, device
        self._sums = torch.zeros(self._count, device=device)

    def add(self, ids: RowIds, batch: Batch, nll: torch.Tensor) -> None:
        """Add the losses of a micro-batch.

        Args:
            ids: [n_rows] row ids of the micro-batch.
            batch: The micro-batch, on the device.
            nll: float32 [N], the loss of each of its targets.
        """
        if not self._count or not len(ids):
            return
        sources = to_device(torch.from_numpy(self.rows.source_of_row[ids]), self._device)
        self._sums.index_add_(0, sources[batch.target_rows], nll.detach().float())

    def take(self) -> torch.Tensor:
        """Return the sums of a step, float32 [sources], and begin anew."""
        taken, self._sums = self._sums, torch.zeros_like(self._sums)
        return taken

    def predictions(self, ids: RowIds) -> tuple[int, ...]:
        """Return how many predictions of each source are in a step with these rows."""
        if not self._count:
            return ()
        sources, counts = self.rows.source_of_row[ids], self.rows.predicted_counts[ids]
        found = np.bincount(sources, weights=counts, minlength=self._count)
        return tuple(int(count) for count in found)
