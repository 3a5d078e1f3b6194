"""Tenants in a tree: what each is guaranteed it gets, the rest is shared by weight, nobody waits for ever."""

from __future__ import annotations

import bisect
from collections import defaultdict
from dataclasses import dataclass

from modelyard.scheduling.clearing import Resident
from modelyard.scheduling.model import Allocation, Decision, Job, Reason, Snapshot, Wait
from modelyard.scheduling.policies.backfill import Reservation
from modelyard.scheduling.policies.board import Board, age
from modelyard.scheduling.policies.reasons import amount
from modelyard.scheduling.room import demand

Turn = tuple[int, tuple[float, ...], float, str]


@dataclass
class FairSharePolicy:
    """Weighted dominant-resource fairness over a tree of tenants (Ghodsi et al., NSDI'11, and H-DRF, SoCC'13).

    Each turn goes to one tenant's next job (by priority, then submission), and first to

    1. a tenant that stays within its guarantee: it may evict jobs with which others have borrowed, never more than
       they borrowed and their youngest first;
    2. the oldest job that has waited longer than `patience_s`;
    3. the tenant with the smallest dominant share by weight, from the top of the tree downwards.

    The first job without room is not delayed by those after it, so a large gang does not starve behind small ones.
    """

    patience_s: float = 6 * 3600.0
    """Seconds of waiting after which a job goes before all that borrow."""
    moves: bool = True
    """Whether running jobs are moved, where that loses less than the wait it saves, so that the next in line fits."""
    name: str = "fair_share"

    def decide(self, snapshot: Snapshot) -> Decision:
        """Where each job runs, or why it waits."""
        return _Round(snapshot, self.patience_s, self.moves).decide()


class Shares:
    """Each tenant's dominant share of the cluster by weight, of its whole subtree."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._total: dict[str, int] = defaultdict(int)
        for amounts in board.empty.free:
            for name, units in amounts.items():
                self._total[name] += units
        self._used: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        self._known: dict[str, float] = {}

    def charge(self, job: Job, allocation: Allocation, sign: int = 1) -> None:
        """Add what an allocation takes to its tenant and all above it; `sign=-1` takes it off."""
        workers = sign * sum(allocation.values())
        for tenant in self._board.tree.path(job.request.tenant):
            self._known.pop(tenant, None)
            for name, units in demand(job.request):
                self._used[tenant][name] += units * workers

    def of(self, tenant: str) -> tuple[float, ...]:
        """The shares from the top of the tree down to the tenant."""
        return tuple(self._one(name) for name in reversed(self._board.tree.path(tenant)))

    def _one(self, tenant: str) -> float:
        if tenant not in self._known:
            used = self._used[tenant].items()
            dominant = max((units / self._total[name] for name, units in used if units), default=0.0)
            self._known[tenant] = dominant / self._board.tree.tenant(tenant).weight
        return self._known[tenant]


class _Round:
    def __init__(self, snapshot: Snapshot, patience_s: float, moves: bool) -> None:
        self.board = Board(snapshot)
        self.patience_s, self.moves = patience_s, moves
        self.shares = Shares(self.board)
        for job_id, allocation in self.board.run.items():
            self.shares.charge(snapshot.by_id[job_id], allocation)
        self.reservation: Reservation | None = None
        self.pending: dict[str, list[Job]] = defaultdict(list)
        for job in sorted(self.board.queue, key=self._place):
            self.pending[job.request.tenant].append(job)

    def decide(self) -> Decision:
        order: list[Job] = []
        started = []
        while self.pending:
            tenant = min(self.pending, key=self._turn)
            job = self.pending[tenant].pop(0)
            if not self.pending[tenant]:
                del self.pending[tenant]
            order.append(job)
            if self.board.is_over_quota(job):
                continue
            if self._start(job):
                started.append(job)
                self.shares.charge(job, self.board.run[job.job_id])
            elif self.reservation is None:
                self.reservation = Reservation(self.board, job)
        for job in sorted(started, key=lambda one: (self.shares.of(one.request.tenant), age(one))):
            if self.reservation is None:
                self.board.grow(job)
            else:
                self.reservation.grow(job)
        if self.moves and self.reservation is not None:
            self.board.make_room(self.reservation.head)
        return self.board.decision(order)

    def _place(self, job: Job) -> tuple[bool, int, float, str]:
        overdue = self._is_overdue(job)
        return (not overdue, 0 if overdue else -job.request.priority, *age(job))

    def _is_overdue(self, job: Job) -> bool:
        since = job.submitted_s if job.changed_s is None else max(job.changed_s, job.submitted_s)
        return not job.is_running and self.board.snapshot.now_s - since > self.patience_s

    def _turn(self, tenant: str) -> Turn:
        job = self.pending[tenant][0]
        if self._guaranteed(job):
            return (0, self.shares.of(tenant), *age(job))
        if self._is_overdue(job):
            return (1, (), *age(job))
        return (2, self.shares.of(tenant), *age(job))

    def _guaranteed(self, job: Job) -> list[str]:
        """Pools in which the job's smallest gang is covered by a guarantee."""
        request, ledger = job.request, self.board.ledger
        needed = request.min_workers * request.gpus_per_worker
        return [
            pool
            for pool in self.board.pools(job)
            if ledger.is_guaranteed(request.tenant, pool, needed) and ledger.may_hold(request.tenant, pool, needed)
        ]

    def _start(self, job: Job) -> bool:
        held = self.reservation
        if held is not None and held.start(job):
            return True
        if held is not None and not held.is_apart(job):
            return False
        found = self.board.find(job, job.request.min_workers)
        if found is None:
            return self._reclaim(job)
        self.board.start(job, found)
        if held is not None:
            held.follow(found)
        return True

    def _reclaim(self, job: Job) -> bool:
        """Take back from those who borrowed what the job's tenant is guaranteed."""
        for pool in self._guaranteed(job):
            found = self.board.place_after(job, (pool,), self._borrowers(job, pool))
            if found is None:
                continue
            victims, allocation = found
            reason = Reason(
                Wait.PREEMPTED,
                f"ran on borrowed room; tenant {job.request.tenant!r} took back {amount(job.request)} in pool {pool}, "
                f"which it is guaranteed, for job {job.job_id}",
                "wait until room is free again, or raise the tenant's guarantee",
            )
            jobs = [self.board.snapshot.by_id[victim.request.job_id] for victim in victims]
            for one, victim in zip(jobs, victims, strict=True):
                self.shares.charge(one, victim.allocation, -1)
            for waiting in self.board.evict(victims, job, allocation, reason):
                bisect.insort(self.pending[waiting.request.tenant], waiting, key=self._place)
            for one in jobs:
                self.shares.charge(one, self.board.run.get(one.job_id, {}))
            if self.reservation is not None:
                self.reservation.follow(allocation)
            return True
        return False

    def _borrowers(self, job: Job, pool: str) -> list[Resident]:
        """Running jobs that may be asked to leave a pool, for each tenant no more than what it has borrowed."""
        board, ledger = self.board, self.board.ledger
        needed = job.request.min_workers * job.request.gpus_per_worker
        running = [board.snapshot.by_id[job_id] for job_id in board.run]
        found = []
        off: list[tuple[str, dict[str, float]]] = []
        for other in sorted(running, key=lambda one: (one.request.priority, -one.submitted_s, one.job_id)):
            gpus = board.gpus(other.request, board.run[other.job_id])
            if not other.request.is_preemptible or pool not in gpus or not other.is_running:
                continue
            if ledger.may_reclaim(job.request.tenant, other.request.tenant, pool, needed):
                found.append(other)
                ledger.charge(other.request.tenant, gpus, -1)
                off.append((other.request.tenant, gpus))
        for tenant, gpus in off:
            ledger.charge(tenant, gpus)
        return board.residents(found)
