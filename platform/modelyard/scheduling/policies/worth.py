"""What a choice is worth to a job, so that choices of different jobs can be weighed against each other.

Work is counted in GPU-seconds at the job's most efficient choice; `speed` below is GPU-seconds of work per second.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from modelyard.scheduling.model import Job, Snapshot
from modelyard.scheduling.policies.choices import Choice, gpus_of, reference


@dataclass(frozen=True, kw_only=True)
class Worth:
    """Weights of the objective. The defaults were tuned on Sia's philly workload 1 alone."""

    prior_gpu_s: float = 8000.0
    """Added to what a job has done when what it has left is guessed."""
    stretch: float = 2.0
    """What is left over what is done and the prior, as for a Pareto tail of index 1.5."""
    age_power: float = 0.4
    """How strongly little work left counts where it is guessed: 1 is the shortest first, 0 treats all jobs alike."""
    size_power: float = 1.0
    """The same where it is known."""
    curvature: float = 1.0
    """Of elastic jobs: the worth of speed grows as log(1 + curvature * speed), so that further GPUs go to who has few.
    Speed is counted in smallest gangs here: a job that cannot take less than 32 GPUs is not served late for it. Rigid
    jobs have nothing to give up and count linearly."""
    thrift: float = 0.003
    """What one GPU must add, as a share of the worth of a job's first; above 0 it is left idle rather than wasted."""
    least_efficiency: float = 0.3
    """Choices whose GPUs do less than this share of what the pool's smallest choice gets out of each are left out."""
    horizon_s: float = 1200.0
    """Time that a job which has just come is expected to keep a choice; a restart must pay within that time."""
    energy_weight: float = 0.0
    """What full power of one accelerator of the hungriest pool costs, in the units of `thrift`."""
    price_weight: float = 0.0
    """The same for `price_per_hour` (money, or carbon) of the dearest pool."""

    def weight(self, job: Job, unit: float) -> float:
        """Of a job among others; `unit` turns its progress into GPU-seconds. Each 100 of priority doubles it."""
        power = self.age_power if job.remaining is None else self.size_power
        return float(2.0 ** (job.request.priority / 100) / self.rest(job, unit) ** power)

    def rest(self, job: Job, unit: float) -> float:
        """GPU-seconds of work it has left, or is expected to have.

        Sizes of jobs are heavy-tailed; for a Pareto tail what is left grows with what is done, so that the least
        attained service goes first (Gittins index for decreasing hazard; Tiresias, NSDI'19).
        """
        left = job.remaining
        return max(left / unit, 1.0) if left is not None else self.stretch * (job.done / unit + self.prior_gpu_s)

    def kept(self, now_s: float, job: Job) -> float:
        """Seconds that a job is expected to keep what it is given now: as long as its choices were kept so far.

        Who was restarted often is therefore left in peace, and who has run undisturbed may change for a small gain.
        """
        return (self.horizon_s + max(now_s - job.submitted_s, 0.0)) / (1 + job.restarts)

    def values(self, snapshot: Snapshot, job: Job, choices: Sequence[Choice], held: Choice | None) -> list[float]:
        """Worth of each choice; at most 0 for one that must not be taken."""
        unit = reference(choices)
        rest, weight = self.rest(job, unit), self.weight(job, unit)
        first: dict[str, float] = {}
        for choice in choices:
            first[choice.pool] = max(first.get(choice.pool, 0.0), choice.goodput / choice.gpus)
        is_rigid = job.request.min_workers == job.request.max_workers
        dues = self._dues(snapshot)
        kept_s = self.kept(snapshot.now_s, job)
        working = kept_s / (kept_s + job.request.restart_s)
        bend = self.curvature / (job.request.min_workers * gpus_of(job.request))
        found = []
        for choice in choices:
            is_same = held is not None and (choice.pool, choice.workers) == (held.pool, held.workers)
            if not is_same and choice.goodput < self.least_efficiency * first[choice.pool] * choice.gpus:
                found.append(0.0)
                continue
            speed = choice.goodput / unit
            if not is_same:  # the rest then takes so much longer
                speed /= 1 + job.request.restart_s * speed / rest
            gain = speed if is_rigid else math.log1p(bend * speed) / bend
            if not is_same:
                gain *= working
            found.append(weight * (gain - choice.gpus * dues[choice.pool] * (0.0 if is_rigid else 1.0)))
        return found

    def _dues(self, snapshot: Snapshot) -> dict[str, float]:
        """What each GPU of a pool costs."""
        power = {pool: snapshot.power[pool] for pool in snapshot.pools if pool in snapshot.power}
        watts = max((one.busy_watts for one in power.values()), default=0.0) or 1.0
        price = max((one.price_per_hour for one in power.values()), default=0.0) or 1.0
        scale = math.log1p(self.curvature) / self.curvature
        return {
            pool: scale
            * (
                self.thrift
                + (self.energy_weight * power[pool].busy_watts / watts if pool in power else 0.0)
                + (self.price_weight * power[pool].price_per_hour / price if pool in power else 0.0)
            )
            for pool in snapshot.pools
        }
