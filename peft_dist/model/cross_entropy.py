"""Cross-entropy against a large vocabulary whose logits never stand in memory at once.

The head may be stored narrower than it computes: it is cast part by part.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch

LOGIT_BYTES_PER_CHUNK = 256 << 20
"""Float32 logits that stand in memory at once."""
CAST_BYTES = 4 << 20
"""Bytes of the head that are cast at once where it is stored narrower than it computes."""


def _vocabulary_parts(
    weight: torch.Tensor, dtype: torch.dtype
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield the head in the dtype that computes: as it is, or cast part by part.

    A cast part is used while it stands in the processor's cache; a cast head would be written to
    memory and read again.
    """
    rows = weight.shape[0]
    if weight.dtype != dtype:
        rows = max(1, CAST_BYTES // (weight.shape[1] * dtype.itemsize))
    for start in range(0, weight.shape[0], rows):
        part = slice(start, start + rows)
        yield part, weight[part].to(dtype)


def vocabulary_logits(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Return float32 logits [N, V] of hidden [N, H]."""
    logits = hidden.new_empty(hidden.shape[0], weight.shape[0], dtype=torch.float32)
    for part, rows in _vocabulary_parts(weight, hidden.dtype):
        logits[:, part] = hidden @ rows.t()
    return logits if bias is None else logits.add_(bias)


def _times_vocabulary(step: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return step [N, V] times the head [V, H]."""
    total: torch.Tensor | None = None
    for part, rows in _vocabulary_parts(weight, step.dtype):
        total = step[:, part] @ rows if total is None else total.addmm_(step[:, part], rows)
    assert total is not None
    return total


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropy of hidden [N, H] against a frozen head [V, H] without [N, V] logits.

    The gradient for `hidden` is made chunk by chunk during forward, while the logits of that
    chunk stand; backward only scales it. The head is frozen and gets none.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        after: Callable[[torch.Tensor], torch.Tensor] | None,
    ) -> torch.Tensor:
        rows = max(1, LOGIT_BYTES_PER_CHUNK // (4 * weight.shape[0]))
        wants_grad = ctx.needs_input_grad[0]
        nll = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
        grad = torch.empty_like(hidden) if wants_grad else None
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            products = vocabulary_logits(hidden[part], weight, bias)
            if after is None:
                logits = products
            else:
                with torch.set_grad_enabled(wants_grad):
                    logits = after(products.requires_grad_(wants_grad))
            values = logits.detach()
            log_norm = torch.logsumexp(values, dim=-1)
            picked = values.gather(1, targets[part, None]).squeeze(1)
            nll[part] = log_norm - picked
            if grad is not None:
                step = torch.exp(values - log_norm[:, None])
                step[torch.arange(step.shape[0], device=step.device), targets[part]] -= 1.0
                if after is not None:
                    (step,) = torch.autograd.grad(logits, products, step)
                grad[part] = _times_vocabulary(step.to(hidden.dtype), weight)
        ctx.save_for_backward(grad)
        return nll

    @staticmethod
    def backward(ctx: Any, grad_nll: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad * grad_nll[:, None].to(grad.dtype), None, None, None, None


def chunked_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    after: Callable[[torch.Tensor], torch.Tensor] | None,
) -> torch.Tensor:
    """Return the loss of each target, float32 [N], with a gradient for `hidden` alone.

    Args:
        hidden: [N, H].
        weight: The head [V, H].
        bias: [V], or none.
        targets: int64 [N].
        after: What makes logits of the head's products [n, V], such as a scale. Off: nothing.
    """
    nll: torch.Tensor = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]  # it is torch's
        hidden, weight, bias, targets, after
    )
    return nll
