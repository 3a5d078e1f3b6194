"""What is refused when a job is submitted, because waiting would not help."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from modelyard.cluster import Node
from modelyard.errors import CapacityError, ConfigError, nearest
from modelyard.scheduling.forecast import fits
from modelyard.scheduling.model import Request, Snapshot, Tenant
from modelyard.scheduling.quota import Tree
from modelyard.scheduling.room import UNIT, Room, demand

FREE_TENANT = "default"
"""The tenant that every cluster has, listed or not."""


def check_request(
    request: Request,
    cluster: Snapshot | Sequence[Node],
    tenants: Iterable[Tenant] | None = None,
    launchable: Sequence[Node] = (),
) -> None:
    """Refuse a request whose pools or tenant do not exist, or that can never start.

    Draining and dead nodes count as what the cluster can have again. Without any tenants every tenant is welcome.

    Args:
        tenants: the tenants; the snapshot's unless given.
        launchable: nodes that an autoscaler could add (`growth.launchable`).
    """
    nodes: Sequence[Node] = cluster.nodes if isinstance(cluster, Snapshot) else cluster
    if tenants is None:
        tenants = cluster.tenants if isinstance(cluster, Snapshot) else ()
    tree = Tree(tenants)
    whole = tuple(dataclasses.replace(node, alive=True, draining=False) for node in [*nodes, *launchable])
    room = Room(Snapshot(now_s=0.0, nodes=whole, jobs=()).pools)
    _check_tenant(request, tree)
    _check_pools(request, room)
    _check_size(request, room)
    _check_quota(request, room, tree)


def _check_tenant(request: Request, tree: Tree) -> None:
    if tree.by_name and request.tenant not in tree.by_name and request.tenant != FREE_TENANT:
        raise ConfigError(
            f"job {request.job_id!r}: tenant={request.tenant!r} is no tenant; known: {', '.join(sorted(tree.by_name))}",
            nearest(request.tenant, tree.by_name),
        )


def _check_pools(request: Request, room: Room) -> None:
    for pool in request.pools:
        if pool not in room.members:
            known = ", ".join(room.members) or "none, the cluster has no nodes"
            raise ConfigError(
                f"job {request.job_id!r}: pools names {pool!r}, which is no pool; known: {known}",
                nearest(pool, room.members),
            )


def _check_size(request: Request, room: Room) -> None:
    pools = request.pools or tuple(room.members)
    if fits(room, request, pools, request.min_workers):
        return
    capacity = {pool: room.capacity(request, pool) for pool in pools}
    if not capacity:
        raise CapacityError(f"job {request.job_id!r}: the cluster has no nodes", "add nodes, then submit it again")
    largest = max(pools, key=lambda pool: (capacity[pool], _units(room, pool, request)))
    each = ", ".join(f"{name}={units / UNIT:g}" for name, units in demand(request))
    if not any(capacity.values()):
        most = ", ".join(f"{name}={_most(room, largest, name) / UNIT:g}" for name, _ in demand(request))
        raise CapacityError(
            f"job {request.job_id!r}: no node holds one worker with resources {each}; the most on one node of the "
            f"largest pool {largest!r} is {most}",
            "ask for less per worker, or add larger nodes",
        )
    together = sum(capacity.values())
    others = "" if request.pools else " of any pool"
    todo = f"lower min_workers to {together if request.span_pools else capacity[largest]}"
    if not request.span_pools and together >= request.min_workers:
        todo += f", or set span_pools=True: all its pools together hold {together}"
    raise CapacityError(
        f"job {request.job_id!r}: min_workers={request.min_workers} workers with {each} never fit{others}; the largest "
        f"pool {largest!r} holds {capacity[largest]} when empty"
        + (f", all its pools together {together}" if request.span_pools else ""),
        f"{todo}, or add nodes",
    )


def _check_quota(request: Request, room: Room, tree: Tree) -> None:
    """Refuse what the limits of the tenant, or of one above it, never allow."""
    limits = {}
    for pool in request.pools or tuple(room.members):
        own = [
            (tree.tenant(name).limit[pool], name)
            for name in tree.path(request.tenant)
            if pool in tree.tenant(name).limit
        ]
        gpus = room.capacity(request, pool) * request.gpus_per_worker
        limits[pool] = min([*own, (gpus, "")])
    workers = {pool: int((amount + 1e-6) / request.gpus_per_worker) for pool, (amount, _) in limits.items()}
    most = sum(workers.values()) if request.span_pools else max(workers.values())
    if most >= request.min_workers:
        return
    pool = max((pool for pool in limits if limits[pool][1]), key=lambda name: workers[name])
    limit, owner = limits[pool]
    raise CapacityError(
        f"job {request.job_id!r}: min_workers={request.min_workers} needs "
        f"{request.min_workers * request.gpus_per_worker:g} GPUs; tenant {owner!r} may hold at most {limit:g} in pool "
        f"{pool!r}",
        f"lower min_workers to {most}, or raise the limit: modelyard quota set {owner}"
        if most
        else f"raise the limit: modelyard quota set {owner}",
    )


def _units(room: Room, pool: str, request: Request) -> int:
    return sum(room.free[number].get(name, 0) for number in room.members[pool] for name, _ in demand(request)[:1])


def _most(room: Room, pool: str, name: str) -> int:
    return max(room.free[number].get(name, 0) for number in room.members[pool])
