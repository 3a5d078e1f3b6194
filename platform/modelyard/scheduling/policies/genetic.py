"""A genetic algorithm on the objective of `goodput`, as Pollux (OSDI'21) uses one; kept to compare with the program.

`docs` and `benchmarks/scheduling.py` say how far it stays below the integer program, and at what time.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from modelyard.scheduling.policies.goodput import GoodputPolicy
from modelyard.scheduling.policies.objective import NONE, Indices, Problem, Solver, repair


@dataclass(frozen=True, kw_only=True)
class GeneticSearch:
    """Solver of a `Problem`: a chromosome is one column (or none) per job; every child is repaired to be feasible."""

    population: int = 24
    generations: int = 30
    mutation: float = 0.08
    """Chance of each gene to be drawn anew."""
    seed: int = 0

    def __call__(self, problem: Problem) -> Indices:
        """One column or `NONE` for each job."""
        if not problem.num_jobs or not len(problem.job):
            return np.full(problem.num_jobs, NONE, dtype=np.int64)
        dice = np.random.default_rng(self.seed)
        nobody = np.full(problem.num_jobs, NONE, dtype=np.int64)
        pool = [repair(problem, nobody)]
        pool += [repair(problem, _drawn(problem, dice)) for _ in range(self.population - 1)]
        worth = [problem.value_of(one) for one in pool]
        for _ in range(self.generations):
            children = [self._child(problem, pool, worth, dice) for _ in range(self.population)]
            everyone = pool + children
            values = worth + [problem.value_of(one) for one in children]
            order = sorted(range(len(everyone)), key=lambda at: -values[at])[: self.population]
            pool, worth = [everyone[at] for at in order], [values[at] for at in order]
        return pool[int(np.argmax(worth))]

    def _child(self, problem: Problem, pool: list[Indices], worth: list[float], dice: np.random.Generator) -> Indices:
        mother, father = (pool[self._tournament(worth, dice)] for _ in range(2))
        child = np.where(dice.random(problem.num_jobs) < 0.5, mother, father)
        changed = dice.random(problem.num_jobs) < self.mutation
        return repair(problem, np.where(changed, _drawn(problem, dice), child))

    @staticmethod
    def _tournament(worth: list[float], dice: np.random.Generator) -> int:
        first, second = dice.integers(0, len(worth), 2)
        return int(first if worth[first] >= worth[second] else second)


def _drawn(problem: Problem, dice: np.random.Generator) -> Indices:
    """A random column, or none, for each job."""
    sizes = np.diff(problem.first)
    drawn = problem.first[:-1] + (dice.random(problem.num_jobs) * np.maximum(sizes, 1)).astype(np.int64)
    return np.where((sizes > 0) & (dice.random(problem.num_jobs) < 0.7), drawn, NONE)


@dataclass
class GeneticPolicy(GoodputPolicy):
    """`goodput` with a genetic search in place of the integer program."""

    solver: Solver = field(default_factory=GeneticSearch)
    name: str = "genetic"
