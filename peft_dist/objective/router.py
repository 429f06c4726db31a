"""The auxiliary loss of a model's router over a global batch, whatever shares the batch out.

transformers computes it of each micro-batch, so that it depends on how many there are. Here it is
what transformers would compute of the whole batch at once. How often each expert is chosen has to
be known before the first backward pass for that: one more pass without gradients.
"""

from collections.abc import Sequence

import torch

from peft_dist.data.order import RowIds
from peft_dist.data.token_cache import TokenizedRows
from peft_dist.distributed.collectives import sum_over
from peft_dist.model.loss import CausalLM, Losses
from peft_dist.model.router import Routing
from peft_dist.model_setup import ModelSetup


class RouterBalance:
    """The auxiliary loss of every step of a training; nothing where the model has none."""

    def __init__(self, setup: ModelSetup, rows: TokenizedRows) -> None:
        """Take a model and the rows it is trained on."""
        self._setup, self.rows = setup, rows
        self.term = setup.model.router_term if isinstance(setup.model, CausalLM) else None
        self._whole: Routing | None = None

    def begin(self, groups: Sequence[RowIds]) -> None:
        """Count how often each expert is chosen in a global batch, without dropout. Collective.

        Args:
            groups: The rows of each micro-batch of this process.
        """
        setup, model = self._setup, self._setup.model
        if self.term is None or not isinstance(model, CausalLM):
            return
        device = setup.world.device
        sums = torch.zeros(2 * self.term.experts + 1, device=device)
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad(), setup.autocast():
                for micro in groups:
                    batch = setup.pack(self.rows, micro).to(device)
                    routing = model(batch, None, model.route).routing
                    sums += torch.cat([*routing[:2], routing.decisions[None]])
        finally:
            model.train(was_training)
        sum_over(sums)
        counts, probabilities, decisions = sums.split([self.term.experts] * 2 + [1])
        self._whole = Routing(counts, probabilities, decisions[0])

    def share(self, losses: Losses) -> torch.Tensor | float:
        """Return the part of a micro-batch in the loss of the global batch."""
        if self.term is None or losses.routing is None:
            return 0.0
        assert self._whole is not None
        return self.term.loss(losses.routing, self._whole)
