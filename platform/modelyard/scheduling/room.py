"""What is free on each node while a decision is made, indexed so that a gang finds its place without scanning nodes.

Amounts are integers in Ray's own unit of 0.0001, so nothing drifts. A worker's GPUs are rounded up to whole ones: two
workers never share a GPU. `Room` hands out nodes through one view per worker shape and pool; a view catches up with
the nodes that changed since it was last asked.
"""

from __future__ import annotations

import functools
import math
from bisect import bisect_left, insort
from collections.abc import Collection, Iterable, Mapping, Sequence

from modelyard.cluster import Node
from modelyard.scheduling.model import TOPOLOGY_LABELS, Allocation, Request

UNIT = 10_000
"""Parts of one CPU, one GPU or one byte that are counted."""

Demand = tuple[tuple[str, int], ...]
"""What one worker takes, in units, by resource name."""


def demand(request: Request) -> Demand:
    """What one worker of the request takes from a node; GPUs are whole."""
    return _demand(tuple(request.resources.items()))


class Bin:
    """Nodes of one domain by how many workers of one shape each still holds."""

    __slots__ = ("capacity", "levels")

    def __init__(self) -> None:
        self.capacity = 0
        """Workers that fit on all its nodes together."""
        self.levels: dict[int, list[int]] = {}

    def add(self, node: int, fits: int) -> None:
        """Count a node in."""
        if fits:
            self.capacity += fits
            insort(self.levels.setdefault(fits, []), node)

    def remove(self, node: int, fits: int) -> None:
        """Count a node out that was added with `fits`."""
        if fits:
            self.capacity -= fits
            members = self.levels[fits]
            members.pop(bisect_left(members, node))
            if not members:
                del self.levels[fits]

    def num_nodes(self, workers: int) -> int:
        """Fewest nodes that hold `workers`, which must fit."""
        used = 0
        for level in sorted(self.levels, reverse=True):
            needed = -(-workers // level)
            if needed <= len(self.levels[level]):
                return used + needed
            used += len(self.levels[level])
            workers -= level * len(self.levels[level])
        return used

    def pour(self, workers: int) -> dict[int, int]:
        """Put `workers`, which must fit, on the fewest nodes; the last one is the tightest that holds the rest."""
        found: dict[int, int] = {}
        for level in sorted(self.levels, reverse=True):
            for node in self.levels[level]:
                if workers <= level:
                    tightest = min(size for size in self.levels if size >= workers)
                    found[node if tightest == level else self.levels[tightest][0]] = workers
                    return found
                found[node] = level
                workers -= level
        return found

    def without(self, nodes: Collection[int], fits: Mapping[int, int]) -> Bin:
        """The same bin less some nodes."""
        rest = Bin()
        rest.capacity = self.capacity - sum(fits[node] for node in nodes)
        for level, members in self.levels.items():
            if left := [node for node in members if node not in nodes]:
                rest.levels[level] = left
        return rest


class View:
    """One pool as one worker shape sees it."""

    def __init__(self, wanted: Demand, members: Iterable[int], room: Room) -> None:
        self.wanted = wanted
        self.fits = dict.fromkeys(members, 0)
        """Node to workers that fit there now."""
        self.whole = Bin()
        """All nodes of the pool."""
        self.domains: tuple[dict[str, Bin], ...] = tuple({} for _ in TOPOLOGY_LABELS)
        """For each of `TOPOLOGY_LABELS`, its values and their nodes in this pool."""
        self._seen = 0
        self._update(room, self.fits)
        self._seen = len(room.log)

    def catch_up(self, room: Room) -> None:
        """Take over what changed since the last call."""
        if self._seen < len(room.log):
            self._update(room, sorted(set(room.log[self._seen :]) & self.fits.keys()))
            self._seen = len(room.log)

    def node(self, workers: int) -> int | None:
        """The tightest node that holds all workers."""
        enough = [level for level in self.whole.levels if level >= workers]
        return self.whole.levels[min(enough)][0] if enough else None

    def gang(self, workers: int) -> dict[int, int] | None:
        """Nodes for a gang in the smallest domain that holds it, there on the fewest nodes, then the tightest."""
        if self.whole.capacity < workers:
            return None
        if (node := self.node(workers)) is not None:
            return {node: workers}
        for bins in self.domains:
            holding = [
                (found.num_nodes(workers), found.capacity, name)
                for name, found in bins.items()
                if found.capacity >= workers
            ]
            if holding:
                return bins[min(holding)[2]].pour(workers)
        return self.whole.pour(workers)

    def near(self, workers: int, kept: Sequence[int], room: Room) -> dict[int, int] | None:
        """More nodes for a gang that stays on `kept`: in their rack, else their zone, else the pool."""
        held = set(kept)
        for label, bins in enumerate(self.domains):
            for name in sorted({room.domains[node][label] for node in kept} & bins.keys()):
                inside = {node for node in held if room.domains[node][label] == name}
                rest = bins[name].without(inside, self.fits)
                if rest.capacity >= workers:
                    return rest.pour(workers)
        rest = self.whole.without(held, self.fits)
        return rest.pour(workers) if rest.capacity >= workers else None

    def _update(self, room: Room, nodes: Iterable[int]) -> None:
        known: dict[int, list[Bin]] = {}
        for node in nodes:
            before, after = self.fits[node], copies(room.free[node], self.wanted)
            if before == after:
                continue
            bins = known.setdefault(node, [self.whole])
            for label, name in enumerate(room.domains[node]):
                if name:
                    bins.append(self.domains[label].setdefault(name, Bin()))
            for one in bins:
                one.remove(node, before)
                one.add(node, after)
            self.fits[node] = after


class Room:
    """Free resources per usable node, for one decision; `take` and `give` cost no more than the nodes they name."""

    def __init__(self, pools: Mapping[str, Sequence[Node]]) -> None:
        """Start with all of `pools` (as `Snapshot.pools` gives them) free."""
        nodes = sorted(((node, pool) for pool, members in pools.items() for node in members), key=_by_id)
        self.ids = tuple(node.node_id for node, _ in nodes)
        """Node ids in the order of the inner numbers."""
        self.index = {node_id: number for number, node_id in enumerate(self.ids)}
        self.free: list[dict[str, int]] = [
            {name: round(amount * UNIT) for name, amount in node.total.items()} for node, _ in nodes
        ]
        self.domains = [tuple(node.labels.get(label, "") for label in TOPOLOGY_LABELS) for node, _ in nodes]
        self.pool_names = [pool for _, pool in nodes]
        self.members: dict[str, list[int]] = {pool: [] for pool in sorted(pools)}
        for number, pool in enumerate(self.pool_names):
            self.members[pool].append(number)
        self.log: list[int] = []
        """Nodes in the order in which they changed."""
        self._views: dict[tuple[Demand, str], View] = {}

    def copy(self) -> Room:
        """An independent room with the same amounts."""
        other = Room.__new__(Room)
        other.ids, other.index, other.domains = self.ids, self.index, self.domains
        other.pool_names, other.members = self.pool_names, self.members
        other.free = [dict(amounts) for amounts in self.free]
        other.log, other._views = [], {}
        return other

    def lower(self, other: Room, nodes: Iterable[str] | None = None) -> None:
        """Leave no more free than `other` has, on the named nodes or on all."""
        for number in range(len(self.ids)) if nodes is None else [self.index[node] for node in nodes]:
            theirs = other.free[number]
            mine = {name: min(amount, theirs.get(name, 0)) for name, amount in self.free[number].items()}
            if mine != self.free[number]:
                self.free[number] = mine
                self.log.append(number)

    def close(self, node_id: str) -> None:
        """Leave nothing free on a node."""
        self.free[self.index[node_id]] = {}
        self.log.append(self.index[node_id])

    def take(self, request: Request, allocation: Allocation) -> None:
        """Hand out what the allocation needs; it must fit."""
        self._change(request, allocation, -1)

    def give(self, request: Request, allocation: Allocation) -> None:
        """Take back what the allocation held."""
        self._change(request, allocation, 1)

    def fits(self, request: Request, node_id: str) -> int:
        """Workers of the request that fit on one node; 0 where it is not usable."""
        number = self.index.get(node_id)
        return 0 if number is None else copies(self.free[number], demand(request))

    def holds(self, request: Request, allocation: Allocation) -> bool:
        """Whether the whole allocation fits now."""
        return all(self.fits(request, node) >= count for node, count in allocation.items())

    def pool(self, node_id: str) -> str | None:
        """The pool of a usable node; None for any other."""
        number = self.index.get(node_id)
        return None if number is None else self.pool_names[number]

    def view(self, request: Request, pool: str) -> View:
        """The pool as the request's workers see it, up to date."""
        wanted = demand(request)
        found = self._views.get((wanted, pool))
        if found is None:
            found = self._views[wanted, pool] = View(wanted, self.members.get(pool, ()), self)
        found.catch_up(self)
        return found

    def capacity(self, request: Request, pool: str) -> int:
        """Workers of the request that fit into a pool, spread over any nodes."""
        return self.view(request, pool).whole.capacity

    def named(self, numbers: Mapping[int, int]) -> dict[str, int]:
        """An allocation by node ids, in their order."""
        return {self.ids[number]: numbers[number] for number in sorted(numbers)}

    def _change(self, request: Request, allocation: Allocation, sign: int) -> None:
        for node_id, count in allocation.items():
            number = self.index[node_id]
            amounts = self.free[number]
            for name, units in demand(request):
                left = amounts.get(name, 0) + sign * units * count
                if left < 0:
                    raise AssertionError(f"{count} workers of {request.job_id!r} do not fit on {node_id}: {name}")
                amounts[name] = left
            self.log.append(number)


def copies(amounts: Mapping[str, int], wanted: Demand) -> int:
    """How many workers of one shape fit into amounts."""
    return max(min(amounts.get(name, 0) // units for name, units in wanted), 0)


@functools.lru_cache(maxsize=8192)
def _demand(resources: tuple[tuple[str, float], ...]) -> Demand:
    whole = ((name, math.ceil(amount - 1e-9) if name == "GPU" else amount) for name, amount in resources)
    return tuple(sorted((name, max(round(amount * UNIT), 1)) for name, amount in whole if amount > 0))


def _by_id(pair: tuple[Node, str]) -> str:
    return pair[0].node_id
