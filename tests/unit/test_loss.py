"""The chunked loss is the cross-entropy of the whole vocabulary, gradient included."""

import pytest
import torch
from torch.nn import functional

from peft_dist.model import cross_entropy

VOCABULARY, WIDTH, TARGETS = 50, 16, 11


@pytest.mark.parametrize("rows_per_chunk", [1, 4, 100])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_chunked_loss_is_the_cross_entropy(
    monkeypatch: pytest.MonkeyPatch, rows_per_chunk: int, softcap: float | None, with_bias: bool
) -> None:
    monkeypatch.setattr(cross_entropy, "LOGIT_BYTES_PER_CHUNK", rows_per_chunk * VOCABULARY * 4)
    torch.manual_seed(0)
    weight = torch.randn(VOCABULARY, WIDTH)
    bias = torch.randn(VOCABULARY) if with_bias else None
    targets = torch.randint(VOCABULARY, (TARGETS,))
    hidden = torch.randn(TARGETS, WIDTH, requires_grad=True)
    plain = hidden.detach().clone().requires_grad_()

    def after(logits: torch.Tensor) -> torch.Tensor:
        assert softcap is not None
        return torch.tanh(logits / softcap) * softcap

    nll = cross_entropy.chunked_cross_entropy(
        hidden, weight, bias, targets, None if softcap is None else after
    )
    logits = functional.linear(plain, weight, bias)
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    expected = functional.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(nll, expected)

    weights = torch.rand(TARGETS)  # rows may count differently
    (nll * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(hidden.grad, plain.grad)


def test_no_more_logits_stand_at_once_than_a_chunk_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, vocabulary = 256, 4096
    monkeypatch.setattr(cross_entropy, "LOGIT_BYTES_PER_CHUNK", 8 * vocabulary * 4)
    hidden = torch.randn(rows, WIDTH, requires_grad=True)
    weight, targets = torch.randn(vocabulary, WIDTH), torch.zeros(rows, dtype=torch.int64)
    with torch.profiler.profile(profile_memory=True) as profile:
        nll = cross_entropy.chunked_cross_entropy(hidden, weight, None, targets, None)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert nll.shape == (rows,)
    assert largest < rows * vocabulary * 4 / 8


def test_no_gradient_is_made_where_none_is_wanted() -> None:
    hidden, weight = torch.randn(3, WIDTH), torch.randn(VOCABULARY, WIDTH)
    with torch.no_grad():
        nll = cross_entropy.chunked_cross_entropy(
            hidden, weight, None, torch.tensor([0, 1, 2]), None
        )
    assert not nll.requires_grad


def test_bfloat16_hidden_states_give_a_float32_loss() -> None:
    hidden = torch.randn(4, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, dtype=torch.bfloat16)
    targets = torch.arange(4)
    nll = cross_entropy.chunked_cross_entropy(hidden, weight, None, targets, None)
    nll.sum().backward()
    expected = functional.cross_entropy((hidden @ weight.t()).float(), targets, reduction="none")
    assert nll.dtype == torch.float32
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.bfloat16
    torch.testing.assert_close(nll, expected)
