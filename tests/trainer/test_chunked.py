"""The chunked loss: values and gradients of torch's cross entropy, in little memory, for every kind of head."""

from __future__ import annotations

import pytest
import torch

from launcher.trainer.objectives import chunked
from launcher.trainer.objectives.chunked import Head, weighted_nll

TOKENS, HIDDEN, VOCAB = 37, 16, 53


def inputs(*, bias: bool = False, seed: int = 0) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(TOKENS, HIDDEN, generator=g, requires_grad=True)
    weight = torch.randn(VOCAB, HIDDEN, generator=g, requires_grad=True)
    offset = torch.randn(VOCAB, generator=g, requires_grad=True) if bias else None
    targets = torch.randint(0, VOCAB, (TOKENS,), generator=g)
    weights = torch.rand(TOKENS, generator=g)
    return hidden, weight, offset, targets, weights  # type: ignore[return-value]


def plain(hidden, weight, bias, targets, weights, head):  # type: ignore[no-untyped-def]
    """The same by torch alone, in double precision."""
    logits = torch.nn.functional.linear(hidden.double(), weight.double(), None if bias is None else bias.double())
    logits = logits * head.scale
    if head.softcap:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return (torch.nn.functional.cross_entropy(logits, targets, reduction="none") * weights).sum()


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(chunked.CHUNK_BYTES, "cpu", 4 * VOCAB * 5)  # five tokens


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("head", [Head(), Head(scale=0.25), Head(softcap=3.0), Head(scale=2.0, softcap=5.0)])
def test_chunked_loss_and_gradients_equal_those_of_torch_cross_entropy(head: Head, bias: bool) -> None:
    ours, theirs = inputs(bias=bias), inputs(bias=bias)
    loss, expected = weighted_nll(*ours, head), plain(*theirs, head)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    (loss * 0.3).backward()
    (expected * 0.3).backward()
    for mine, other in zip(ours[:3], theirs[:3], strict=True):
        if other is not None:
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("small_chunks")
def test_logits_of_all_tokens_never_exist_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    original = Head.logits
    monkeypatch.setattr(Head, "logits", lambda *a: (seen.append(a[1].shape[0]), original(*a))[1])
    weighted_nll(*inputs(), Head()).backward()
    assert sum(seen) == TOKENS
    assert max(seen) == 5


def test_a_chunk_of_a_large_vocabulary_stays_below_64_mib_on_a_cpu() -> None:
    assert chunked.chunk_tokens(128_256, "cpu") * 128_256 * 4 <= 64 * 2**20
    assert chunked.chunk_tokens(10**9, "cpu") == 1


def test_no_gradient_is_computed_where_none_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "_logits_gradient", lambda *a: pytest.fail("a gradient was computed"))
    with torch.no_grad():
        assert weighted_nll(*inputs(), Head()).item() > 0


def test_a_micro_batch_without_trained_tokens_has_loss_and_gradient_zero() -> None:
    hidden, weight, _, targets, weights = inputs()
    loss = weighted_nll(hidden[:0], weight, None, targets[:0], weights[:0], Head())
    loss.backward()
    assert loss.item() == 0
    assert not weight.grad.any()


def test_autocast_computes_logits_in_its_type_and_returns_gradients_in_the_weights_type() -> None:
    ours, theirs = inputs(), inputs()
    with torch.autocast("cpu", torch.bfloat16):
        loss = weighted_nll(*ours, Head())
    loss.backward()
    expected = plain(*theirs, Head())
    assert loss.item() == pytest.approx(expected.item(), rel=2e-2)
    assert loss.item() != expected.item()
    assert ours[1].grad.dtype == torch.float32
