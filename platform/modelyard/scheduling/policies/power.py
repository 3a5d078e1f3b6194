"""Watts that jobs draw beyond the idle cluster, while a decision is made."""

from __future__ import annotations

import math

from modelyard.scheduling.model import Allocation, Request, Snapshot, pool_of
from modelyard.scheduling.quota import SLACK
from modelyard.scheduling.room import UNIT, demand


class Watts:
    """What is left of a snapshot's `power_cap_watts`; without a cap there is no end to it.

    All accelerators of usable nodes idle at least; each that a job holds draws what it takes beyond that.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        """Start with all accelerators idle."""
        self._snapshot = snapshot
        self._extra: dict[str, float] = {}
        """Pool to watts of a busy accelerator beyond an idle one's."""
        self.left = math.inf
        """Below 0 when what runs already draws too much."""
        if snapshot.power_cap_watts is not None:
            self.left = snapshot.power_cap_watts
            for pool, nodes in snapshot.pools.items():
                if (power := snapshot.power.get(pool)) is not None:
                    self._extra[pool] = max(power.busy_watts - power.idle_watts, 0.0)
                    self.left -= power.idle_watts * sum(node.total.get("GPU", 0.0) for node in nodes)

    def of(self, request: Request, allocation: Allocation) -> float:
        """What an allocation draws."""
        if not self._extra:
            return 0.0
        return sum(
            self.each(request, pool_of(self._snapshot.node_by_id[node])) * count for node, count in allocation.items()
        )

    def each(self, request: Request, pool: str) -> float:
        """What one worker draws in a pool; one without accelerators draws nothing."""
        if not self._extra:
            return 0.0
        return self._extra.get(pool, 0.0) * dict(demand(request)).get("GPU", 0) / UNIT

    def charge(self, watts: float) -> None:
        """Hand out watts; negative ones come back."""
        self.left -= watts

    def allow(self, watts: float, beside: float = 0.0) -> bool:
        """Whether so much more is left, and `beside` besides; what draws nothing is always allowed."""
        return watts <= 0 or watts + beside <= self.left + SLACK

    def workers(self, request: Request, pool: str, beside: float = 0.0) -> int:
        """How many more workers the watts are enough for in a pool."""
        each = self.each(request, pool)
        return 1 << 30 if each <= 0 or math.isinf(self.left) else max(int((self.left - beside + SLACK) / each), 0)
