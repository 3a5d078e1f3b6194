"""Which (pool, workers) choices each job has, and what each is expected to be worth."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from modelyard.scheduling.model import Job, Request, Snapshot, Speed, pool_of
from modelyard.scheduling.room import UNIT, Room, demand


@dataclass(frozen=True)
class Choice:
    """One way to run a job."""

    pool: str
    workers: int
    nodes: int
    """On how many nodes its workers lie when they are packed."""
    gpus: float
    goodput: float
    """Progress per second that is expected of it."""
    speed: Speed = field(repr=False, compare=False)
    accelerator: str = field(repr=False, compare=False)

    def goodput_on(self, nodes: int) -> float:
        """The same workers on another number of nodes."""
        return self.speed.goodput(self.accelerator, self.workers, nodes)


@dataclass(frozen=True)
class Shape:
    """A pool as workers of one kind see it."""

    per_node: int
    """Workers on one node."""
    workers: int
    """Workers on all nodes."""


def gpus_of(request: Request) -> float:
    """What a worker takes of the resource its pool is counted in; a part of a GPU takes a whole one."""
    named = dict(demand(request))
    units = named.get("GPU") or named.get("CPU")
    return units / UNIT if units else 1.0


class Catalogue:
    """Choices of jobs on the empty cluster. Counts are powers of two within a node and whole nodes beyond (Sia)."""

    def __init__(self, snapshot: Snapshot, room: Room) -> None:
        """`room` is the empty cluster."""
        self._snapshot, self._room = snapshot, room
        self._shapes: dict[tuple[object, str], Shape] = {}

    def of(self, job: Job) -> list[Choice]:
        """What the job could run on; empty when it never fits."""
        return [choice for choice in self._all(job) if choice.goodput > 0]

    def held(self, job: Job) -> Choice | None:
        """What the job runs on now, if all its nodes are there and in one pool."""
        pools = {self._room.pool(node) for node in job.allocation}
        if len(pools) != 1 or None in pools:
            return None
        return self._choice(job, str(pools.pop()), job.workers, len(job.allocation))

    def _all(self, job: Job) -> Iterator[Choice]:
        request = job.request
        held = {pool_of(self._snapshot.node_by_id[n]) for n in job.allocation if n in self._snapshot.node_by_id}
        for pool in request.pools or tuple(self._snapshot.pools):
            if pool not in self._snapshot.pools:
                continue
            shape = self.shape(request, pool)
            extra = {job.workers} if held == {pool} else set()
            for workers in sorted(set(counts(request, shape)) | extra):
                if request.min_workers <= workers <= min(request.max_workers, shape.workers):
                    yield self._choice(job, pool, workers, -(-workers // shape.per_node))

    def _choice(self, job: Job, pool: str, workers: int, nodes: int) -> Choice:
        accelerator = self._snapshot.accelerator(pool)
        goodput = job.speed.goodput(accelerator, workers, nodes)
        return Choice(pool, workers, nodes, workers * gpus_of(job.request), goodput, job.speed, accelerator)

    def shape(self, request: Request, pool: str) -> Shape:
        """What the pool holds of such workers."""
        key = (demand(request), pool)
        if key not in self._shapes:
            fits = self._room.view(request, pool).fits.values()
            self._shapes[key] = Shape(max(fits, default=0), sum(fits))
        return self._shapes[key]


def counts(request: Request, shape: Shape) -> Sequence[int]:
    """Worker counts worth trying in a pool."""
    most = min(request.max_workers, shape.workers)
    if shape.per_node < 1 or request.min_workers > most:
        return ()
    found = {request.min_workers}
    power = 1
    while power <= min(shape.per_node, most):
        found.add(power)
        power *= 2
    found.add(min(shape.per_node, most))
    whole = most // shape.per_node
    step = max(1, whole // 8)  # large pools: eighths of the pool are fine enough
    found.update(nodes * shape.per_node for nodes in [1, 2, 3, 4, *range(step, whole + 1, step)] if nodes <= whole)
    return sorted(count for count in found if request.min_workers <= count <= most)


def reference(choices: Sequence[Choice]) -> float:
    """Progress per second and GPU of the job at its most efficient: turns its progress into GPU-seconds."""
    return max((choice.goodput / choice.gpus for choice in choices), default=0.0) or math.nan
