"""First come, first served, with backfilling that never delays the head of the queue."""

from __future__ import annotations

from dataclasses import dataclass

from modelyard.scheduling.model import Decision, Job, Snapshot
from modelyard.scheduling.policies.backfill import Reservation
from modelyard.scheduling.policies.board import Board


@dataclass
class FifoPolicy:
    """Jobs start in the order of their submission, whatever their priority; running jobs are never stopped.

    Jobs that are on hold, over their tenant's limit or too large for the cluster are passed over. The first other one
    without room is the head. What has started before it grows only by what the head does not need; what stands behind
    it starts only where it cannot delay it (see `backfill`).
    """

    backfill: bool = True
    """Whether jobs behind the head may start at all."""
    moves: bool = True
    """Whether running jobs are moved, where that loses less than the wait it saves, so that the next in line fits."""
    name: str = "fifo"

    def decide(self, snapshot: Snapshot) -> Decision:
        """Where each job runs, or why it waits."""
        board = Board(snapshot)
        started: list[Job] = []
        reservation: Reservation | None = None
        for job in board.queue:
            if board.is_over_quota(job):
                continue
            if reservation is not None:
                if self.backfill and reservation.start(job):
                    started.append(job)
                continue
            found = board.find(job, job.request.min_workers)
            if found is not None:
                board.start(job, found)
                started.append(job)
                continue
            reservation = self._reserve(board, job, started)
            started = []
        for job in started:
            if reservation is None:
                board.grow(job)
            else:
                reservation.grow(job)
        if self.moves and reservation is not None:
            board.make_room(reservation.head)
        return board.decision()

    @staticmethod
    def _reserve(board: Board, head: Job, started: list[Job]) -> Reservation:
        """Room for the head, after those before it have grown where that costs it nothing."""
        reservation = Reservation(board, head)
        for job in started:
            reservation.grow(job)
        return Reservation(board, head) if started else reservation
