"""From chosen (pool, workers) to nodes: who keeps his choice stays where he is, the others are packed around them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from modelyard.scheduling.model import Allocation, Job
from modelyard.scheduling.policies.choices import Choice
from modelyard.scheduling.room import Room


@dataclass(frozen=True)
class Picked:
    """A job, its choice, and what that is worth."""

    job: Job
    choice: Choice
    value: float


class Assignment:
    """Places the picked jobs into a room, which holds what cannot move already."""

    def __init__(self, room: Room, horizon_s: float) -> None:
        """`horizon_s`: moves must pay within it."""
        self.room = room
        self.run: dict[str, Allocation] = {}
        self.scattered: set[str] = set()
        """Jobs whose pool has the GPUs, but not close enough together."""
        self._horizon_s = horizon_s

    def place(self, picked: Mapping[str, Picked]) -> None:
        """Place all that fit."""
        waiting = [one for one in picked.values() if not self._stays(one)]
        left = [one for one in sorted(waiting, key=_large_first) if not self._packed(one)]
        for pool in sorted({one.choice.pool for one in left}):
            self._repack(pool, [one for one in left if one.choice.pool == pool], picked)
        for one in left:
            if one.job.job_id not in self.run:
                self._spread(one)

    def _stays(self, one: Picked) -> bool:
        job, choice = one.job, one.choice
        pools = {self.room.pool(node) for node in job.allocation}
        if pools != {choice.pool} or job.workers != choice.workers or not self.room.holds(job.request, job.allocation):
            return False
        self._take(one, job.allocation)
        return True

    def _packed(self, one: Picked) -> bool:
        """On as few nodes as its choice was valued for."""
        found = self.room.view(one.job.request, one.choice.pool).gang(one.choice.workers)
        if found is None or len(found) > one.choice.nodes:
            return False
        self._take(one, self.room.named(found))
        return True

    def _spread(self, one: Picked) -> None:
        """On more nodes than it was valued for, if it can run so at all."""
        found = self.room.view(one.job.request, one.choice.pool).gang(one.choice.workers)
        if found is not None and one.choice.goodput_on(len(found)) > 0:
            self._take(one, self.room.named(found))
        else:
            self.scattered.add(one.job.job_id)

    def _repack(self, pool: str, left: list[Picked], picked: Mapping[str, Picked]) -> None:
        """Pack the whole pool anew, largest first, if what then fits is worth more than the restarts of who moves."""
        there = [one for one in picked.values() if one.choice.pool == pool and one.job.job_id in self.run]
        before = {one.job.job_id: self.run[one.job.job_id] for one in there}
        for one in there:
            self._drop(one)
        fitted = [one for one in sorted([*there, *left], key=_large_first) if self._packed(one)]
        names = {one.job.job_id for one in fitted}
        moved = [one for one in there if one.job.job_id in names and self.run[one.job.job_id] != one.job.allocation]
        cost = sum(one.value * one.job.request.restart_s / self._horizon_s for one in moved if one.job.is_running)
        lost = sum(one.value for one in there if one.job.job_id not in names)
        if sum(one.value for one in left if one.job.job_id in names) >= cost + lost:
            return
        for one in fitted:
            self._drop(one)
        for one in there:
            self._take(one, before[one.job.job_id])

    def _take(self, one: Picked, allocation: Allocation) -> None:
        self.room.take(one.job.request, allocation)
        self.run[one.job.job_id] = dict(allocation)

    def _drop(self, one: Picked) -> None:
        self.room.give(one.job.request, self.run.pop(one.job.job_id))


def _large_first(one: Picked) -> tuple[int, str]:
    return (-one.choice.workers, one.job.job_id)
