"""Whom to ask to leave so that a gang fits: as few as possible, the cheapest, and from nodes where it really fits."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from modelyard.scheduling.model import Allocation, Request
from modelyard.scheduling.room import Room, copies, demand


@dataclass(frozen=True)
class Resident:
    """A running job that may be asked to leave."""

    request: Request
    allocation: Allocation
    rank: int
    """Lower leaves first, whatever the cost: its priority."""
    cost: float
    """Among equals the cheaper leaves first: GPU-seconds that would be lost."""

    @property
    def order(self) -> tuple[int, float, str]:
        """Who leaves first."""
        return (self.rank, self.cost, self.request.job_id)


def clear(
    room: Room, request: Request, pools: Sequence[str], workers: int, residents: Sequence[Resident]
) -> list[Resident] | None:
    """The residents that must leave so that `workers` fit into `pools` together; None when not even all would do.

    Two ways are compared: the one node on which it is cheapest, and the cheapest places anywhere. The better has the
    lower highest rank, then the lower cost, then fewer victims. Nobody leaves without whom it fits as well. The room
    is as before afterwards.
    """
    numbers = {number for pool in pools for number in room.members.get(pool, ())}
    nodes: dict[int, list[Resident]] = {}
    for resident in sorted(residents, key=lambda one: one.order):
        for node_id in resident.allocation:
            if (number := room.index.get(node_id)) in numbers and number is not None:
                nodes.setdefault(number, []).append(resident)

    def capacity() -> int:
        return sum(room.capacity(request, pool) for pool in pools)

    options = []
    best = _one_node(room, request, workers, nodes)
    if best is not None:
        number, victims = best
        options.append(_needed(room, victims, lambda: room.fits(request, room.ids[number]) >= workers))
    spread = _anywhere(room, request, workers, nodes, capacity)
    if spread is not None:
        options.append(_needed(room, spread, lambda: capacity() >= workers))
    return min(options, key=price) if options else None


def price(victims: Sequence[Resident]) -> tuple[int, float, int]:
    """What their leaving costs: the highest rank, the sum of costs, how many; lower is better."""
    return (max((one.rank for one in victims), default=-(1 << 30)), sum(one.cost for one in victims), len(victims))


def _one_node(
    room: Room, request: Request, workers: int, nodes: dict[int, list[Resident]]
) -> tuple[int, list[Resident]] | None:
    """The node on which all workers come to fit at the lowest price, and who leaves it."""
    best: tuple[tuple[int, float, int], int, list[Resident]] | None = None
    for number in sorted(nodes):
        victims = _leaving(room, request, number, nodes[number], set(), workers)
        if victims is None:
            continue
        costs = price(victims)
        if best is None or costs < best[0]:
            best = (costs, number, victims)
    return None if best is None else (best[1], best[2])


def _leaving(
    room: Room, request: Request, number: int, residents: Sequence[Resident], gone: set[str], workers: int
) -> list[Resident] | None:
    """The first residents of a node after whom `workers` fit there; None when all are not enough."""
    wanted = demand(request)
    amounts = dict(room.free[number])
    leaving = []
    for resident in residents:
        if resident.request.job_id in gone:
            continue
        leaving.append(resident)
        for name, units in demand(resident.request):
            amounts[name] = amounts.get(name, 0) + units * resident.allocation[room.ids[number]]
        if copies(amounts, wanted) >= workers:
            return leaving
    return None


def _anywhere(
    room: Room, request: Request, workers: int, nodes: dict[int, list[Resident]], capacity: Callable[[], int]
) -> list[Resident] | None:
    """Free the cheapest next worker's place, again and again, until all fit."""
    gone: set[str] = set()
    victims: list[Resident] = []
    version = dict.fromkeys(nodes, 0)
    heap: list[tuple[int, float, int, int, list[Resident]]] = []

    def offer(number: int) -> None:
        version[number] += 1
        fits = room.fits(request, room.ids[number])
        leaving = _leaving(room, request, number, nodes[number], gone, fits + 1)
        if leaving:
            rank, cost, _ = price(leaving)
            heapq.heappush(heap, (rank, cost, number, version[number], leaving))

    for number in sorted(nodes):
        offer(number)
    while capacity() < workers and heap:
        _, _, number, seen, leaving = heapq.heappop(heap)
        if seen != version[number]:
            continue
        touched = set()
        for resident in leaving:
            gone.add(resident.request.job_id)
            victims.append(resident)
            room.give(resident.request, resident.allocation)
            touched |= {room.index[node_id] for node_id in resident.allocation} & nodes.keys()
        for other in sorted(touched):
            offer(other)
    enough = capacity() >= workers
    for resident in victims:
        room.take(resident.request, resident.allocation)
    return victims if enough else None


def _needed(room: Room, victims: Sequence[Resident], fits: Callable[[], bool]) -> list[Resident]:
    """Those without whose leaving it does not fit; the dearest are spared first."""
    for victim in victims:
        room.give(victim.request, victim.allocation)
    left = []
    for victim in sorted(victims, key=lambda one: one.order, reverse=True):
        room.take(victim.request, victim.allocation)
        if not fits():
            room.give(victim.request, victim.allocation)
            left.append(victim)
    for victim in left:
        room.take(victim.request, victim.allocation)
    return sorted(left, key=lambda one: one.order)
