"""How noisy the gradient is, which says how large a batch is still worth its samples.

The estimator is that of McCandlish et al. 2018, "An Empirical Model of Large-Batch Training", appendix A.1: the mean
of b rows' gradients has the expected squared norm |G|^2 + tr(S) / b, so squared norms at two batch sizes give both
unknowns. The small batches are the micro-batches of all workers, the large one is the global batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

_MEMORY = 0.9
"""Share that the running means keep of themselves at each measurement."""


@dataclass(frozen=True)
class Norms:
    """Sums over the micro-batches of one step; they add up over workers."""

    squares: float = 0.0
    """Of the norms of the micro-batches' mean gradients."""
    inverse_rows: float = 0.0
    """One over the rows of each."""
    count: float = 0.0


@dataclass(frozen=True)
class Noise:
    """Running means of |G|^2 (`signal`) and tr(S) (`variance` of one row's gradient)."""

    signal: float
    variance: float

    @property
    def scale(self) -> float | None:
        """The gradient noise scale tr(S) / |G|^2 in rows: the batch from which on more rows help less and less."""
        return self.variance / self.signal if self.signal > 0 and self.variance > 0 else None


def estimate(norms: Norms, global_norm: float, global_rows: int, before: Noise | None) -> Noise | None:
    """`before` with one more measurement.

    Args:
        norms: of all workers.
        global_norm: of the mean gradient over the step's `global_rows` rows, not clipped.
    """
    if not norms.count or not math.isfinite(norms.squares + global_norm):
        return before
    small, inverse_small = norms.squares / norms.count, norms.inverse_rows / norms.count
    large, inverse_large = global_norm**2, 1.0 / global_rows
    if inverse_small - inverse_large < 0.01 * inverse_large:
        return before  # one micro-batch is the whole batch: nothing to compare
    variance = (small - large) / (inverse_small - inverse_large)
    signal = large - variance * inverse_large
    if before is None:
        return Noise(signal, variance)
    return Noise(_MEMORY * before.signal + (1 - _MEMORY) * signal, _MEMORY * before.variance + (1 - _MEMORY) * variance)


class NoiseMeter:
    """Takes the norms of micro-batches' gradients while autograd hands them to the optimizer's shards.

    Hooks see a micro-batch's whole gradient on each worker at every ZeRO stage, before it is accumulated or reduced.
    They do nothing outside `begin` ... `end`, and nothing in them waits for the device.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._square: torch.Tensor | None = None
        self._squares: list[tuple[torch.Tensor, float, int]] = []
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._weights = [1.0] * len(trainable)
        for index, parameter in enumerate(trainable):
            parameter.register_hook(partial(self._add, index))  # type: ignore[no-untyped-call]

    def weigh(self, weights: Sequence[float]) -> None:
        """Count the squared norm of each trainable parameter's gradient so many times, in the model's order."""
        self._weights = list(weights)

    def begin(self) -> None:
        """Expect the gradients of one micro-batch."""
        self._square = torch.zeros(())

    def end(self, rows: int, weight: float) -> None:
        """They are complete: of `rows` rows, times `weight` the rows' mean gradient."""
        assert self._square is not None
        self._squares.append((self._square, weight, rows))
        self._square = None

    def take(self) -> Norms:
        """The sums since the last call."""
        sums = Norms(
            squares=sum(float(square) / weight**2 for square, weight, _ in self._squares),
            inverse_rows=sum(1.0 / rows for _, _, rows in self._squares),
            count=float(len(self._squares)),
        )
        self._squares = []
        return sums

    def _add(self, index: int, gradient: torch.Tensor) -> None:
        if self._square is not None:
            norm = torch.linalg.vector_norm(gradient, dtype=torch.float32)
            self._square = self._square.to(norm.device) + self._weights[index] * norm**2
