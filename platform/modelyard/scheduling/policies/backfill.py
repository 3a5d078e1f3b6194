"""Room kept for a job that must not be delayed, and what others may use meanwhile.

EASY backfilling (Lifka 1995; Mu'alem and Feitelson 2001): the blocked head gets the first moment at which it fits as
the running jobs end. Others may start if they end by then, or if they use what is left over even then. When some
running job that stands in the head's way has no known end, the head could fit at any moment: then others get only
nodes that the head can never use.
"""

from __future__ import annotations

from modelyard.scheduling.forecast import Holder, earliest_start, expected_end
from modelyard.scheduling.model import Allocation, Job
from modelyard.scheduling.placement import place
from modelyard.scheduling.policies.board import Board


class Reservation:
    """The head's claim on the future."""

    def __init__(self, board: Board, head: Job) -> None:
        """Reserve for `head`, which has no room now."""
        self.head = head
        self._board = board
        self.start_s: float | None = None
        """When it can start; None when nobody knows."""
        self._needs: dict[str, float] = {}
        self._watts = min((board.watts.each(head.request, pool) for pool in board.pools(head)), default=0.0)
        self._watts *= head.request.min_workers
        """Of the power cap, what the head needs at least."""
        self.spare = board.room.copy()
        """What the head needs neither now nor then."""
        request, pools = head.request, board.pools(head)
        ends = self._ends()
        start = None
        if ends is not None:
            start = earliest_start(board.room, ends, request, pools, request.min_workers, board.snapshot.now_s)
        found = None if start is None else place(start.room, request, pools, request.min_workers)
        if start is None or found is None:
            self._close_all_of_the_heads()
            return
        self.start_s = start.start_s
        self._needs = board.gpus(request, found)
        start.room.take(request, found)
        self.spare.lower(start.room)

    def start(self, job: Job) -> bool:
        """Start a job behind the head with its fewest workers, if that cannot delay the head."""
        workers = job.request.min_workers
        soon = None if self.start_s is None else self._board.find(job, workers)
        if soon is not None and self._ends_in_time(job, soon):
            self._board.start(job, soon)
            self.spare.lower(self._board.room, soon)
            return True
        beside = self._needs if self._shares_quota(job) else None
        found = self._board.find(job, workers, room=self.spare, beside=beside, beside_watts=self._watts)
        if found is None:
            return False
        self._board.start(job, found)
        self.spare.take(job.request, found)
        return True

    def grow(self, job: Job, *, most: int | None = None) -> None:
        """Give a job more workers from what the head needs neither now nor then."""
        if not self._shares_quota(job):
            self._board.grow(job, room=self.spare, most=most, beside_watts=self._watts)

    def follow(self, nodes: Allocation) -> None:
        """Take over that these nodes were handed out in some other way."""
        self.spare.lower(self._board.room, nodes)

    def is_apart(self, job: Job) -> bool:
        """Whether the job can never stand in the head's way: other pools, and no quota in common."""
        pools = set(self._board.pools(self.head))
        return pools.isdisjoint(self._board.pools(job)) and not self._shares_quota(job)

    def is_below(self, job: Job) -> bool:
        """Whether the head could evict the job at any time."""
        lower = job.request.is_preemptible and job.request.priority < self.head.request.priority
        return lower and not self._shares_quota(job)

    def _ends(self) -> list[Holder] | None:
        """All that run, with their ends; None if one whose nodes the head could use has none."""
        board, request = self._board, self.head.request
        pools = set(board.pools(self.head))
        found = []
        for job in board.snapshot.jobs:
            allocation = board.run.get(job.job_id)
            if allocation is None:
                continue
            end = expected_end(board.snapshot, job, allocation)
            in_the_way = any(board.room.pool(n) in pools and board.empty.fits(request, n) for n in allocation)
            if end is None and in_the_way:
                return None
            found.append(Holder(end, job.request, allocation))
        return found

    def _close_all_of_the_heads(self) -> None:
        board, request = self._board, self.head.request
        for pool in board.pools(self.head):
            for node in board.snapshot.pools[pool]:
                if board.empty.fits(request, node.node_id):
                    self.spare.close(node.node_id)
            self._needs[pool] = request.min_workers * request.gpus_per_worker

    def _ends_in_time(self, job: Job, allocation: Allocation) -> bool:
        end = expected_end(self._board.snapshot, job, allocation)
        return end is not None and self.start_s is not None and end <= self.start_s

    def _shares_quota(self, job: Job) -> bool:
        tree = self._board.tree
        above = {name for name in tree.path(self.head.request.tenant) if tree.tenant(name).limit}
        return not above.isdisjoint(tree.path(job.request.tenant))
