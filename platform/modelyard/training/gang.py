"""A worker's view of its gang: who it is, and the few small collectives that training needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


@dataclass(frozen=True)
class Gang:
    """One worker among its peers. All methods are collective: every worker calls them in the same order."""

    rank: int
    num_workers: int
    device: torch.device
    node_id: str = ""
    """Ray's id of the node. Nodes are told apart by it, not by address, as `local_rank` would."""

    @property
    def is_main(self) -> bool:
        """Whether this is worker 0, which logs, commits and saves."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Element-wise sum over all workers, in float64."""
        if self.num_workers == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        summed: list[float] = total.tolist()
        return summed

    def from_main(self, value: T) -> T:
        """Worker 0's value, on every worker."""
        box = [value]
        if self.num_workers > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Every worker's value, by rank."""
        if self.num_workers == 1:
            return [value]
        values: list[Any] = [None] * self.num_workers
        dist.all_gather_object(values, value)
        return values

    def once_per_node(self, action: Callable[[], T]) -> T:
        """Run `action` on the first worker of each node; its result, on every worker of that node."""
        leaders: dict[str, int] = {}
        for rank, node_id in enumerate(self.gather(self.node_id)):
            leaders.setdefault(node_id, rank)
        leader = leaders[self.node_id]
        results = self.gather(action() if leader == self.rank else None)
        return results[leader]  # type: ignore[return-value]

    def barrier(self) -> None:
        """Wait for all workers."""
        self.sum([0.0])
