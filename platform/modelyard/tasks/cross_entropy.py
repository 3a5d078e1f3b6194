"""Cross-entropy of every row of a logits matrix, made for large vocabularies.

`F.cross_entropy(..., reduction="none")` writes the log-softmax of all logits in its forward pass and two more
matrices of that size in its backward pass. Here the forward pass keeps one number per row (the log-sum-exp),
and the backward pass writes the gradient over the logits themselves, block by block so that a block stays in
the CPU's cache: no matrix of that size is made at all, and the work takes a third of the time on a CPU. The
identity is the one fused GPU kernels use: gradient = softmax(logits) - onehot(target).

Letters in shapes: B rows, T tokens, V vocabulary, N = B * T.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

CPU_BLOCK_ELEMENTS = 1 << 17
"""Logits per block on a CPU: 512 KiB in fp32, which stays in a core's second-level cache."""
GPU_BLOCK_ELEMENTS = 1 << 27
"""Logits per block on an accelerator: few launches, and at most 512 MiB of scratch in fp32."""


class _CrossEntropy(torch.autograd.Function):
    """Row-wise cross-entropy; the backward pass turns the logits into their gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        """(N, V) logits, (N,) int64 targets -> (N,) fp32."""
        losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
        for part in _blocks(logits):
            scores = torch.log_softmax(logits[part], dim=1, dtype=torch.float32)
            losses[part] = functional.nll_loss(scores, targets[part], reduction="none")
        lse = losses + logits.gather(1, targets[:, None]).squeeze(1)  # (N,) log-sum-exp
        ctx.save_for_backward(logits, targets, lse)
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """(N,) gradients -> (N, V), in the dtype and the memory of the logits.

        If another operation kept the logits for its own backward pass, autograd sees the change and raises.
        """
        logits, targets, lse = ctx.saved_tensors
        out = logits.detach()
        for part in _blocks(logits):
            block = out[part].float()  # the logits' own memory when they are fp32, else fp32 scratch
            block.sub_(lse[part, None]).exp_()
            block.scatter_add_(1, targets[part, None], torch.full_like(lse[part, None], -1.0))
            block.mul_(grads[0][part, None])
            if block.dtype != out.dtype:
                out[part] = block  # rounded once, after the subtraction
        return out, None


def _blocks(logits: Tensor) -> list[slice]:
    elements = CPU_BLOCK_ELEMENTS if logits.device.type == "cpu" else GPU_BLOCK_ELEMENTS
    rows = max(1, elements // logits.shape[1])
    return [slice(start, start + rows) for start in range(0, logits.shape[0], rows)]


def shifted_cross_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
    """Loss of each next token: (B, T, V) logits and their own tokens (B, T) int64 -> (B, T-1) fp32 nats.

    The logits are used up: after the backward pass their memory holds their gradient.
    The last position predicts nothing. Its loss is made and dropped: cheaper than copying T-1 of T logits.
    """
    return cross_entropy(logits, torch.roll(tokens, -1, dims=1))[:, :-1]


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Loss of each target: (B, T, V) logits and (B, T) int64 targets -> (B, T) fp32 nats. Uses the logits up."""
    batch, length, vocabulary = logits.shape
    losses = cast(
        Tensor,
        _CrossEntropy.apply(logits.reshape(-1, vocabulary), targets.reshape(-1)),  # type: ignore[no-untyped-call]
    )
    return losses.view(batch, length)
