"""Why a job of the goodput policy waits, in numbers, and what would let it start."""

from __future__ import annotations

from collections.abc import Mapping

from modelyard.scheduling.model import Allocation, Job, Reason, Snapshot, Wait
from modelyard.scheduling.policies.assignment import Picked
from modelyard.scheduling.policies.choices import Catalogue, gpus_of
from modelyard.scheduling.quota import Ledger, Limit, Tree
from modelyard.scheduling.room import Room


class Verdict:
    """Words for what a round has decided."""

    def __init__(
        self,
        snapshot: Snapshot,
        room: Room,
        catalogue: Catalogue,
        run: Mapping[str, Allocation],
        scattered: set[str],
    ) -> None:
        """`room` is what the decision leaves free; `scattered` were chosen but lie nowhere close enough."""
        self.snapshot, self.room, self.catalogue, self.run = snapshot, room, catalogue, run
        self.scattered = scattered
        self.ledger = Ledger(Tree(snapshot.tenants))
        for job in snapshot.jobs:
            for node, count in run.get(job.job_id, {}).items():
                pool = room.pool(node)
                if pool is not None:
                    self.ledger.charge(job.request.tenant, {pool: count * gpus_of(job.request)})
        self._free: dict[str, float] = {}

    def reasons(self, values: Mapping[str, float], picked: Mapping[str, Picked]) -> dict[str, Reason]:
        """One for each job that does not run. `values`: the most that a GPU of a job's is worth."""
        marginal = [(values.get(job_id, 0.0), job_id) for job_id in picked if job_id in self.run]
        least = min(marginal, default=(0.0, ""))
        found = {}
        for job in self.snapshot.jobs:
            if job.job_id not in self.run:
                found[job.job_id] = self._reason(job, values.get(job.job_id), least)
        return found

    def _reason(self, job: Job, value: float | None, least: tuple[float, str]) -> Reason:
        request = job.request
        if job.is_held:
            return Reason(Wait.HELD, "its owner put it on hold", f"modelyard queue release {job.job_id}")
        if value is None:
            return self._never(job)
        needed = request.min_workers * gpus_of(request)
        if (limit := self._limit(job, needed)) is not None:
            return Reason(
                Wait.QUOTA,
                f"needs {needed:g} GPUs; tenant {limit.tenant!r} holds {limit.used:g} of at most {limit.limit:g} in "
                f"pool {limit.pool}",
                f"wait until jobs of {limit.tenant!r} end, or raise its limit: modelyard quota set {limit.tenant}",
            )
        if job.job_id in self.scattered:
            return Reason(
                Wait.FRAGMENTED,
                f"was chosen, but the free GPUs lie apart: {self._rooms(job)}",
                "wait until jobs on the same node end, or lower min_workers",
            )
        if value <= 0:
            return Reason(
                Wait.NOT_WORTH_IT,
                f"its best choice is worth {value:.3g} per GPU, less than what a GPU must add",
                "lower thrift, energy_weight or price_weight of the policy",
            )
        return self._beaten(job, value, least)

    def _beaten(self, job: Job, value: float, least: tuple[float, str]) -> Reason:
        needed = job.request.min_workers * gpus_of(job.request)
        fits = any(self.room.capacity(job.request, pool) >= job.request.min_workers for pool in self._pools(job))
        if fits and self.snapshot.power_cap_watts is not None:
            return Reason(
                Wait.POWER,
                f"needs {needed:g} GPUs, and they are free, but the power cap of {self.snapshot.power_cap_watts:g} W "
                "leaves no watts for them",
                "raise the power cap, or wait until running jobs end",
            )
        other = f"; the least that runs is {least[1]} with {least[0]:.3g}" if least[1] else ""
        text = f"needs {needed:g} GPUs and is worth {value:.3g} per GPU{other}; {self._rooms(job)}"
        if job.is_running:
            return Reason(Wait.PREEMPTED, text, "raise its priority, or wait: its worth grows as others finish")
        code = Wait.BEHIND if fits or least[1] else Wait.NO_ROOM
        return Reason(code, text, "raise its priority, allow other pools, or wait until running jobs end")

    def _never(self, job: Job) -> Reason:
        request = job.request
        most = {pool: self.catalogue.shape(request, pool).workers for pool in self._pools(job)}
        largest = max(most, key=lambda pool: most[pool], default=None)
        if largest is None:
            wanted = ", ".join(request.pools) or "any"
            return Reason(
                Wait.NEVER_FITS,
                f"no usable node is in its pools ({wanted}); there are {', '.join(self.snapshot.pools) or 'none'}",
                "wait until nodes come back, or allow another pool",
            )
        if most[largest] < request.min_workers:
            return Reason(
                Wait.NEVER_FITS,
                f"needs {request.min_workers} workers together; its largest pool {largest} holds {most[largest]} when "
                "empty",
                f"lower min_workers to {most[largest]}, or add nodes to {largest}",
            )
        return Reason(
            Wait.NOT_WORTH_IT,
            f"its speed is 0 with {request.min_workers} to {request.max_workers} workers in {', '.join(most)}",
            "allow a pool where it can run, or correct its speed model",
        )

    def _limit(self, job: Job, needed: float) -> Limit | None:
        """A limit, when limits shut all its pools."""
        found = [self.ledger.blocking(job.request.tenant, pool, needed) for pool in self._pools(job)]
        return found[0] if found and all(limit is not None for limit in found) else None

    def _pools(self, job: Job) -> list[str]:
        wanted = job.request.pools or tuple(self.snapshot.pools)
        return [pool for pool in wanted if pool in self.snapshot.pools]

    def _rooms(self, job: Job) -> str:
        most = {pool: self.catalogue.shape(job.request, pool).workers for pool in self._pools(job)}
        return ", ".join(
            f"{pool} has room for {self.room.capacity(job.request, pool)} of at most {workers} workers"
            for pool, workers in most.items()
            if workers
        )
