"""Worker counts to nodes, and nodes to Ray bundles with label selectors.

A gang is placed whole or not at all: in the smallest domain that holds it (a node, then each of `TOPOLOGY_LABELS`,
then the pool), there on the fewest nodes, and of those that do equally well in the tightest, so big holes stay whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from modelyard.scheduling.clearing import Resident, clear
from modelyard.scheduling.forecast import Holder, earliest_start, expected_end, fits
from modelyard.scheduling.model import Allocation, Decision, Job, Request, Snapshot
from modelyard.scheduling.room import Room

NODE_ID_LABEL = "ray.io/node-id"
"""The label by which Ray knows every node."""

__all__ = ["NODE_ID_LABEL", "Moves", "Room", "bundles", "defragment", "extend", "place", "room_of"]


def room_of(snapshot: Snapshot, decision: Decision | None = None) -> Room:
    """What the usable nodes hold, less the allocations of a decision, else of the snapshot's running jobs."""
    room = Room(snapshot.pools)
    for job in snapshot.jobs:
        allocation = job.allocation if decision is None else decision.run.get(job.job_id, {})
        room.take(job.request, {node: count for node, count in allocation.items() if node in room.index})
    return room


def place(
    room: Room, request: Request, pools: str | Sequence[str], workers: int, *, held: Allocation | None = None
) -> Allocation | None:
    """Nodes for all workers, or None; takes nothing.

    Args:
        pools: one pool, or several with the most wanted first. A gang lies in one of them unless `span_pools`.
        held: where the job runs now, given back to `room` before the call. Its workers stay there if they can.
    """
    names = (pools,) if isinstance(pools, str) else tuple(pools)
    if held and (kept := _resized(room, request, names, workers, held)) is not None:
        return kept
    for pool in names:
        if (found := room.view(request, pool).gang(workers)) is not None:
            return room.named(found)
    return _spanning(room, request, names, workers) if request.span_pools else None


def extend(room: Room, request: Request, held: Allocation, workers: int) -> Allocation | None:
    """`held` and `workers` more in the same pool, as near as possible; None when they do not fit.

    `held` is still taken in `room`, and stays so.
    """
    pools = {room.pool(node) for node in held}
    pool = pools.pop() if len(pools) == 1 else None
    if pool is None or room.capacity(request, pool) < workers:
        return None
    found = dict(held)
    for node in sorted(held, key=lambda name: (-held[name], name)):
        more = min(room.fits(request, node), workers)
        found[node] += more
        workers -= more
    if workers:
        rest = room.view(request, pool).near(workers, [room.index[node] for node in held], room)
        if rest is None:
            return None
        found.update(room.named(rest))
    return {node: found[node] for node in sorted(found)}


def bundles(allocation: Allocation, request: Request) -> list[tuple[dict[str, float], dict[str, str]]]:
    """Each worker's Ray bundle and the label selector that pins it to its node; workers of a node stand together."""
    found = []
    whole = {
        name: float(math.ceil(amount - 1e-9)) if name == "GPU" else float(amount)
        for name, amount in request.resources.items()
        if amount > 0
    }
    for node_id in sorted(allocation):
        found += [(dict(whole), {NODE_ID_LABEL: node_id}) for _ in range(allocation[node_id])]
    return found


@dataclass(frozen=True)
class Moves:
    """Moves that let one waiting gang start."""

    job_id: str
    """The gang that starts."""
    allocation: Allocation
    """Where it starts."""
    moved: dict[str, Allocation]
    """Running jobs and where they go, with as many workers as now."""
    cost_gpu_s: float
    gain_gpu_s: float


def defragment(
    snapshot: Snapshot,
    run: Mapping[str, Allocation],
    room: Room,
    job: Job,
    pools: Sequence[str],
    *,
    horizon_s: float = 600.0,
) -> Moves | None:
    """Moves of running jobs after which a gang that waits for room could start, or None when none pays.

    The rule: the moved jobs lose `restart_s` times their GPUs. The gang gains its GPUs times the seconds it would
    wait otherwise: until the first moment at which enough of the running jobs are expected to have ended, at most
    `horizon_s`. Moves pay when the gain is above the loss.

    Args:
        run: where jobs are to run, by what was decided so far.
        room: what that leaves free; as before afterwards.
        pools: those the gang may start in.
    """
    request = job.request
    if not pools or fits(room, request, pools, request.min_workers):
        return None  # it waits for something else than room
    jobs = [one for one in snapshot.jobs if one.job_id in run]
    holders = [Holder(expected_end(snapshot, one, run[one.job_id]), one.request, run[one.job_id]) for one in jobs]
    start = earliest_start(room, holders, request, pools, request.min_workers, snapshot.now_s)
    avoided_s = min(horizon_s, start.start_s - snapshot.now_s if start else horizon_s)
    gain = request.min_workers * request.gpus_per_worker * avoided_s
    return _moves(room, job, pools, _movable(jobs, run, room), gain) if gain > 0 else None


def _movable(jobs: Sequence[Job], run: Mapping[str, Allocation], room: Room) -> list[Resident]:
    """Jobs that stay where they are by what was decided, but could lie elsewhere in their pool."""
    return [
        Resident(job.request, job.allocation, 0, job.request.restart_s * job.workers * job.request.gpus_per_worker)
        for job in jobs
        if job.is_running
        and job.request.is_preemptible
        and run[job.job_id] == job.allocation
        and len({room.pool(node) for node in job.allocation}) == 1
    ]


def _moves(room: Room, job: Job, pools: Sequence[str], movable: Sequence[Resident], gain: float) -> Moves | None:
    request = job.request
    for pool in pools:
        victims = clear(room, request, (pool,), request.min_workers, movable)
        cost = sum(victim.cost for victim in victims or ())
        if not victims or cost >= gain:
            continue
        trial = room.copy()
        for victim in victims:
            trial.give(victim.request, victim.allocation)
        allocation = place(trial, request, pool, request.min_workers)
        if allocation is None:
            continue
        trial.take(request, allocation)
        moved: dict[str, Allocation] = {}
        for victim in victims:
            goal = place(trial, victim.request, pool, sum(victim.allocation.values()))
            if goal is None:
                break
            trial.take(victim.request, goal)
            moved[victim.request.job_id] = goal
        else:
            return Moves(request.job_id, allocation, moved, cost, gain)
    return None


def _resized(room: Room, request: Request, names: Sequence[str], workers: int, held: Allocation) -> Allocation | None:
    """`held` grown or shrunk in place; lost nodes are left out and replaced."""
    kept = {node: min(held[node], room.fits(request, node)) for node in sorted(held) if room.pool(node) in names}
    kept = {node: count for node, count in kept.items() if count}
    missing = workers - sum(kept.values())
    if not kept:
        return None
    if missing > 0:
        room.take(request, kept)
        found = extend(room, request, kept, missing)
        room.give(request, kept)
        return found
    for node in sorted(kept, key=lambda name: (kept[name], name)):
        fewer = min(kept[node], -missing)
        kept[node] -= fewer
        missing += fewer
    return {node: count for node, count in kept.items() if count}


def _spanning(room: Room, request: Request, names: Sequence[str], workers: int) -> Allocation | None:
    """A gang over several pools: most wanted first if the job named them, else the roomiest, so that few are used."""
    capacity = {pool: room.capacity(request, pool) for pool in names}
    if sum(capacity.values()) < workers:
        return None
    found: dict[int, int] = {}
    for pool in names if request.pools else sorted(names, key=lambda name: -capacity[name]):
        part = min(capacity[pool], workers)
        if part:
            found.update(room.view(request, pool).gang(part) or {})
            workers -= part
    return room.named(found)
