"""Muon over the matrices of the flat adapter, AdamW over its vectors (torch's own of both)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from peft_dist.config.recipe import Train
from peft_dist.optim.optimizer import AdapterOptimizer, Group, Moments, make_adamw


class MuonOptimizer(AdapterOptimizer):
    """Muon (torch.optim.Muon), whose state is one momentum for each element of a matrix.

    Learning rates are those of AdamW: updates are scaled to have the size of its (arXiv
    2502.16982). Matrices are orthogonalised in bfloat16.
    """

    def __init__(
        self,
        parameters: Mapping[Group, nn.Parameter],
        shapes: Mapping[Group, Sequence[torch.Size]],
        train: Train,
    ) -> None:
        """Take `Engine.flat_parameters`, and the shapes of what lies in each.

        Args:
            parameters: By group.
            shapes: By group, in order.
            train: The recipe's settings.
        """
        vectors = {group: flat for group, flat in parameters.items() if not group.decays}
        self._vectors = AdapterOptimizer(make_adamw(vectors, train)) if vectors else None
        self._order, self._flat = list(parameters), list(parameters.values())
        self._momenta: dict[Group, torch.Tensor] = {}
        groups: list[dict[str, Any]] = []
        states: list[tuple[nn.Parameter, torch.Tensor]] = []
        for group, flat in parameters.items():
            if not group.decays:
                continue
            assert flat.grad is not None
            momentum = self._momenta[group] = torch.zeros_like(flat)
            sizes = [shape.numel() for shape in shapes[group]]
            matrices = []
            for shape, *parts in zip(
                shapes[group],
                flat.detach().split(sizes),
                flat.grad.split(sizes),
                momentum.split(sizes),
                strict=True,
            ):
                value, gradient, average = (part.view(shape[0], -1) for part in parts)
                matrix = nn.Parameter(value)
                matrix.grad = gradient
                matrices.append(matrix)
                states.append((matrix, average))
            decay = train.weight_decay
            groups.append(
                {"params": matrices, "weight_decay": decay, "rate_factor": group.rate_factor}
            )
        self._muon: torch.optim.Muon | None = None
        if groups:
            self._muon = torch.optim.Muon(
                groups,
                momentum=train.betas[0],
                eps=train.epsilon,
                adjust_lr_fn="match_rms_adamw",
            )
            for matrix, average in states:
                self._muon.state[matrix]["momentum_buffer"] = average
        self._updates = torch.zeros((), device=self._flat[0].device)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups, whose learning rates may be set."""
        found = [] if self._muon is None else list(self._muon.param_groups)
        return found + ([] if self._vectors is None else self._vectors.param_groups)

    def step(self, finite: torch.Tensor) -> None:
        """Update the adapter from its gradients, where `finite` is true; it stays on the device."""
        if self._vectors is not None:
            self._vectors.step(finite)
        if self._muon is not None:
            pairs = zip(self._order, self._flat, strict=True)
            kept = [flat.detach() for group, flat in pairs if group.decays]
            kept += self._momenta.values()
            before = [tensor.clone() for tensor in kept]
            self._muon.step()
            for tensor, old in zip(kept, before, strict=True):
                tensor.copy_(torch.where(finite, tensor, old))
        self._updates += finite

    def moments(self) -> Moments:
        """Return a copy of the state; the squares of matrices are zeros."""
        means, squares = [], []
        of_vectors = None if self._vectors is None else self._vectors.moments()
        at = 0
        for group, flat in zip(self._order, self._flat, strict=True):
            if group.decays:
                means.append(self._momenta[group].cpu().clone())
                squares.append(torch.zeros(flat.numel()))
            else:
                assert of_vectors is not None
                means.append(of_vectors.mean[at : at + flat.numel()])
                squares.append(of_vectors.square[at : at + flat.numel()])
                at += flat.numel()
        return Moments(torch.cat(means), torch.cat(squares), int(self._updates))

    def restore(self, moments: Moments) -> None:
        """Go on from a state, with the adapter as it stands now."""
        sizes = [flat.numel() for flat in self._flat]
        parts = zip(
            self._order, moments.mean.split(sizes), moments.square.split(sizes), strict=True
        )
        means, squares = [torch.zeros(0)], [torch.zeros(0)]
        for group, mean, square in parts:
            if group.decays:
                self._momenta[group].copy_(mean)
            else:
                means.append(mean)
                squares.append(square)
        if self._vectors is not None:
            of_vectors = Moments(torch.cat(means), torch.cat(squares), moments.updates)
            self._vectors.restore(of_vectors)
        self._updates.fill_(moments.updates)
