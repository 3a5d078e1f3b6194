"""Two policies to compare with: chance, and one job of each tenant in turn."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from modelyard.scheduling.model import Decision, Job, Snapshot
from modelyard.scheduling.policies.board import Board


@dataclass
class RandomPolicy:
    """Jobs start in an order that chance draws once for each job; large ones may wait for ever."""

    seed: int = 0
    name: str = "random"

    def decide(self, snapshot: Snapshot) -> Decision:
        """Where each job runs, or why it waits."""
        board = Board(snapshot)
        order = sorted(board.queue, key=self._draw)
        for job in order:
            found = board.find(job, job.request.min_workers)
            if found is not None:
                board.start(job, found)
                board.grow(job)
        return board.decision(order)

    def _draw(self, job: Job) -> bytes:
        return hashlib.blake2b(f"{self.seed} {job.job_id}".encode(), digest_size=16).digest()


@dataclass
class RoundRobinPolicy:
    """The oldest job of each tenant in turn, the tenant with the fewest jobs first; what has no room is passed."""

    name: str = "round_robin"

    def decide(self, snapshot: Snapshot) -> Decision:
        """Where each job runs, or why it waits."""
        board = Board(snapshot)
        order = self._turns(board)
        started = []
        for job in order:
            found = board.find(job, job.request.min_workers)
            if found is not None:
                board.start(job, found)
                started.append(job)
        for job in started:
            board.grow(job)
        return board.decision(order)

    @staticmethod
    def _turns(board: Board) -> list[Job]:
        turn: dict[str, int] = {}
        for job_id in board.run:
            tenant = board.snapshot.by_id[job_id].request.tenant
            turn[tenant] = turn.get(tenant, 0) + 1
        keyed = []
        for place, job in enumerate(board.queue):
            tenant = job.request.tenant
            turn[tenant] = turn.get(tenant, 0) + 1
            keyed.append((turn[tenant], place, job))
        return [job for _, _, job in sorted(keyed, key=lambda entry: entry[:2])]
