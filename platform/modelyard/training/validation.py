"""Measuring a model on held-out rows with all workers."""

from __future__ import annotations

import math

import numpy as np
import torch

from modelyard.data.dataset import Split
from modelyard.tasks.base import Task
from modelyard.training.gang import Gang


def validate(
    task: Task,
    model: torch.nn.Module,
    split: Split,
    gang: Gang,
    *,
    batch_size: int,
    max_rows: int | None = None,
) -> dict[str, float]:
    """Metrics of `task` over the first `max_rows` rows of `split`; equal on every worker. Collective.

    Rows are dealt in turn, and every worker runs equally many batches (ZeRO-3 needs that), a worker without rows
    on a repeated one that does not count.
    """
    count = min(split.num_rows, max_rows or split.num_rows)
    mine = np.arange(gang.rank, count, gang.num_workers, dtype=np.int64)
    most = math.ceil(count / gang.num_workers)
    num_batches = math.ceil(most / batch_size)
    was_training = model.training
    model.eval()
    collected: list[dict[str, np.ndarray]] = []
    with torch.no_grad():
        for index in range(num_batches):
            ids = mine[index * batch_size : (index + 1) * batch_size]
            rows = split.read(ids if len(ids) else np.zeros(1, dtype=np.int64))
            statistics = task.statistics(model, task.collate(rows, gang.device))
            if len(ids):
                collected.append({name: value.cpu().numpy() for name, value in statistics.items()})
    model.train(was_training)
    parts = [part for worker in gang.gather(collected) for part in worker]
    return task.metrics({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})


def improves(value: float, best: float | None, direction: str) -> bool:
    """Whether `value` is strictly better than `best`; anything finite beats nothing."""
    if not np.isfinite(value):
        return False
    if best is None:
        return True
    return value < best if direction == "min" else value > best
