"""The chunked loss is the cross-entropy of the whole vocabulary, gradient included."""

import pytest
import torch
from torch.nn import functional

from peft_dist.model import cross_entropy as loss
from peft_dist.model.cross_entropy import cross_entropy
from peft_dist.model.token_rows import OutputMatrix

VOCABULARY, WIDTH, TARGETS = 50, 16, 11


@pytest.mark.parametrize("rows_per_chunk", [1, 4, 100])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_chunked_loss_is_the_cross_entropy(
    monkeypatch: pytest.MonkeyPatch, rows_per_chunk: int, softcap: float | None, with_bias: bool
) -> None:
    monkeypatch.setattr(loss, "LOGIT_BYTES_PER_CHUNK", rows_per_chunk * VOCABULARY * 4)
    torch.manual_seed(0)
    weight = torch.randn(VOCABULARY, WIDTH)
    bias = torch.randn(VOCABULARY) if with_bias else None
    targets = torch.randint(VOCABULARY, (TARGETS,))
    hidden = torch.randn(TARGETS, WIDTH, requires_grad=True)
    plain = hidden.detach().clone().requires_grad_()

    def after(logits: torch.Tensor) -> torch.Tensor:
        assert softcap is not None
        return torch.tanh(logits / softcap) * softcap

    nll = cross_entropy(
        hidden, OutputMatrix(weight, bias), targets, None if softcap is None else after
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


@pytest.mark.parametrize("rows_per_chunk", [1, 100])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_trained_matrix_and_trained_rows_of_one_get_their_gradients(
    monkeypatch: pytest.MonkeyPatch, rows_per_chunk: int, softcap: float | None
) -> None:
    monkeypatch.setattr(loss, "LOGIT_BYTES_PER_CHUNK", rows_per_chunk * VOCABULARY * 4)
    torch.manual_seed(0)
    ids = torch.tensor([3, 40])
    weight, bias = torch.randn(VOCABULARY, WIDTH), torch.randn(VOCABULARY)
    rows, hidden = torch.randn(2, WIDTH), torch.randn(TARGETS, WIDTH)
    targets, weights = torch.randint(VOCABULARY, (TARGETS,)), torch.rand(TARGETS)
    targets[0] = ids[1]

    def after(logits: torch.Tensor) -> torch.Tensor:
        return logits if softcap is None else torch.tanh(logits / softcap) * softcap

    def gradients(*leaves: torch.Tensor, ours: bool, with_rows: bool) -> list[torch.Tensor]:
        h, w, b, r = (one.clone().requires_grad_() for one in leaves)
        if ours and with_rows:
            matrix = OutputMatrix(w.detach(), b.detach(), ids, r)
        else:
            matrix = OutputMatrix(w, b)
        if ours:
            nll = cross_entropy(h, matrix, targets, None if softcap is None else after)
        else:
            whole = w.index_copy(0, ids, r) if with_rows else w
            logits = after(functional.linear(h, whole, b))
            nll = functional.cross_entropy(logits, targets, reduction="none")
        wanted = [h, r] if with_rows else [h, w, b]
        return [nll.detach(), *torch.autograd.grad((nll * weights).sum(), wanted)]

    for with_rows in (False, True):
        leaves = (hidden, weight, bias, rows)
        found = gradients(*leaves, ours=True, with_rows=with_rows)
        expected = gradients(*leaves, ours=False, with_rows=with_rows)
        torch.testing.assert_close(found, expected)


def test_no_more_logits_stand_at_once_than_a_chunk_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, vocabulary = 256, 4096
    monkeypatch.setattr(loss, "LOGIT_BYTES_PER_CHUNK", 8 * vocabulary * 4)
    hidden = torch.randn(rows, WIDTH, requires_grad=True)
    weight, targets = torch.randn(vocabulary, WIDTH), torch.zeros(rows, dtype=torch.int64)
    with torch.profiler.profile(profile_memory=True) as profile:
        nll = cross_entropy(hidden, OutputMatrix(weight, None), targets, None)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert nll.shape == (rows,)
    assert largest < rows * vocabulary * 4 / 8


def test_no_gradient_is_made_where_none_is_wanted() -> None:
    hidden, weight = torch.randn(3, WIDTH), torch.randn(VOCABULARY, WIDTH)
    with torch.no_grad():
        nll = cross_entropy(hidden, OutputMatrix(weight, None), torch.tensor([0, 1, 2]), None)
    assert not nll.requires_grad


def test_bfloat16_hidden_states_give_a_float32_loss() -> None:
    hidden = torch.randn(4, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, dtype=torch.bfloat16)
    targets = torch.arange(4)
    nll = cross_entropy(hidden, OutputMatrix(weight, None), targets, None)
    nll.sum().backward()
    expected = functional.cross_entropy((hidden @ weight.t()).float(), targets, reduction="none")
    assert nll.dtype == torch.float32
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.bfloat16
    torch.testing.assert_close(nll, expected)


def test_a_nearly_certain_token_keeps_its_gradient_in_16_bits() -> None:
    """1 - 2^-10 is 1 in bfloat16: a gradient made of rounded probabilities would be zero."""
    weight = torch.tensor([[8.0, 0.0], [0.0, 8.0]], dtype=torch.bfloat16)
    hidden = torch.tensor([[0.875, 0.0], [0.0, 1.0]], dtype=torch.bfloat16, requires_grad=True)
    plain = hidden.detach().double().requires_grad_()
    targets = torch.tensor([0, 1])
    cross_entropy(hidden, OutputMatrix(weight, None), targets, None).sum().backward()
    logits = functional.linear(plain, weight.double())
    functional.cross_entropy(logits, targets, reduction="sum").backward()
    assert plain.grad is not None and hidden.grad is not None
    assert 0.0 < float(plain.grad.abs().min()) < 0.01
    torch.testing.assert_close(hidden.grad.double(), plain.grad, rtol=0.01, atol=0)
