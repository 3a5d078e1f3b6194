"""Measuring on held-out rows: each row once, whatever the number of workers and the batch size."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from modelyard.training.gang import Gang
from modelyard.training.validation import improves, validate


class Numbers:
    """A split whose row `i` holds `i`."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows

    def read(self, row_ids: np.ndarray) -> dict[str, np.ndarray]:
        return {"x": row_ids}


class Rows:
    """A task whose metrics are the rows themselves."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def collate(self, rows: dict[str, np.ndarray], device: Any) -> dict[str, torch.Tensor]:
        return {"x": torch.from_numpy(rows["x"])}

    def statistics(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        assert not model.training
        assert not torch.is_grad_enabled()
        self.batches.append(len(batch["x"]))
        return {"row": model(batch["x"])}

    def metrics(self, stats: dict[str, np.ndarray]) -> dict[str, Any]:
        return {"rows": sorted(stats["row"].tolist())}


class Recorder(Gang):
    """One of several workers, alone: what it gathers is what it has."""

    def gather(self, value: Any) -> list[Any]:
        return [value]


def measure(num_rows: int, gang: Gang, **options: Any) -> tuple[list[int], list[int]]:
    """(rows that were counted, sizes of the batches that were run)."""
    task = Rows()
    metrics: dict[str, Any] = validate(task, torch.nn.Identity(), Numbers(num_rows), gang, **options)  # type: ignore[arg-type]
    return metrics["rows"], task.batches


ALONE = Gang(rank=0, num_workers=1, device=torch.device("cpu"))


@pytest.mark.parametrize("batch_size", [1, 3, 10, 50])
def test_every_row_counts_once(batch_size: int) -> None:
    assert measure(10, ALONE, batch_size=batch_size)[0] == list(range(10))


def test_only_the_first_rows_count_when_they_are_limited() -> None:
    assert measure(10, ALONE, batch_size=3, max_rows=4)[0] == [0, 1, 2, 3]
    assert measure(10, ALONE, batch_size=3, max_rows=99)[0] == list(range(10))


@pytest.mark.parametrize(("num_rows", "workers"), [(7, 2), (9, 4), (5, 3), (8, 4)])
def test_workers_share_the_rows_and_run_equally_many_batches(num_rows: int, workers: int) -> None:
    measured = [
        measure(num_rows, Recorder(rank=rank, num_workers=workers, device=ALONE.device), batch_size=2)
        for rank in range(workers)
    ]
    assert sorted(row for rows, _ in measured for row in rows) == list(range(num_rows))
    assert len({len(batches) for _, batches in measured}) == 1


def test_a_model_in_training_is_in_training_again_afterwards() -> None:
    model = torch.nn.Identity().train()
    validate(Rows(), model, Numbers(3), ALONE, batch_size=2)  # type: ignore[arg-type]
    assert model.training


@pytest.mark.parametrize(
    ("value", "best", "direction", "better"),
    [
        (1.0, None, "min", True),
        (1.0, 2.0, "min", True),
        (2.0, 2.0, "min", False),
        (3.0, 2.0, "min", False),
        (3.0, 2.0, "max", True),
        (2.0, 2.0, "max", False),
        (float("nan"), None, "min", False),
        (float("inf"), None, "max", False),
        (float("-inf"), 2.0, "min", False),
    ],
)
def test_only_a_strictly_better_finite_value_improves(
    value: float, best: float | None, direction: str, better: bool
) -> None:
    assert improves(value, best, direction) is better
