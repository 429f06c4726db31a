"""Where the factors of a LoRA start, computed from a weight, from what a layer reads, or from both.

Tensors are float32 [out, in] where nothing else is said; A is [rank, in] and B [out, rank]. Nothing
is exchanged between processes here.
"""

from typing import NamedTuple

import torch

from peft_dist.common.errors import TrainingError

_ITERATIONS = 16
_SPARE = 8
"""Directions that a decomposition looks for beside those that are kept, which makes them exact."""
_FLOOR = 1e-9
"""Least variance of a direction, as a share of that of all."""
_DAMPING = 0.01
_MOST_DAMPING = 1e3
_INVERSE_ERROR = 0.05
_GAMMA = 16.0


class Factors(NamedTuple):
    """A and B of a LoRA."""

    a: torch.Tensor
    b: torch.Tensor


def principal_part(weight: torch.Tensor, rank: int, scaling: float, seed: int) -> Factors:
    """Return the largest singular directions: PiSSA's start (arXiv 2404.02948), by its fast way.

    The bits depend on the number of threads.
    """
    u, s, v = _largest(weight, rank, seed)
    root = (s / scaling).sqrt()
    return Factors(root[:, None] * v.t(), u * root)


def first_of_qr(weight: torch.Tensor, rank: int) -> Factors:
    """Return the first columns of Q and rows of R: OLoRA's start (arXiv 2406.01775)."""
    q, r = torch.linalg.qr(weight)
    return Factors(r[:rank].contiguous(), q[:, :rank].contiguous())


def lost_part(lost: torch.Tensor, rank: int, scaling: float, seed: int) -> Factors:
    """Return the largest part of what 4 bits have lost of a weight: LoftQ's (arXiv 2310.08659).

    Args:
        lost: The weight less what the base has of it.
        rank: Rank of the LoRA.
        scaling: What the product is multiplied by.
        seed: Of the decomposition.
    """
    u, s, v = (part[..., :rank] for part in _largest(lost, _wide(lost, rank), seed))
    root = (s / scaling).sqrt()
    return Factors(root[:, None] * v.t(), u * root)


def main_inputs(covariance: torch.Tensor, rank: int, seed: int) -> torch.Tensor:
    """Return as A the directions in which inputs vary most: EVA's start (arXiv 2410.07170).

    Args:
        covariance: Of the inputs, float64 [in, in].
        rank: Rank of the LoRA.
        seed: Of the decomposition.
    """
    # Directions in which nothing varies come from the seed, and not from how sums were rounded.
    source = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(covariance), 2 * rank, generator=source, dtype=torch.float64)
    noise = noise.to(covariance.device) * (_FLOOR * covariance.trace() / len(covariance)).sqrt()
    covariance = covariance + noise @ noise.t()
    _, _, v = _largest(covariance, _wide(covariance, 2 * rank), seed)
    return _signed(v[:, :rank]).t().float()


def weighed_part(
    weight: torch.Tensor, moment: torch.Tensor, rank: int, scaling: float, *, least: bool, name: str
) -> Factors:
    """Return the part of a weight that matters most, or least, for inputs: CorDA's start.

    arXiv 2406.05223, as PEFT computes it (`collect_eigens_for_layer` of its corda.py).

    Args:
        weight: Of the base.
        moment: Mean of the products of inputs, float64 [in, in].
        rank: Rank of the LoRA.
        scaling: What the product is multiplied by.
        least: Take what matters least for these inputs, and so keep what they need.
        name: Of the layer.

    Raises:
        TrainingError: Where the inputs leave nothing that can be inverted.
    """
    moment = moment.float()
    one = torch.eye(len(moment), device=moment.device)
    damping = _DAMPING
    while True:
        damped = moment + one * (moment.diagonal().mean() * damping)
        inverse, problem = torch.linalg.inv_ex(damped)
        if not problem and float(torch.dist(damped @ inverse, one)) < _INVERSE_ERROR:
            break
        damping *= 2
        if damping > _MOST_DAMPING:
            raise TrainingError(
                f"what {name} reads has no inverse",
                where="method.init",
                remedy="raise method.init_rows, or choose another init",
            )
    u, s, vh = torch.linalg.svd(weight @ damped, full_matrices=False)
    at = slice(-rank, None) if least else slice(0, rank)
    root = (s[at] / scaling).sqrt()
    return Factors(root[:, None] * (vh[at] @ inverse), u[:, at] * root)


def along_gradient(gradient: torch.Tensor, rank: int, seed: int) -> Factors:
    """Return directions of the first gradient of a weight: LoRA-GA (arXiv 2407.05000).

    As PEFT computes it by default (`lora_ga_init` of its layer.py: ArB2r, stable): A has the first
    `rank` right directions, B the next left ones.

    Args:
        gradient: Mean over rows, float64.
        rank: Rank of the LoRA, at most half of the smaller side.
        seed: Of the decomposition.
    """
    u, s, v = _largest(gradient, _wide(gradient, 4 * rank), seed)
    scale = len(gradient) ** 0.25 / _GAMMA**0.5
    b = _signed(u[:, rank : 2 * rank]) * s[rank : 2 * rank] * scale
    return Factors(_signed(v[:, :rank]).t().float(), b.float())


def _wide(matrix: torch.Tensor, rank: int) -> int:
    return int(min(rank + _SPARE, *matrix.shape))


def _largest(
    matrix: torch.Tensor, rank: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return about the `rank` largest singular values, with directions as columns."""
    with torch.random.fork_rng(devices=[matrix.device] if matrix.is_cuda else []):
        torch.manual_seed(seed)
        u, s, v = torch.svd_lowrank(matrix, q=rank, niter=_ITERATIONS)
    return u, s, v


def _signed(columns: torch.Tensor) -> torch.Tensor:
    """Return columns whose largest element is positive: a decomposition leaves signs open."""
    largest = columns.gather(0, columns.abs().argmax(dim=0, keepdim=True))
    signed: torch.Tensor = columns * largest.sign()
    return signed
