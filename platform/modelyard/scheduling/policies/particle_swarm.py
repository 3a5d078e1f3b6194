"""A particle swarm on the objective of `goodput`; kept to compare with the integer program.

Particles fly in a space of one preference per column. A position is read as a choice by taking columns in the order of
preference while they fit, so that every position is feasible.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from modelyard.scheduling.policies.goodput import GoodputPolicy
from modelyard.scheduling.policies.objective import NONE, Indices, Numbers, Problem, Solver


@dataclass(frozen=True, kw_only=True)
class ParticleSwarmSearch:
    """Solver of a `Problem` (Kennedy and Eberhart 1995, constriction coefficients of Clerc and Kennedy 2002)."""

    particles: int = 16
    steps: int = 40
    inertia: float = 0.73
    pull: float = 1.5
    """Towards a particle's own best, and as much towards the swarm's."""
    spread: float = 0.3
    """Of the first positions around value per GPU, in its standard deviations."""
    seed: int = 0

    def __call__(self, problem: Problem) -> Indices:
        """One column or `NONE` for each job."""
        if not problem.num_jobs or not len(problem.job):
            return np.full(problem.num_jobs, NONE, dtype=np.int64)
        dice = np.random.default_rng(self.seed)
        density = problem.value / np.maximum(problem.gpus, 1e-9)
        deviation = float(density.std()) or 1.0
        shape = (self.particles, len(problem.job))
        at = density + dice.normal(0.0, self.spread * deviation, shape)
        at[0] = density
        speed = np.zeros(shape)
        found = [read(problem, one) for one in at]
        own, worth = at.copy(), np.array([problem.value_of(one) for one in found])
        best = int(np.argmax(worth))
        leader, chosen, most = at[best].copy(), found[best], float(worth[best])
        for _ in range(self.steps):
            pulls = self.pull * dice.random((2, *shape))
            speed = self.inertia * speed + pulls[0] * (own - at) + pulls[1] * (leader - at)
            at = at + speed
            for index in range(self.particles):
                choice = read(problem, at[index])
                value = problem.value_of(choice)
                if value > worth[index]:
                    worth[index], own[index] = value, at[index]
                if value > most:
                    most, leader, chosen = value, at[index].copy(), choice
        return chosen


def read(problem: Problem, preference: Numbers) -> Indices:
    """The choice that a position stands for."""
    rows = problem.rows
    use = np.array([row for row, _ in rows]).T
    left = np.array([bound for _, bound in rows])
    chosen = np.full(problem.num_jobs, NONE, dtype=np.int64)
    for column in np.argsort(-preference, kind="stable"):
        job = problem.job[column]
        if chosen[job] == NONE and problem.value[column] > 0 and (use[column] <= left + 1e-6).all():
            left = left - use[column]
            chosen[job] = column
    return chosen


@dataclass
class ParticleSwarmPolicy(GoodputPolicy):
    """`goodput` with a particle swarm in place of the integer program."""

    solver: Solver = field(default_factory=ParticleSwarmSearch)
    name: str = "particle_swarm"
