"""When running jobs are expected to end, and when a waiting gang could start because of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from modelyard.scheduling.model import Allocation, Job, Request, Snapshot, pool_of
from modelyard.scheduling.room import Room


@dataclass(frozen=True)
class Holder:
    """Somebody who holds nodes until he ends."""

    end_s: float | None
    """None when nobody knows."""
    request: Request
    allocation: Allocation


@dataclass(frozen=True)
class Start:
    """The first moment at which a gang could start."""

    start_s: float
    room: Room
    """What is free then, without the gang."""


def goodput(snapshot: Snapshot, job: Job, allocation: Allocation) -> float:
    """The job's speed there; over several pools it goes at the pace of the slowest."""
    workers, nodes = sum(allocation.values()), len(allocation)
    kinds = {snapshot.accelerator(pool_of(snapshot.node_by_id[node])) for node in allocation}
    return min((job.speed.goodput(kind, workers, nodes) for kind in sorted(kinds)), default=0.0)


def expected_end(snapshot: Snapshot, job: Job, allocation: Allocation) -> float | None:
    """When the job would end if it held `allocation` from now on; None when its work or its speed is unknown.

    A changed allocation costs `restart_s` first; one it has kept since `changed_s` only what is left of that.
    """
    if job.remaining is None:
        return None
    speed = goodput(snapshot, job, allocation)
    if speed <= 0:
        return None
    begin = snapshot.now_s
    if allocation != job.allocation:
        begin += job.request.restart_s
    elif job.changed_s is not None:
        begin = max(begin, job.changed_s + job.request.restart_s)
    return begin + job.remaining / speed


def earliest_start(
    room: Room, holders: Iterable[Holder], request: Request, pools: Sequence[str], workers: int, now_s: float
) -> Start | None:
    """The first moment at which `workers` fit as the holders end one after the other; None if the known ends free too
    little.
    """
    known = sorted(
        ((holder.end_s, holder.request.job_id, holder) for holder in holders if holder.end_s is not None),
        key=lambda entry: entry[:2],
    )
    then = room.copy()
    start = now_s
    position = 0
    while not fits(then, request, pools, workers):
        if position == len(known):
            return None
        start = known[position][0]
        while position < len(known) and known[position][0] <= start:
            then.give(known[position][2].request, known[position][2].allocation)
            position += 1
    return Start(start, then)


def fits(room: Room, request: Request, pools: Sequence[str], workers: int) -> bool:
    """Whether a gang of `workers` has room in one of the pools, or in all together if it may span them."""
    capacities = [room.capacity(request, pool) for pool in pools]
    return (sum(capacities) if request.span_pools else max(capacities, default=0)) >= workers
