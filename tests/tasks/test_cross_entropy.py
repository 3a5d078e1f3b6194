"""The language-model loss: same numbers as torch's, in less memory."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from modelyard.tasks import cross_entropy as module
from modelyard.tasks.cross_entropy import shifted_cross_entropy


def reference(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    flat = functional.cross_entropy(
        logits[:, :-1].reshape(-1, logits.shape[2]).float(), tokens[:, 1:].reshape(-1), reduction="none"
    )
    return flat.view(tokens.shape[0], -1)


@pytest.mark.parametrize("block_elements", [1, 7 * 3, 1 << 17])
def test_losses_and_gradients_equal_torchs_whatever_the_block(
    block_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CPU_BLOCK_ELEMENTS", block_elements)
    torch.manual_seed(0)
    leaf = (torch.randn(3, 5, 7) * 4).requires_grad_()
    tokens = torch.randint(0, 7, (3, 5))
    weights = torch.randn(3, 4)
    expected = reference(leaf, tokens)
    (gradient,) = torch.autograd.grad((expected * weights).sum(), leaf)

    losses = shifted_cross_entropy(leaf * 1.0, tokens)
    (ours,) = torch.autograd.grad((losses * weights).sum(), leaf)

    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours, gradient, rtol=1e-5, atol=1e-6)


def test_hand_computed_loss_of_two_tokens() -> None:
    # softmax of (0, ln 3) is (1/4, 3/4): predicting token 1 costs -ln 3/4, predicting token 0 costs -ln 1/4
    scores = torch.tensor([0.0, float(torch.tensor(3.0).log())])
    logits = scores.expand(1, 3, 2)
    losses = shifted_cross_entropy(logits, torch.tensor([[0, 1, 0]]))
    torch.testing.assert_close(losses, -torch.tensor([[0.75, 0.25]]).log())


def test_the_last_positions_logits_get_no_gradient() -> None:
    leaf = torch.randn(2, 4, 9).requires_grad_()
    (gradient,) = torch.autograd.grad(
        shifted_cross_entropy(leaf * 1.0, torch.zeros(2, 4, dtype=torch.long)).sum(), leaf
    )
    assert gradient[:, -1].abs().max() == 0
    assert gradient[:, :-1].abs().min() > 0


def test_bf16_logits_lose_only_their_own_rounding() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 6, 50).bfloat16()
    tokens = torch.randint(0, 50, (2, 6))
    leaf = logits.clone().requires_grad_()
    losses = shifted_cross_entropy(leaf * 1.0, tokens)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, reference(logits, tokens), rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(losses.sum(), leaf)
    exact = logits.float().requires_grad_()
    (expected,) = torch.autograd.grad(reference(exact, tokens).sum(), exact)
    torch.testing.assert_close(gradient.float(), expected, rtol=1e-2, atol=1e-6)


def test_extreme_logits_stay_finite() -> None:
    leaf = torch.tensor([[[1e4, -1e4], [0.0, 0.0]]]).requires_grad_()
    losses = shifted_cross_entropy(leaf * 1.0, torch.tensor([[0, 1]]))
    (gradient,) = torch.autograd.grad(losses.sum(), leaf)
    assert losses.item() == pytest.approx(2e4)
    assert torch.isfinite(gradient).all()


def test_logits_that_another_operation_still_needs_are_not_corrupted_silently() -> None:
    leaf = torch.randn(1, 3, 4).requires_grad_()
    logits = leaf.sigmoid()  # sigmoid's own backward pass needs its result
    total = shifted_cross_entropy(logits, torch.tensor([[0, 1, 2]])).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_no_matrix_of_the_size_of_the_logits_is_made() -> None:
    leaf = torch.randn(4, 64, 2048).requires_grad_()
    logits = leaf * 1.0
    address = logits.data_ptr()
    seen: list[int] = []
    logits.register_hook(lambda gradient: seen.append(gradient.data_ptr()))
    shifted_cross_entropy(logits, torch.randint(0, 2048, (4, 64))).sum().backward()
    assert seen == [address]
