"""The auxiliary loss of a router: how evenly the tokens of a batch are sent to the experts.

It is a product of two means over all tokens of a batch, so it is kept as sums that parts of a batch
can be added up from; `objective/router.py` makes the loss of a global batch of them.
"""

from typing import Any, NamedTuple

import torch
from torch.nn.functional import softmax
from transformers import PreTrainedModel

from peft_dist.common.errors import ModelError


class Routing(NamedTuple):
    """What the routers of all layers made of some tokens, over E experts."""

    counts: torch.Tensor
    """float32 [E], how often each expert was among those chosen."""
    probabilities: torch.Tensor
    """float32 [E], sums of the routers' probabilities; carry the gradient."""
    decisions: torch.Tensor
    """float32 [], tokens times layers."""


class RouterTerm(NamedTuple):
    """The auxiliary loss that a model adds to its own, as its config.json says."""

    coefficient: float
    experts: int
    top_k: int

    def routing(
        self, router_logits: tuple[torch.Tensor, ...], mask: torch.Tensor | None
    ) -> Routing:
        """Sum up what routers say of the tokens of a batch.

        Follows `load_balancing_loss_func` (transformers/models/mixtral/modeling_mixtral.py).

        Args:
            router_logits: Of each layer [tokens, E].
            mask: [tokens] true for those that count. Off: all do.
        """
        device = router_logits[0].device
        counts = torch.zeros(self.experts, device=device)
        probabilities = torch.zeros(self.experts, device=device)
        tokens = router_logits[0].numel() // self.experts
        weights = torch.ones(tokens, device=device) if mask is None else mask.flatten().float()
        for logits in router_logits:
            of_layer = softmax(logits.view(tokens, self.experts), dim=-1)
            chosen = of_layer.detach().topk(self.top_k, dim=-1).indices
            counts.index_add_(0, chosen.flatten(), weights.repeat_interleave(self.top_k))
            probabilities = probabilities + (of_layer.float() * weights[:, None]).sum(dim=0)
        return Routing(counts, probabilities, weights.sum() * len(router_logits))

    def loss(self, routing: Routing, whole: Routing) -> torch.Tensor:
        """Return the part that some tokens have in the loss of a batch; carries their gradient.

        Args:
            routing: Of the tokens.
            whole: Of all tokens of the batch.
        """
        shares = whole.counts / whole.decisions
        means = routing.probabilities / whole.decisions
        return self.coefficient * self.experts * (shares * means).sum()


def router_term(model: PreTrainedModel) -> RouterTerm | None:
    """Return the auxiliary loss that a model trains with; None where its config asks for none."""
    wanted = getattr(model.config.get_text_config(), "output_router_logits", False)
    coefficient = getattr(model, "router_aux_loss_coef", 0.0)
    if not wanted or not coefficient:
        return None
    own: Any = model
    return RouterTerm(coefficient, own.num_experts, own.num_experts_per_tok)


def auxiliary_loss(model: PreTrainedModel, out: Any) -> float:
    """Return what a model has added to its own loss for its router.

    Raises:
        ModelError: Where it is not what `RouterTerm` makes of the same logits.
    """
    theirs = getattr(out, "aux_loss", None)
    term = router_term(model)
    if theirs is None or term is None:
        return 0.0
    routing = term.routing(out.router_logits, None)
    ours = float(term.loss(routing, routing))
    if abs(ours - term.coefficient * float(theirs)) > 1e-4 * abs(ours):
        raise ModelError(
            f"{model.config.model_type} has an auxiliary loss of its own for its router: "
            f"{float(theirs):.4f}, where that of others is {ours / term.coefficient:.4f}",
            where="model.name",
            remedy="set output_router_logits to false in config.json to train without it",
        )
    return ours
