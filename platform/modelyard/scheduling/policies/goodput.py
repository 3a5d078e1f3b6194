"""Heterogeneity-aware and elastic: each job gets the pool and the number of workers where it is worth most to all.

The choice is an integer program over job x (pool, workers), as in Sia (SOSP'23), on HiGHS. What differs from Sia: what
is left of a job counts (known, or guessed from what it has done), speed is valued by its logarithm, a restart must pay
within a horizon, and a GPU that adds too little stays idle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from modelyard.errors import ConfigError
from modelyard.scheduling.model import Allocation, Decision, Job, Snapshot
from modelyard.scheduling.placement import place
from modelyard.scheduling.policies.assignment import Assignment, Picked
from modelyard.scheduling.policies.choices import Catalogue, Choice, gpus_of
from modelyard.scheduling.policies.integer_program import IntegerProgram
from modelyard.scheduling.policies.makespan import makespan_values
from modelyard.scheduling.policies.objective import NONE, Numbers, Problem, Solver
from modelyard.scheduling.policies.power import Watts
from modelyard.scheduling.policies.verdict import Verdict
from modelyard.scheduling.policies.worth import Worth
from modelyard.scheduling.quota import Ledger, Tree
from modelyard.scheduling.room import UNIT, Room


@dataclass
class GoodputPolicy:
    """Chooses pool and workers of every job together; see the module."""

    objective: str = "jct"
    """`jct`: jobs complete soon on average. `makespan`: the last one does; for jobs whose `work` is known."""
    worth: Worth = field(default_factory=Worth)
    solver: Solver = field(default_factory=IntegerProgram)
    round_s: float = 60.0
    """Time to the next decision; `makespan` plans in rounds."""
    name: str = "goodput"

    def __post_init__(self) -> None:
        if self.objective not in ("jct", "makespan"):
            raise ConfigError(f"objective={self.objective!r} is unknown; known: jct, makespan", "choose one of them")

    def decide(self, snapshot: Snapshot) -> Decision:
        """Where each job runs, or why it waits."""
        return _Round(self, snapshot).decide()


class _Round:
    """One decision."""

    def __init__(self, policy: GoodputPolicy, snapshot: Snapshot) -> None:
        self.policy, self.snapshot = policy, snapshot
        self.room = Room(snapshot.pools)
        self.catalogue = Catalogue(snapshot, self.room.copy())
        self.pools = list(snapshot.pools)
        self.watts = Watts(snapshot)
        self.ledger = Ledger(Tree(snapshot.tenants))
        """Of what is fixed."""
        self.fixed: dict[str, Allocation] = {}
        self.jobs: list[Job] = []
        self.choices: list[list[Choice]] = []
        for job in sorted(snapshot.jobs, key=lambda one: (one.request.is_preemptible, one.submitted_s, one.job_id)):
            if self._is_fixed(job):
                self._fix(job)
        for job in sorted(snapshot.jobs, key=lambda one: (one.submitted_s, one.job_id)):
            if job.job_id not in self.fixed and not job.is_held:
                found = self.catalogue.of(job)
                if found:
                    self.jobs.append(job)
                    self.choices.append(found)

    def decide(self) -> Decision:
        problem = self._problem()
        chosen = self.policy.solver(problem)
        picked, columns = {}, [choice for found in self.choices for choice in found]
        for job, column in zip(self.jobs, chosen, strict=True):
            if column != NONE:
                picked[job.job_id] = Picked(job, columns[column], float(problem.value[column]))
        assignment = Assignment(self.room, self.policy.worth.horizon_s)
        assignment.place(picked)
        run = {**self.fixed, **assignment.run}
        self._span(run)
        verdict = Verdict(self.snapshot, self.room, self.catalogue, run, assignment.scattered)
        values = dict(zip([job.job_id for job in self.jobs], self._best(problem), strict=True))
        wait = verdict.reasons(values, {one.job.job_id: one for one in picked.values()})
        return Decision(
            run={job.job_id: run[job.job_id] for job in self.snapshot.jobs if job.job_id in run},
            wait={job.job_id: wait[job.job_id] for job in self.snapshot.jobs if job.job_id not in run},
        )

    def _is_fixed(self, job: Job) -> bool:
        """Whether it stays as it is: not to be preempted, or in the middle of a restart that was already paid for.

        A restart is given up when a limit or the power cap has been lowered below what it holds.
        """
        if not job.is_running or not self.room.holds(job.request, job.allocation):
            return False
        if not job.request.is_preemptible:
            return True
        if job.changed_s is None or self.snapshot.now_s >= job.changed_s + job.request.restart_s:
            return False
        gpus = self._gpus(job)
        within = all(self.ledger.may_hold(job.request.tenant, pool, count) for pool, count in gpus.items())
        return within and self.watts.allow(self.watts.of(job.request, job.allocation))

    def _fix(self, job: Job) -> None:
        self.room.take(job.request, job.allocation)
        self.fixed[job.job_id] = dict(job.allocation)
        self.ledger.charge(job.request.tenant, self._gpus(job))
        self.watts.charge(self.watts.of(job.request, job.allocation))

    def _gpus(self, job: Job) -> dict[str, float]:
        """What a job holds, by pool."""
        found: dict[str, float] = {}
        for node, count in job.allocation.items():
            pool = str(self.room.pool(node))
            found[pool] = found.get(pool, 0.0) + count * gpus_of(job.request)
        return found

    def _problem(self) -> Problem:
        number = {pool: index for index, pool in enumerate(self.pools)}
        values: list[float] = []
        for job, found in zip(self.jobs, self.choices, strict=True):
            held = self.catalogue.held(job) if job.is_running else None
            values += self.policy.worth.values(self.snapshot, job, found, held)
        lengths = [len(found) for found in self.choices]
        columns = [choice for found in self.choices for choice in found]
        problem = Problem(
            num_jobs=len(self.jobs),
            job=np.repeat(np.arange(len(self.jobs)), lengths),
            pool=np.array([number[choice.pool] for choice in columns], dtype=np.int64),
            gpus=np.array([choice.gpus for choice in columns], dtype=float),
            value=np.array(values, dtype=float),
            capacity=np.array([self._capacity(pool) for pool in self.pools]),
        )
        limits = (*self._quotas(problem), *self._power(problem, columns))
        if limits:
            problem = problem.within(limits)
        if self.policy.objective == "makespan":
            return problem.worth(makespan_values(problem, self.jobs, columns, self.policy.round_s))
        return problem

    def _capacity(self, pool: str) -> float:
        members = self.room.members[pool]
        name = "GPU" if any(self.room.free[node].get("GPU") for node in members) else "CPU"
        return sum(self.room.free[node].get(name, 0) for node in members) / UNIT

    def _quotas(self, problem: Problem) -> list[tuple[Numbers, float]]:
        """Limits of tenants, and what is kept for guarantees of tenants that ask for them."""
        if not self.snapshot.tenants:
            return []
        tree, rows = self.ledger.tree, []
        for name in sorted(tree.by_name):
            inside = np.array([name in tree.path(job.request.tenant) for job in self.jobs], dtype=bool)
            mine = inside[problem.job]
            for pool, bound in sorted(tree.by_name[name].limit.items()):
                rows.append(self._row(problem, pool, mine, bound - self.ledger.used(name, pool)))
            for pool, amount in sorted(tree.by_name[name].guaranteed.items()):
                kept = min(amount - self.ledger.used(name, pool), self._asked(problem, mine, pool))
                if kept > 0 and pool in self.pools:
                    rows.append(self._row(problem, pool, ~mine, self._capacity(pool) - kept))
        return rows

    def _row(self, problem: Problem, pool: str, columns: np.ndarray, bound: float) -> tuple[Numbers, float]:
        index = self.pools.index(pool) if pool in self.pools else -1
        return np.where(columns & (problem.pool == index), problem.gpus, 0.0), max(bound, 0.0)

    def _asked(self, problem: Problem, mine: np.ndarray, pool: str) -> float:
        """GPUs that the smallest gangs of a tenant would take in a pool."""
        here = mine & (problem.pool == self.pools.index(pool)) if pool in self.pools else mine & False
        least = np.full(problem.num_jobs, np.inf)
        np.minimum.at(least, problem.job[here], problem.gpus[here])
        return float(least[np.isfinite(least)].sum())

    def _power(self, problem: Problem, columns: Sequence[Choice]) -> list[tuple[Numbers, float]]:
        """Watts that jobs may add to those of the idle cluster."""
        if self.snapshot.power_cap_watts is None:
            return []
        draws = [
            self.watts.each(self.jobs[job].request, choice.pool) * choice.workers
            for job, choice in zip(problem.job, columns, strict=True)
        ]
        return [(np.array(draws, dtype=float), max(self.watts.left, 0.0))]

    def _span(self, run: dict[str, Allocation]) -> None:
        """Gangs that no pool holds alone, for jobs that allow several; what nobody else wanted."""
        ledger_free = not self.snapshot.tenants and self.snapshot.power_cap_watts is None
        for job in sorted(self.snapshot.jobs, key=lambda one: (one.submitted_s, one.job_id)):
            request = job.request
            if job.job_id in run or job.is_held or not request.span_pools or not ledger_free:
                continue
            found = place(self.room, request, request.pools or tuple(self.pools), request.min_workers)
            if found is not None:
                self.room.take(request, found)
                run[job.job_id] = dict(found)

    @staticmethod
    def _best(problem: Problem) -> list[float]:
        """The most that a GPU of each job's is worth."""
        best = np.zeros(problem.num_jobs)
        np.maximum.at(best, problem.job, problem.value / np.maximum(problem.gpus, 1e-9))
        return [float(value) for value in best]
