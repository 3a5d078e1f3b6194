"""The working state of one decision, shared by the policies: what runs, what is free, who is charged."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from modelyard.scheduling.clearing import Resident, clear, price
from modelyard.scheduling.forecast import fits, goodput
from modelyard.scheduling.model import Allocation, Decision, Job, Reason, Request, Snapshot, Wait, pool_of
from modelyard.scheduling.placement import defragment, extend, place
from modelyard.scheduling.policies.power import Watts
from modelyard.scheduling.policies.reasons import Reasons
from modelyard.scheduling.quota import SLACK, Ledger, Limit, Tree
from modelyard.scheduling.room import Room


class Board:
    """Running jobs keep what they hold; a policy starts, grows and stops jobs, and gets its decision from here.

    A running job whose node was lost or drains stands in the queue again, at its old place. So does one that a limit or
    a power cap, lowered below what is in use, no longer has room for.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        """Set out the running jobs of the snapshot."""
        self.snapshot = snapshot
        self.tree = Tree(snapshot.tenants)
        self.ledger = Ledger(self.tree)
        self.watts = Watts(snapshot)
        self.room = Room(snapshot.pools)
        self.empty = self.room.copy()
        """The usable nodes with nothing on them."""
        self.run: dict[str, Allocation] = {}
        self.wait: dict[str, Reason] = {}
        self.displaced: set[str] = set()
        """Running jobs that cannot stay where they are."""
        self._pools: dict[str, tuple[str, ...]] = {}
        self._shed: dict[str, str] = {}
        """Displaced jobs that a lowered limit is to blame for, and which."""
        jobs = sorted(snapshot.jobs, key=age)
        for job in jobs:
            if job.is_running:
                if self.room.holds(job.request, job.allocation):
                    self._enter(job, job.allocation)
                else:
                    self.displaced.add(job.job_id)
        self._keep_limits()
        self.queue: list[Job] = [job for job in jobs if job.job_id not in self.run and not self._is_out(job)]
        """Jobs that may start, in the order of their submission."""

    def pools(self, job: Job) -> tuple[str, ...]:
        """Pools the job may use, most wanted first: as it says, else those without idle GPUs it needs not, the fastest
        first.
        """
        known = self._pools.get(job.job_id)
        if known is None:
            if job.request.pools:
                known = tuple(pool for pool in job.request.pools if pool in self.snapshot.pools)
            else:
                known = tuple(sorted(self.snapshot.pools, key=lambda pool: self._liking(job, pool)))
            self._pools[job.job_id] = known
        return known

    def find(
        self,
        job: Job,
        workers: int,
        *,
        room: Room | None = None,
        beside: Mapping[str, float] | None = None,
        beside_watts: float = 0.0,
        pools: Sequence[str] | None = None,
    ) -> Allocation | None:
        """Nodes for `workers` within the quota and the power cap, or None.

        Args:
            room: where to look; what is free now unless given.
            beside: GPUs per pool that the tenant must stay able to hold besides.
            beside_watts: what must be left of the power cap besides.
            pools: some of those the job may use; all unless given.
        """
        beside = beside or {}
        tenant, each = job.request.tenant, job.request.gpus_per_worker
        least = 1 if job.request.span_pools else workers
        allowed = [
            pool
            for pool in (self.pools(job) if pools is None else pools)
            if self.ledger.may_hold(tenant, pool, least * each + beside.get(pool, 0.0))
            and self.watts.allow(least * self.watts.each(job.request, pool), beside_watts)
        ]
        held = job.allocation if room is None and job.job_id in self.displaced else None
        found = place(room or self.room, job.request, allowed, workers, held=held)
        if found is None or not job.request.span_pools:
            return found
        sums = self.gpus(job.request, found)
        within = all(self.ledger.may_hold(tenant, pool, n + beside.get(pool, 0.0)) for pool, n in sums.items())
        return found if within and self.watts.allow(self.watts.of(job.request, found), beside_watts) else None

    def start(self, job: Job, allocation: Allocation) -> None:
        """Let a job of the queue run on nodes that are free."""
        self.room.take(job.request, allocation)
        self._enter(job, allocation, taken=True)
        self.wait.pop(job.job_id, None)

    def make_room(self, job: Job) -> bool:
        """Start a job that is next in line by moving others within its pool, if that loses less than its wait would."""
        request = job.request
        needed = request.min_workers * request.gpus_per_worker
        pools = [
            pool
            for pool in self.pools(job)
            if self.ledger.may_hold(request.tenant, pool, needed)
            and self.watts.allow(request.min_workers * self.watts.each(request, pool))
        ]
        moves = defragment(self.snapshot, self.run, self.room, job, pools)
        if moves is None:
            return False
        others = [self.snapshot.by_id[job_id] for job_id in moves.moved]
        for other in others:
            self.room.give(other.request, self.run[other.job_id])
        for other in others:
            self.room.take(other.request, moves.moved[other.job_id])
            self.run[other.job_id] = moves.moved[other.job_id]
        self.start(job, moves.allocation)
        return True

    def stop(self, job: Job, reason: Reason) -> None:
        """Let a job wait that ran."""
        allocation = self.run.pop(job.job_id)
        self.room.give(job.request, allocation)
        self.ledger.charge(job.request.tenant, self.gpus(job.request, allocation), -1)
        self.watts.charge(-self.watts.of(job.request, allocation))
        self.wait[job.job_id] = reason

    def grow(self, job: Job, *, room: Room | None = None, most: int | None = None, beside_watts: float = 0.0) -> None:
        """Give a job that starts as many more workers, up to its maximum, as room and limits allow and help it.

        Args:
            room: a narrower room that must hold the additional workers too; it is kept up to date.
            most: a number below the job's maximum.
            beside_watts: what must be left of the power cap besides.
        """
        request, held = job.request, self.run[job.job_id]
        pools = {pool_of(self.snapshot.node_by_id[node]) for node in held}
        if len(pools) > 1:
            return  # a gang over several pools stays as it was placed
        pool = min(pools)
        here = self.room if room is None else room
        more = min(
            min(request.max_workers, most or request.max_workers) - sum(held.values()),
            here.capacity(request, pool),
            self._affordable(request, pool),
            self.watts.workers(request, pool, beside_watts),
        )
        if more < 1:
            return
        grown = extend(here, request, held, more)
        if grown is None or goodput(self.snapshot, job, grown) < goodput(self.snapshot, job, held):
            return
        added = {node: count - held.get(node, 0) for node, count in grown.items() if count > held.get(node, 0)}
        if room is not None:
            room.take(request, added)
        self.room.take(request, added)
        self.ledger.charge(request.tenant, self.gpus(request, added))
        self.watts.charge(self.watts.of(request, added))
        self.run[job.job_id] = grown

    def gpus(self, request: Request, allocation: Allocation) -> dict[str, float]:
        """GPUs of an allocation by pool."""
        found: dict[str, float] = {}
        for node, count in allocation.items():
            pool = pool_of(self.snapshot.node_by_id[node])
            found[pool] = found.get(pool, 0.0) + count * request.gpus_per_worker
        return found

    def is_over_quota(self, job: Job) -> bool:
        """Whether the limits of its tenant, and not the room, keep the job's smallest gang from starting."""
        request = job.request
        pools = [pool for pool in self.pools(job) if self.empty.capacity(request, pool) > 0]
        most = [self._affordable(request, pool) for pool in pools]
        return (sum(most) if request.span_pools else max(most, default=0)) < request.min_workers

    def residents(self, jobs: Iterable[Job]) -> list[Resident]:
        """Running jobs as candidates to leave: by priority, then by what their leaving loses.

        Lost are the restart and the GPU-seconds held since the last change, which may not be in a checkpoint.
        """
        found = []
        for job in jobs:
            since = self.snapshot.now_s - (job.submitted_s if job.changed_s is None else job.changed_s)
            held = job.workers * job.request.gpus_per_worker
            lost = held * (max(since, 0.0) + job.request.restart_s)
            found.append(Resident(job.request, self.run[job.job_id], job.request.priority, lost))
        return found

    def evict(self, victims: Sequence[Resident], claimant: Job, allocation: Allocation, reason: Reason) -> list[Job]:
        """Start the claimant in the place of others, who keep what is still free of theirs; returns who now waits."""
        held = [(self.snapshot.by_id[victim.request.job_id], victim.allocation) for victim in victims]
        for job, _ in held:
            self.stop(job, reason)
        self.start(claimant, allocation)
        for job, before in reversed(held):
            kept = {node: min(count, self.room.fits(job.request, node)) for node, count in before.items()}
            kept = {node: count for node, count in kept.items() if count}
            sums = self.gpus(job.request, kept)
            allowed = all(self.ledger.may_hold(job.request.tenant, pool, n) for pool, n in sums.items())
            allowed = allowed and self.watts.allow(self.watts.of(job.request, kept))
            if allowed and sum(kept.values()) >= job.request.min_workers:
                self.start(job, kept)
        return [job for job, _ in held if job.job_id not in self.run]

    def place_after(
        self, job: Job, pools: Sequence[str], residents: Sequence[Resident]
    ) -> tuple[list[Resident], Allocation] | None:
        """Who of the residents would have to leave one of the pools so that the job fits, and where it then lies."""
        request = job.request
        choices = [(pool,) for pool in pools] + ([tuple(pools)] if request.span_pools and len(pools) > 1 else [])
        found = [clear(self.room, request, choice, request.min_workers, residents) for choice in choices]
        possible = [(price(victims), number) for number, victims in enumerate(found) if victims]
        if not possible:
            return None
        number = min(possible)[1]
        victims = found[number] or []
        for victim in victims:
            self.room.give(victim.request, victim.allocation)
        allocation = place(self.room, request, choices[number], request.min_workers)
        for victim in victims:
            self.room.take(victim.request, victim.allocation)
        if allocation is None:
            return None
        freed = sum(self.watts.of(victim.request, victim.allocation) for victim in victims)
        return (victims, allocation) if self.watts.allow(self.watts.of(request, allocation) - freed) else None

    def decision(self, order: Sequence[Job] | None = None) -> Decision:
        """What was decided; jobs that were given no reason get one from the numbers.

        Args:
            order: the jobs in the order in which the policy serves them; that of submission unless given.
        """
        reasons = Reasons(self)
        waiting = [job for job in (self.queue if order is None else order) if job.job_id not in self.run]
        choices = {self.pools(job): set(self.pools(job)) for job in waiting}
        ahead: dict[tuple[str, ...], list[Job]] = {pools: [] for pools in choices}
        for job in waiting:
            own = self.pools(job)
            if job.job_id not in self.wait:
                self.wait[job.job_id] = self._in_words(job, reasons.explain(job, ahead[own]))
            for pools, names in choices.items():
                if names & choices[own]:  # who waits for other pools stands in nobody's way
                    ahead[pools].append(job)
        return Decision(
            run={job.job_id: self.run[job.job_id] for job in self.snapshot.jobs if job.job_id in self.run},
            wait={job.job_id: self.wait[job.job_id] for job in self.snapshot.jobs if job.job_id not in self.run},
        )

    def _in_words(self, job: Job, reason: Reason) -> Reason:
        if job.job_id not in self.displaced:
            return reason
        if job.job_id in self._shed:
            return Reason(Wait.PREEMPTED, f"{self._shed[job.job_id]}; {reason.text}", reason.remedy)
        gone = sorted(node for node in job.allocation if node not in self.room.index)
        lost = (
            f"its node{'s' if len(gone) > 1 else ''} {', '.join(gone)} went away or drain" if gone else "its place went"
        )
        return Reason(Wait.PREEMPTED, f"{lost}; {reason.text}", reason.remedy)

    def _enter(self, job: Job, allocation: Allocation, *, taken: bool = False) -> None:
        if not taken:
            self.room.take(job.request, allocation)
        self.ledger.charge(job.request.tenant, self.gpus(job.request, allocation))
        self.watts.charge(self.watts.of(job.request, allocation))
        self.run[job.job_id] = allocation

    def _keep_limits(self) -> None:
        """Stop running jobs until every limit holds again: the lowest priority first, then the least lost work.

        Who was stopped and fits after all, because a larger one had to stop too, goes on.
        """
        if not self._over() and self.watts.left >= -SLACK:
            return
        jobs = [self.snapshot.by_id[job_id] for job_id in self.run]
        stopped: list[tuple[Job, Allocation]] = []
        for resident in sorted(self.residents(jobs), key=lambda one: one.order):
            job, over = self.snapshot.by_id[resident.request.job_id], self._over()
            held = self.gpus(job.request, resident.allocation)
            above = self.tree.path(job.request.tenant)
            blamed = next((limit for limit in over if limit.tenant in above and limit.pool in held), None)
            if blamed is not None:
                why = f"tenant {blamed.tenant!r} held {blamed.used:g} of now at most {blamed.limit:g} in {blamed.pool}"
            elif self.watts.left < -SLACK and self.watts.of(job.request, resident.allocation) > 0:
                why = f"jobs drew {-self.watts.left:.0f} W more than the power cap leaves them"
            else:
                continue
            if job.request.is_preemptible:
                self.stop(job, Reason(Wait.PREEMPTED, why))
                self._shed[job.job_id] = self.wait.pop(job.job_id).text
                self.displaced.add(job.job_id)
                stopped.append((job, resident.allocation))
        for job, allocation in reversed(stopped):
            sums = self.gpus(job.request, allocation)
            if all(self.ledger.may_hold(job.request.tenant, pool, n) for pool, n in sums.items()) and self.watts.allow(
                self.watts.of(job.request, allocation)
            ):
                self._enter(job, allocation)
                self.displaced.discard(job.job_id)
                del self._shed[job.job_id]

    def _over(self) -> list[Limit]:
        """Limits that what runs exceeds."""
        return [
            Limit(name, pool, used, limit)
            for name, tenant in sorted(self.tree.by_name.items())
            for pool, limit in sorted(tenant.limit.items())
            if (used := self.ledger.used(name, pool)) > limit + SLACK
        ]

    def _is_out(self, job: Job) -> bool:
        """Whether the job cannot start whatever the others do; writes down why."""
        if job.is_held:
            self.wait[job.job_id] = Reason(
                Wait.HELD, "its owner put it on hold", f"modelyard queue release {job.job_id}"
            )
        elif not fits(self.empty, job.request, self.pools(job), job.request.min_workers):
            self.wait[job.job_id] = Reasons(self).never(job)
        return job.job_id in self.wait

    def _affordable(self, request: Request, pool: str) -> int:
        left = self.ledger.headroom(request.tenant, pool)
        return 1 << 30 if math.isinf(left) else int((left + SLACK) / request.gpus_per_worker)

    def _liking(self, job: Job, pool: str) -> tuple[bool, float, str]:
        wastes = not job.request.resources.get("GPU") and any(
            node.total.get("GPU", 0.0) > 0 for node in self.snapshot.pools[pool][:1]
        )
        return (wastes, -job.speed.goodput(self.snapshot.accelerator(pool), 1, 1), pool)


def age(job: Job) -> tuple[float, str]:
    """The order of submission."""
    return (job.submitted_s, job.job_id)
