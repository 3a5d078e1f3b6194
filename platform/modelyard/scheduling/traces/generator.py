"""Seeded synthetic workloads, for tests and for questions that no published trace answers.

Distributions, all independent:
- arrivals: Poisson with `jobs_per_hour`, its rate swinging over 24 h by `daily_swing` (Philly's days, ATC'19);
- GPUs asked for: powers of two with the shares of `sizes` (most jobs ask for one, as in Philly and Helios);
- work: log-normal GPU-hours, median `median_gpu_h` and `sigma` of the logarithm (heavy-tailed: a few jobs hold most);
- speed per pool: the pool's own factor times a log-normal of `affinity` per job, so that jobs differ in what they like;
- efficiency of a doubling: uniform between `efficiency`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field

from modelyard.errors import ConfigError
from modelyard.scheduling.model import LinearSpeed, Request
from modelyard.scheduling.traces.base import SteadyRun, Trace, TraceJob, cluster_of


@dataclass(frozen=True, kw_only=True)
class Generator:
    """What the workload is like."""

    num_jobs: int = 100
    pools: Mapping[str, tuple[int, int]] = field(default_factory=lambda: {"a100": (2, 8), "l4": (3, 8), "t4": (6, 4)})
    """Pool to nodes and GPUs of each."""
    speeds: Mapping[str, float] = field(default_factory=lambda: {"a100": 4.0, "l4": 2.0, "t4": 1.0})
    """Pool to the speed of one GPU; 1 for those not named."""
    jobs_per_hour: float = 20.0
    daily_swing: float = 0.5
    sizes: Mapping[int, float] = field(default_factory=lambda: {1: 0.6, 2: 0.15, 4: 0.15, 8: 0.1})
    median_gpu_h: float = 0.5
    """Of the slowest speed, 1."""
    sigma: float = 1.5
    affinity: float = 0.3
    efficiency: tuple[float, float] = (0.85, 1.0)
    is_elastic: bool = True
    """Whether jobs take from one worker to twice what they ask for; else exactly what they ask for."""
    is_work_known: bool = True
    restart_s: float = 30.0
    tenants: tuple[str, ...] = ("default",)
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_jobs", "jobs_per_hour", "median_gpu_h"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"generator.{name}={getattr(self, name)} must be above 0", "give a positive number")
        if not 0 <= self.daily_swing < 1:
            raise ConfigError(f"generator.daily_swing={self.daily_swing} is outside 0..1", "0 for no days")

    def trace(self) -> Trace:
        """The workload; the same for the same fields."""
        dice = random.Random(self.seed)
        jobs, now = [], 0.0
        for number in range(self.num_jobs):
            now = self._next(now, dice)
            jobs.append(self._job(number, now, dice))
        return Trace(name=f"synthetic-{self.seed}", jobs=tuple(jobs), nodes=cluster_of(self.pools))

    def _next(self, now: float, dice: random.Random) -> float:
        """By thinning: candidates at the highest rate, kept in proportion to the rate of the hour."""
        highest = self.jobs_per_hour / 3600 * (1 + self.daily_swing)
        while True:
            now += dice.expovariate(highest)
            rate = 1 + self.daily_swing * math.sin(2 * math.pi * now / 86_400)
            if dice.random() * (1 + self.daily_swing) <= rate:
                return now

    def _job(self, number: int, now: float, dice: random.Random) -> TraceJob:
        asked = dice.choices(list(self.sizes), list(self.sizes.values()))[0]
        work = self.median_gpu_h * 3600 * math.exp(dice.gauss(0, self.sigma))
        rates = {
            pool: self.speeds.get(pool, 1.0) * math.exp(dice.gauss(0, self.affinity)) for pool in sorted(self.pools)
        }
        truth = LinearSpeed(per_worker=rates, efficiency=dice.uniform(*self.efficiency))
        request = Request(
            job_id=f"job-{number:04d}",
            tenant=dice.choice(self.tenants),
            min_workers=1 if self.is_elastic else asked,
            max_workers=2 * asked if self.is_elastic else asked,
            work=work if self.is_work_known else None,
            restart_s=self.restart_s,
        )
        return TraceJob(request=request, submitted_s=now, begin=SteadyRun(work, truth).begin)
