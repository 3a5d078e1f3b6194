"""The choice of most value by an integer program on HiGHS; large ones by prices, a small program, and rounding.

Few rows couple the jobs: one per pool, some quotas. Their Lagrangian is the sum of independent choices, so good prices
come from a cutting-plane search over a handful of numbers (Kelley 1960), each step of which looks at every column once.
Columns that no near-optimal choice uses at these prices are left out, and HiGHS solves what remains: exactly when it is
small, else as a linear program, whose vertex splits no more jobs than there are rows; those are rounded.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import coo_array, csr_array

from modelyard.scheduling.policies.objective import NONE, Indices, Numbers, Problem, repair

_QUIET = {"mip_heuristic_run_root_reduced_cost": False}
"""HiGHS 1.12 writes a line to stdout whenever this heuristic finds something, whatever its logging is set to."""


@dataclass(frozen=True, kw_only=True)
class IntegerProgram:
    """Solver of a `Problem` on HiGHS."""

    exact_columns: int = 4000
    """Up to this many columns the whole program is solved as one."""
    gap: float = 1e-4
    """Relative distance to the optimum at which the search stops."""
    node_limit: int = 2000
    """Branches before the best found is taken: a limit that, unlike seconds, is the same on every machine."""
    price_steps: int = 60
    kept_per_job: int = 4
    """Columns of a job that a large program keeps."""

    def __call__(self, problem: Problem) -> Indices:
        """One column or `NONE` for each job."""
        if not len(problem.job):
            return np.full(problem.num_jobs, NONE, dtype=np.int64)
        if len(problem.job) <= self.exact_columns:
            columns = np.flatnonzero(problem.value > 0)
            return self._exact(problem, columns)
        prices = find_prices(problem, self.price_steps)
        return self._rounded(problem, near_best(problem, prices, self.kept_per_job), prices)

    def _exact(self, problem: Problem, columns: Indices) -> Indices:
        chosen = np.full(problem.num_jobs, NONE, dtype=np.int64)
        if not len(columns):
            return chosen
        matrix, upper = constraints(problem, columns)
        scale = float(np.abs(problem.value[columns]).max()) or 1.0
        with warnings.catch_warnings():  # of options that scipy does not know but hands on
            warnings.simplefilter("ignore", RuntimeWarning)
            found = milp(
                -problem.value[columns] / scale,
                integrality=np.ones(len(columns)),
                bounds=Bounds(0, 1),
                constraints=LinearConstraint(matrix, -np.inf, upper),
                options={"mip_rel_gap": self.gap, "node_limit": self.node_limit, "presolve": False} | _QUIET,
            )
        if found.x is None:
            return repair(problem, chosen)
        taken = columns[found.x > 0.5]
        chosen[problem.job[taken]] = taken
        return chosen

    def _rounded(self, problem: Problem, columns: Indices, prices: Numbers) -> Indices:
        matrix, upper = constraints(problem, columns)
        scale = float(np.abs(problem.value[columns]).max()) or 1.0
        found = linprog(-problem.value[columns] / scale, A_ub=matrix, b_ub=upper, bounds=(0, 1), method="highs-ds")
        chosen = np.full(problem.num_jobs, NONE, dtype=np.int64)
        if found.x is not None:
            taken = columns[found.x > 1 - 1e-6]
            chosen[problem.job[taken]] = taken
            prices = np.maximum(-found.ineqlin.marginals[-len(prices) :] * scale, 0.0)
        return repair(problem, chosen, prices)


def constraints(problem: Problem, columns: Indices) -> tuple[csr_array, Numbers]:
    """Rows of the program over some columns: one choice per job, then the shared resources."""
    jobs, row_of = np.unique(problem.job[columns], return_inverse=True)
    number = np.arange(len(columns))
    rows, at, amounts = [row_of], [number], [np.ones(len(columns))]
    upper = [np.ones(len(jobs))]
    for index, (use, bound) in enumerate(problem.rows):
        here = np.flatnonzero(use[columns])
        rows.append(np.full(len(here), len(jobs) + index))
        at.append(here)
        amounts.append(use[columns][here])
        upper.append(np.array([bound]))
    shape = (len(jobs) + len(problem.rows), len(columns))
    data = (np.concatenate(amounts), (np.concatenate(rows), np.concatenate(at)))
    return csr_array(coo_array(data, shape=shape)), np.concatenate(upper)


def find_prices(problem: Problem, steps: int) -> Numbers:
    """Prices of the rows that nearly minimise the Lagrangian dual, by cutting planes."""
    bounds = np.array([bound for _, bound in problem.rows])
    use = np.array([row for row, _ in problem.rows]).T
    most = float((problem.value / np.maximum(problem.gpus, 1e-9)).max()) * 2 + 1e-12
    starts = problem.first[:-1][np.diff(problem.first) > 0]
    prices, best, best_value = np.zeros(len(bounds)), np.zeros(len(bounds)), np.inf
    cuts: list[Numbers] = []
    for _ in range(steps):
        reduced = problem.value - use @ prices
        gains = np.maximum(np.maximum.reduceat(reduced, starts), 0.0)
        taken = _argmax(problem, reduced)
        slope = bounds - use[taken].sum(axis=0)
        dual = float(gains.sum() + prices @ bounds)
        if dual < best_value:
            best, best_value = prices.copy(), dual
        cuts.append(np.append(slope, [-1.0, slope @ prices - dual]))
        matrix = np.array(cuts)
        found = linprog(
            np.append(np.zeros(len(bounds)), 1.0),
            A_ub=matrix[:, :-1],
            b_ub=matrix[:, -1],
            bounds=[(0, most)] * len(bounds) + [(None, None)],
            method="highs-ds",
        )
        if found.x is None or best_value - found.fun <= 1e-3 * abs(best_value):
            break
        prices = 0.5 * best + 0.5 * found.x[:-1]
    return best


def _argmax(problem: Problem, reduced: Numbers) -> Indices:
    """The best column of each job that has one above zero."""
    order = np.lexsort((-reduced, problem.job))
    heads = order[np.unique(problem.job[order], return_index=True)[1]]
    return heads[reduced[heads] > 0]


def near_best(problem: Problem, prices: Numbers, keep: int) -> Indices:
    """The columns of each job that are worth most at these prices."""
    reduced = problem.value - np.array([row for row, _ in problem.rows]).T @ prices
    order = np.lexsort((-reduced, problem.job))
    jobs = problem.job[order]
    rank = np.arange(len(order)) - np.searchsorted(jobs, jobs)
    return np.sort(order[(rank < keep) & (problem.value[order] > 0)])
