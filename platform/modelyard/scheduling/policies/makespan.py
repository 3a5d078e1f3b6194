"""Values that make the last job complete soon: prices of a linear program over the work that is left."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import coo_array, csr_array

from modelyard.scheduling.model import Job
from modelyard.scheduling.policies.choices import Choice
from modelyard.scheduling.policies.objective import Numbers, Problem

_SHARE = 2.0
"""How much the plan's share of time in a choice counts beside its price; breaks the ties of a vertex."""
_URGENCY = 0.5
"""What a job gains whose own shortest time is as long as the plan: it must never wait."""


def makespan_values(problem: Problem, jobs: Sequence[Job], columns: Sequence[Choice], round_s: float) -> Numbers:
    """Worth of each column for one round.

    The program finds the least T rounds in which all work fits: y[k] rounds in column k, each job's work done, each
    job in one place at a time, each pool's GPU-rounds at most T times its size. It is that of Gavel's
    `min_total_duration` (OSDI'20), solved at each decision. The price of a job's work says by how much T falls when
    a round of it is done; that, with the plan's share, is the worth of giving it the round.

    Jobs without known work count by the share of their best speed, after all others.
    """
    left = np.array([job.remaining if job.remaining is not None else np.nan for job in jobs])
    goodput = np.array([choice.goodput for choice in columns])
    done = goodput * round_s / np.maximum(left[problem.job], 1e-9)
    known = np.flatnonzero(np.isfinite(done) & (problem.value > 0))
    value = np.where(problem.value > 0, 1e-4 * problem.value / max(float(problem.value.max(initial=0.0)), 1e-12), 0.0)
    if not len(known):
        return value
    share, price, total = _plan(problem, known, done)
    at = problem.job[known]
    shortest = np.full(problem.num_jobs, np.inf)
    np.minimum.at(shortest, at, 1 / done[known])
    urgency = 1 + _URGENCY * np.clip(shortest[at] / total, 0.0, 1.0) ** 2
    progress = np.minimum(done[known], 1.0)
    value[known] += progress * price[at] * (1 + _SHARE * share) * urgency + 1e-3 * progress
    return value


def _plan(problem: Problem, known: np.ndarray, done: Numbers) -> tuple[Numbers, Numbers, float]:
    """Share of the time in each known column, price of each job's work, and the rounds it takes."""
    jobs, row = np.unique(problem.job[known], return_inverse=True)
    count, number = len(jobs), np.arange(len(known))
    rows, at, amounts = [row, count + row], [number, number], [-done[known], np.ones(len(known))]
    for index, (use, bound) in enumerate(problem.rows):
        here = np.flatnonzero(use[known])
        rows += [np.full(len(here), 2 * count + index), np.array([2 * count + index])]
        at += [here, np.array([len(known)])]
        amounts += [use[known][here], np.array([-bound])]
    rows.append(count + np.arange(count))
    at.append(np.full(count, len(known)))
    amounts.append(-np.ones(count))
    data = (np.concatenate(amounts), (np.concatenate(rows), np.concatenate(at)))
    height = 2 * count + len(problem.rows)
    upper = np.zeros(height)
    upper[:count] = -1.0
    cost = np.zeros(len(known) + 1)
    cost[-1] = 1.0
    matrix = csr_array(coo_array(data, shape=(height, len(known) + 1)))
    found = linprog(cost, A_ub=matrix, b_ub=upper, bounds=(0, None), method="highs-ds")
    price = np.zeros(problem.num_jobs)
    if found.x is None:  # some job cannot run within the rows at all: all count alike
        price[jobs] = 1.0
        return np.zeros(len(known)), price, 1.0
    total = max(float(found.x[-1]), 1e-9)
    price[jobs] = np.maximum(-found.ineqlin.marginals[:count], 0.0)
    return found.x[:-1] / total, price, total
