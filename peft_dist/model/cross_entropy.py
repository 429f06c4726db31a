"""Cross-entropy of hidden states against a vocabulary, in chunks.

The logits of a long batch never stand in memory at once.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from peft_dist.model.token_rows import OutputMatrix

LOGIT_BYTES_PER_CHUNK = 256 << 20
"""Float32 logits that stand in memory at once."""
CAST_BYTES = 4 << 20
"""Bytes of the head that are cast at once where it is stored narrower than it computes."""

HALF_SCALE = 1024.0
"""By what gradients are larger while they stand in float16: they are made before the scale of the
loss is known, and most of them would be too small for it."""

After = Callable[[torch.Tensor], torch.Tensor]
"""Maps products with the matrix to logits."""


def cross_entropy(
    hidden: torch.Tensor, matrix: OutputMatrix, targets: torch.Tensor, after: After | None
) -> torch.Tensor:
    """Return the negative log-likelihood, float32 [N], of targets [N] given hidden [N, H]."""
    nll: torch.Tensor = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]  # it is torch's
        hidden, matrix.weight, matrix.bias, matrix.ids, matrix.rows, targets, after
    )
    return nll


def logits_of(hidden: torch.Tensor, matrix: OutputMatrix) -> torch.Tensor:
    """Return the float32 products [N, V] of hidden [N, H] with a matrix."""
    logits = hidden.new_empty(hidden.shape[0], matrix.weight.shape[0], dtype=torch.float32)
    for part, rows in _vocabulary_parts(matrix.weight, hidden.dtype):
        if hidden.is_cuda and hidden.dtype != torch.float32:
            # Its sums are float32 anyway: written so, they are neither rounded nor copied.
            torch.mm(hidden, rows.t(), out_dtype=torch.float32, out=logits[:, part])
        else:
            logits[:, part] = hidden @ rows.t()
    if matrix.ids is not None and matrix.rows is not None:
        own = hidden @ matrix.rows.to(hidden.dtype).t()
        logits.index_copy_(1, matrix.ids, own.float())
    return logits if matrix.bias is None else logits.add_(matrix.bias)


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


def times_vocabulary(step: torch.Tensor, matrix: OutputMatrix) -> torch.Tensor:
    """Return step [N, V] times the matrix [V, H]; `step` is changed where rows are trained."""
    own: torch.Tensor | None = None
    if matrix.ids is not None and matrix.rows is not None:
        own = step[:, matrix.ids] @ matrix.rows.to(step.dtype)
        step.index_fill_(1, matrix.ids, 0.0)
    total: torch.Tensor | None = own
    for part, rows in _vocabulary_parts(matrix.weight, step.dtype):
        total = step[:, part] @ rows if total is None else total.addmm_(step[:, part], rows)
    assert total is not None
    return total


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropy without [N, V] logits.

    The gradients for `hidden`, and for trained rows of the matrix, are made chunk by chunk during
    forward, while the logits of that chunk stand; backward only scales them. A matrix that is
    trained whole gets its gradient in backward, from logits that are computed again: its size
    allows no copy for every target.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        ids: torch.Tensor | None,
        rows: torch.Tensor | None,
        targets: torch.Tensor,
        after: After | None,
    ) -> torch.Tensor:
        matrix = OutputMatrix(weight, bias, ids, rows)
        to_hidden, to_weight, to_bias, _, to_rows = ctx.needs_input_grad[:5]
        nll = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
        grad = torch.empty_like(hidden) if to_hidden else None
        own = None
        if to_rows and rows is not None:
            own = hidden.new_empty(hidden.shape[0], len(rows), dtype=torch.float32)
        wanted, is_half = None, hidden.dtype == torch.float16
        if to_hidden or to_rows:
            wanted = torch.float32 if own is not None or is_half else hidden.dtype
        for part in _chunks(matrix, len(hidden)):
            nll[part], step = _losses(hidden[part], matrix, targets[part], after, wanted)
            if own is not None and step is not None:
                own[part] = step[:, ids]
            if grad is not None and step is not None:
                step = step * HALF_SCALE if is_half else step
                grad[part] = times_vocabulary(step.to(hidden.dtype), matrix)
        ctx.after, ctx.scale = after, HALF_SCALE if is_half else 1.0
        # Of a frozen matrix, which an engine may have freed by then, backward needs nothing.
        whole = (weight, bias, targets) if to_weight or to_bias else (None, None, None)
        ctx.save_for_backward(
            grad, own, hidden if to_weight or to_bias or to_rows else None, *whole
        )
        return nll

    @staticmethod
    def backward(ctx: Any, grad_nll: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad, own, hidden, weight, bias, targets = ctx.saved_tensors
        scale = grad_nll[:, None]
        to_hidden = None if grad is None else grad * (scale / ctx.scale).to(grad.dtype)
        to_rows = None if own is None else (own * scale).t() @ hidden.float()
        to_weight = to_bias = None
        if targets is not None:
            matrix = OutputMatrix(weight, bias)
            to_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
            to_bias = torch.zeros_like(bias) if ctx.needs_input_grad[2] else None
            for part in _chunks(matrix, len(hidden)):
                _, step = _losses(hidden[part], matrix, targets[part], ctx.after, torch.float32)
                assert step is not None
                step *= scale[part]
                if to_bias is not None:
                    to_bias += step.sum(0)
                if to_weight is not None:
                    to_weight += step.to(hidden.dtype).t() @ hidden[part]
        return to_hidden, to_weight, to_bias, None, to_rows, None, None


def _chunks(matrix: OutputMatrix, count: int) -> Iterator[slice]:
    size = max(1, LOGIT_BYTES_PER_CHUNK // (4 * matrix.weight.shape[0]))
    for start in range(0, count, size):
        yield slice(start, start + size)


def _losses(
    hidden: torch.Tensor,
    matrix: OutputMatrix,
    targets: torch.Tensor,
    after: After | None,
    step_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the losses [N] and their gradient by the products [N, V] in `step_dtype`, if any.

    [N, V] is read and written as seldom as torch's kernels allow: on a GPU that is what it costs.
    """
    products = logits_of(hidden, matrix)
    if after is None:
        logits = products
    else:
        with torch.set_grad_enabled(step_dtype is not None):
            logits = after(products.requires_grad_(step_dtype is not None))
    log_shares = torch.log_softmax(logits.detach(), dim=-1)
    picked = log_shares.gather(1, targets[:, None])
    nll = -picked.squeeze(1)
    if step_dtype is None:
        return nll, None
    step = torch.empty_like(log_shares, dtype=step_dtype if after is None else torch.float32)
    torch.exp(log_shares, out=step)
    # exp(x) - 1 of a token that is nearly certain would be lost to rounding, in 16 bits above all.
    step.scatter_(1, targets[:, None], torch.expm1(picked).to(step.dtype))
    del log_shares
    if after is not None:
        (step,) = torch.autograd.grad(logits, products, step)
    return nll, step.to(step_dtype)
