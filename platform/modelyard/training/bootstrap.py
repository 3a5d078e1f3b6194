"""Confidence intervals by the bootstrap: measure again and again on rows drawn with replacement. Pure numpy.

The percentile interval of Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 13. Rows are
taken as independent; blocks of one long document are not quite, so intervals of text are a little too narrow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Stats = Mapping[str, npt.NDArray[Any]]
"""Named statistics of n rows, each (n, ...)."""
MetricsFunction = Callable[[Stats], dict[str, float]]


class Interval(NamedTuple):
    """A figure measured on all rows, and where it lies with the asked confidence."""

    value: float
    low: float
    high: float

    def holds(self, number: float) -> bool:
        """Whether `number` lies in the interval, bounds included."""
        return self.low <= number <= self.high


def bootstrap(
    metrics: MetricsFunction, stats: Stats, *, samples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> dict[str, Interval]:
    """An interval for each metric of `stats`. The same seed gives the same intervals.

    Args:
        metrics: turns the statistics of rows into figures.
        samples: resamples of n rows each; 0 gives intervals that are only the value.
        confidence: share of resamples between the bounds, 0..1.
    """
    drawn = [metrics(_take(stats, rows)) for rows in _resamples(stats, samples, seed)]
    return _intervals(metrics(stats), drawn, confidence)


def paired_bootstrap(
    metrics: MetricsFunction,
    first: Stats,
    second: Stats,
    *,
    samples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Interval]:
    """An interval for each difference `metric(first) - metric(second)`, both measured on the same n rows.

    Every resample draws the same rows of both, so what makes a row hard for both cancels out.
    """

    def difference(one: Stats, other: Stats) -> dict[str, float]:
        left, right = metrics(one), metrics(other)
        return {name: left[name] - right[name] for name in left if name in right}

    drawn = [difference(_take(first, rows), _take(second, rows)) for rows in _resamples(first, samples, seed)]
    return _intervals(difference(first, second), drawn, confidence)


def _resamples(stats: Stats, samples: int, seed: int) -> Iterator[npt.NDArray[np.int64]]:
    count = len(next(iter(stats.values())))
    generator = np.random.default_rng(seed)
    for _ in range(samples):
        yield generator.integers(0, count, size=count)


def _take(stats: Stats, rows: npt.NDArray[np.int64]) -> Stats:
    return {name: values.take(rows, axis=0) for name, values in stats.items()}


def _intervals(whole: Mapping[str, float], drawn: list[dict[str, float]], confidence: float) -> dict[str, Interval]:
    if not drawn:
        return {name: Interval(value, value, value) for name, value in whole.items()}
    tail = (1 - confidence) / 2
    result = {}
    for name, value in whole.items():
        low, high = np.quantile([figures[name] for figures in drawn], [tail, 1 - tail])
        result[name] = Interval(value, float(low), float(high))
    return result
