"""A worker's view of its gang: who it is, and the few small collectives that training needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from modelyard.training.parallel import ALONE, Parallel

T = TypeVar("T")


@dataclass(frozen=True)
class Gang:
    """One worker among its peers. All methods are collective: every worker calls them in the same order."""

    rank: int
    num_workers: int
    device: torch.device
    node_id: str = ""
    """Ray's id of the node. Nodes are told apart by it, not by address, as `local_rank` would."""
    parallel: Parallel = ALONE
    """How the workers of one group share a model."""

    @property
    def is_main(self) -> bool:
        """Whether this is worker 0, which logs, commits and saves."""
        return self.rank == 0

    @property
    def part(self) -> int:
        """This worker's place in its model-parallel group, from 0."""
        return self.rank % self.parallel.size

    @property
    def slice(self) -> int:
        """Which slice of its rows' tokens this worker has, from 0."""
        return self.rank % self.parallel.sequence

    @property
    def data_rank(self) -> int:
        """The place of this worker's group among the groups, which have rows of their own."""
        return self.rank // self.parallel.size

    @property
    def data_size(self) -> int:
        """Number of groups."""
        return self.num_workers // self.parallel.size

    @property
    def share(self) -> float:
        """How much of a figure that this worker has measured is its own: its tensor-parallel group has the same."""
        return 1.0 / self.parallel.tensor

    @property
    def dropout_rank(self) -> int:
        """Workers of the same number draw the same random numbers: a tensor-parallel group computes the same rows."""
        return self.data_rank if self.parallel.tensor > 1 else self.rank

    def sum(self, values: Sequence[float]) -> list[float]:
        """Element-wise sum over all workers, in float64."""
        return self.begin_sum(values)()

    def begin_sum(self, values: Sequence[float]) -> Callable[[], list[float]]:
        """Like `sum`, without waiting for the others: the function that is returned does."""
        if self.num_workers == 1:
            return lambda: list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        work = dist.all_reduce(total, async_op=True)

        def summed() -> list[float]:
            work.wait()
            found: list[float] = total.tolist()
            return found

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
