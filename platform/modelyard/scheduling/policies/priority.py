"""Higher priority first, by eviction where it has to be."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from modelyard.scheduling.model import Decision, Job, Reason, Snapshot, Wait
from modelyard.scheduling.policies.backfill import Reservation
from modelyard.scheduling.policies.board import Board, age
from modelyard.scheduling.policies.reasons import amount
from modelyard.scheduling.room import Demand, demand

Shape = tuple[Demand, tuple[str, ...], bool]


@dataclass
class PriorityPolicy:
    """Jobs start by priority, among equals by submission. A job without room evicts jobs of lower priority.

    Only preemptible jobs are evicted, no more than needed, the lowest priority first and then the least lost work,
    and from nodes where the whole gang then fits; an elastic victim is only shrunk where that is enough. The first
    job for which not even eviction makes room is not delayed by those behind it, except by such as it can evict.
    """

    moves: bool = True
    """Whether running jobs are moved, where that loses less than the wait it saves, so that the next in line fits."""
    name: str = "priority"

    def decide(self, snapshot: Snapshot) -> Decision:
        """Where each job runs, or why it waits."""
        return _Round(snapshot, self.moves).decide()


class _Round:
    def __init__(self, snapshot: Snapshot, moves: bool) -> None:
        self.board = Board(snapshot)
        self.moves = moves
        self.heap = [(_rank(job), job) for job in self.board.queue]
        heapq.heapify(self.heap)
        self.reservation: Reservation | None = None
        self.hopeless: dict[Shape, list[tuple[int, int]]] = {}
        self.started: list[Job] = []

    def decide(self) -> Decision:
        order = []
        while self.heap:
            job = heapq.heappop(self.heap)[1]
            order.append(job)
            if self.board.is_over_quota(job):
                continue
            if self._start(job):
                self.started.append(job)
            elif self.reservation is None:
                self.reservation = Reservation(self.board, job)
        for job in self.started:
            if self.reservation is None:
                self.board.grow(job)
            else:
                self.reservation.grow(job)
        if self.moves and self.reservation is not None:
            self.board.make_room(self.reservation.head)
        return self.board.decision(order)

    def _start(self, job: Job) -> bool:
        held = self.reservation
        if held is not None and held.start(job):
            return True
        if held is not None and not held.is_apart(job) and not held.is_below(job):
            return False
        found = self.board.find(job, job.request.min_workers)
        if found is not None:
            self.board.start(job, found)
            if held is not None:
                held.follow(found)
            return True
        return self._evict_for(job)

    def _evict_for(self, job: Job) -> bool:
        board, request = self.board, job.request
        pools = board.pools(job)
        shape = (demand(request), pools, request.span_pools)
        if any(request.priority <= rank and request.min_workers >= n for rank, n in self.hopeless.get(shape, ())):
            return False
        needed = request.min_workers * request.gpus_per_worker
        open_pools = [pool for pool in pools if board.ledger.may_hold(request.tenant, pool, needed)]
        below = [other for other in self._running() if other.request.priority < request.priority]
        found = board.place_after(job, open_pools, board.residents(below)) if below else None
        if found is None:
            if len(open_pools) == len(pools):
                self.hopeless.setdefault(shape, []).append((request.priority, request.min_workers))
            return False
        victims, allocation = found
        reason = Reason(
            Wait.PREEMPTED,
            f"evicted by job {job.job_id} of priority {request.priority}, which needed {amount(request)}; "
            f"{len(victims)} job{'s' if len(victims) > 1 else ''} had to leave",
            "wait until it has room again, raise its priority, or set is_preemptible=False",
        )
        for waiting in board.evict(victims, job, allocation, reason):
            heapq.heappush(self.heap, (_rank(waiting), waiting))
        if self.reservation is not None:
            self.reservation.follow(allocation)
        return True

    def _running(self) -> Sequence[Job]:
        jobs = self.board.snapshot.by_id
        return [jobs[job_id] for job_id in self.board.run if jobs[job_id].request.is_preemptible]


def _rank(job: Job) -> tuple[int, float, str]:
    return (-job.request.priority, *age(job))
