"""How one global batch is cut among workers. Pure: the same for every worker, whatever their number."""

from __future__ import annotations

import itertools
from dataclasses import dataclass


@dataclass(frozen=True)
class RankPlan:
    """One worker's part of every global batch."""

    start: int
    """First row of the part within the global batch."""
    stop: int
    """One past the last row."""
    micro_batches: tuple[tuple[int, int], ...]
    """(start, stop) within the part. Every worker has equally many, so that collectives match; a worker with
    fewer rows ends with empty ones, which it runs on a repeated row of weight 0."""
    loss_scale: float
    """Factor on a summed row loss that makes DeepSpeed's mean over workers and micro-batches equal the mean over
    the rows of the global batch."""


def plan(global_batch_size: int, micro_batch_size: int, num_workers: int, rank: int) -> RankPlan:
    """Cut `global_batch_size` rows among `num_workers`, in contiguous parts that differ by at most one row."""
    if not 0 <= rank < num_workers <= global_batch_size:
        raise ValueError(f"rank {rank} of {num_workers} workers cannot share {global_batch_size} rows")
    size, extra = divmod(global_batch_size, num_workers)
    start = rank * size + min(rank, extra)
    rows = size + (rank < extra)
    largest = size + (extra > 0)
    count = -(-largest // micro_batch_size)
    micro, remainder = divmod(rows, count)
    cuts = [0]
    for index in range(count):
        cuts.append(cuts[-1] + micro + (index < remainder))
    pairs = tuple(itertools.pairwise(cuts))
    return RankPlan(start, start + rows, pairs, loss_scale=num_workers * count / global_batch_size)
