"""Measuring a model on held-out rows with all workers."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch

from modelyard.data.dataset import Split
from modelyard.tasks.base import Task
from modelyard.tasks.slices import cut
from modelyard.training.gang import Gang
from modelyard.training.parallel import from_groups
from modelyard.training.pipeline import StagedModel


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
    mine = np.arange(gang.data_rank, count, gang.data_size, dtype=np.int64)
    most = math.ceil(count / gang.data_size)
    num_batches = math.ceil(most / batch_size)
    was_training = model.training
    model.eval()
    collected: list[dict[str, np.ndarray]] = []
    with torch.no_grad():
        for index in range(num_batches):
            ids = mine[index * batch_size : (index + 1) * batch_size]
            rows = split.read(ids if len(ids) else np.zeros(1, dtype=np.int64))
            batch = cut(task.collate(rows, gang.device), gang.slice, gang.parallel.sequence)
            if isinstance(model, StagedModel):
                statistics = model.statistics(task, batch)
            else:
                statistics = task.statistics(model, batch)
            if len(ids):
                collected.append({name: value.cpu().numpy() for name, value in statistics.items()})
    model.train(was_training)
    parts = from_groups(gang.gather(collected), gang.parallel, _added)
    return task.metrics({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})


def _added(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Statistics of rows from those of two parts of each row."""
    return {name: values + other[name] for name, values in one.items()}


def improves(value: float, best: float | None, direction: str) -> bool:
    """Whether `value` is strictly better than `best`; anything finite beats nothing."""
    if not np.isfinite(value):
        return False
    if best is None:
        return True
    return value < best if direction == "min" else value > best
