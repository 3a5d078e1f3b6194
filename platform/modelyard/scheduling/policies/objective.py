"""The problem that `goodput`, `genetic` and `particle_swarm` solve: one choice of (pool, workers) for each job at most.

A `Problem` is columns of numbers. Column k: `gpus[k]` GPUs of pool `pool[k]` are worth `value[k]` to job `job[k]`.
Wanted is the set of columns of most value, at most one per job, that fits into each pool and obeys the `limits`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
Indices = NDArray[np.int64]
NONE = -1
"""The choice of a job that runs nowhere."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Columns sorted by job."""

    num_jobs: int
    job: Indices
    pool: Indices
    gpus: Numbers
    value: Numbers
    capacity: Numbers
    """GPUs of each pool."""
    limits: tuple[tuple[Numbers, float], ...] = ()
    """Further rows: what each column uses, and how much there is (quotas of tenants, watts)."""
    first: Indices = field(init=False)
    """Job to its first column; one more entry than jobs."""

    def __post_init__(self) -> None:
        starts = np.searchsorted(self.job, np.arange(self.num_jobs + 1))
        object.__setattr__(self, "first", starts.astype(np.int64))

    @property
    def rows(self) -> list[tuple[Numbers, float]]:
        """Use and bound of every shared resource: pools first, then `limits`."""
        pools = [
            (np.where(self.pool == index, self.gpus, 0.0), float(bound)) for index, bound in enumerate(self.capacity)
        ]
        return [*pools, *self.limits]

    def within(self, limits: tuple[tuple[Numbers, float], ...]) -> Problem:
        """The same with further rows."""
        return replace(self, limits=limits)

    def worth(self, value: Numbers) -> Problem:
        """The same with other values."""
        return replace(self, value=value)

    def value_of(self, chosen: Indices) -> float:
        """Worth of one column (or `NONE`) per job."""
        return float(self.value[chosen[chosen != NONE]].sum())

    def fits(self, chosen: Indices) -> bool:
        """Whether the choice stays within every row."""
        taken = chosen[chosen != NONE]
        return all(float(use[taken].sum()) <= bound + 1e-6 for use, bound in self.rows)


class Solver(Protocol):
    """Finds a good choice. Deterministic."""

    def __call__(self, problem: Problem) -> Indices:
        """One column or `NONE` for each job, within every row."""
        ...


def repair(problem: Problem, chosen: Indices, prices: Numbers | None = None) -> Indices:
    """Makes a choice feasible and full: drops columns worth least per unit of what is short, then adds greedily.

    `prices` per row steer which column of a job is added; without them, value per GPU does.
    """
    rows = problem.rows
    use = np.array([row for row, _ in rows]).T if rows else np.zeros((len(problem.job), 0))
    left = np.array([bound for _, bound in rows]) - use[chosen[chosen != NONE]].sum(axis=0)
    chosen = chosen.copy()
    for row in np.flatnonzero(left < -1e-6):
        holders = np.flatnonzero((chosen != NONE) & (use[np.maximum(chosen, 0), row] > 0))
        worth = problem.value[chosen[holders]] / use[chosen[holders], row]
        for job in holders[np.argsort(worth, kind="stable")]:
            if left[row] >= -1e-6:
                break
            left += use[chosen[job]]
            chosen[job] = NONE
    return _fill(problem, chosen, use, left, prices)


def _fill(problem: Problem, chosen: Indices, use: Numbers, left: Numbers, prices: Numbers | None) -> Indices:
    """Adds columns, or swaps a job's for a better one, in order of worth, while they fit."""
    weight = use @ prices if prices is not None else problem.gpus
    worth = problem.value / np.maximum(weight, 1e-9) if prices is None else problem.value - weight
    for column in np.argsort(-worth, kind="stable"):
        if problem.value[column] <= 0:
            continue
        job = problem.job[column]
        current = chosen[job]
        gain = problem.value[column] - (problem.value[current] if current != NONE else 0.0)
        if gain <= 1e-12:
            continue
        after = left - use[column] + (use[current] if current != NONE else 0.0)
        if (after >= -1e-6).all():
            left, chosen[job] = after, column
    return chosen
