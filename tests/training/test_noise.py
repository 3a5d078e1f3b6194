"""The gradient noise scale that a run reports."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from modelyard.training.noise import Noise, NoiseMeter, Norms, estimate


def norms_of(gradients: np.ndarray, rows: int) -> Norms:
    """Of micro-batches of `rows` rows each, from each row's gradient (N, D)."""
    means = gradients.reshape(-1, rows, gradients.shape[1]).mean(axis=1)
    return Norms(float((means**2).sum()), len(means) / rows, float(len(means)))


def test_the_estimate_finds_signal_and_variance_of_a_known_gradient() -> None:
    rng = np.random.default_rng(0)
    mean, deviation = np.full(200, 0.05), 0.3
    noise = None
    for _ in range(200):
        gradients = mean + deviation * rng.standard_normal((64, 200))
        noise = estimate(norms_of(gradients, 8), float(np.linalg.norm(gradients.mean(axis=0))), 64, noise)
    assert noise is not None
    assert noise.signal == pytest.approx(200 * 0.05**2, rel=0.1)
    assert noise.variance == pytest.approx(200 * deviation**2, rel=0.1)
    assert noise.scale == pytest.approx(36, rel=0.2)


def test_micro_batches_of_unequal_size_are_no_bias() -> None:
    rng = np.random.default_rng(1)
    noise = None
    for _ in range(300):
        gradients = 0.1 + 0.3 * rng.standard_normal((30, 50))
        large, small = norms_of(gradients[:20], 10), norms_of(gradients[20:], 5)
        both = Norms(large.squares + small.squares, large.inverse_rows + small.inverse_rows, large.count + small.count)
        noise = estimate(both, float(np.linalg.norm(gradients.mean(axis=0))), 30, noise)
    assert noise is not None
    assert noise.variance == pytest.approx(50 * 0.09, rel=0.15)


def test_one_micro_batch_that_is_the_whole_batch_tells_nothing() -> None:
    known = Noise(1.0, 2.0)
    assert estimate(Norms(4.0, 1 / 8, 1.0), 2.0, 8, known) is known
    assert estimate(Norms(), 2.0, 8, known) is known
    assert estimate(Norms(math.nan, 0.5, 2.0), 2.0, 8, None) is None


def test_a_signal_that_drowns_has_no_scale() -> None:
    assert Noise(-0.1, 2.0).scale is None
    assert Noise(0.5, 2.0).scale == 4.0


def test_the_meter_sees_what_it_was_told_to_see() -> None:
    layer = torch.nn.Linear(3, 1, bias=False)
    meter = NoiseMeter(layer)
    rows = torch.tensor([[1.0, 2.0, 2.0], [3.0, 0.0, 4.0]])
    layer(rows[:1]).sum().backward()
    meter.begin()
    (layer(rows[1:]).sum() * 0.5).backward()
    meter.end(rows=1, weight=0.5)
    taken = meter.take()
    assert (taken.squares, taken.inverse_rows, taken.count) == (pytest.approx(25.0), 1.0, 1.0)
    assert meter.take() == Norms()
