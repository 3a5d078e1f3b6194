"""Cutting a global batch: nothing lost, nothing twice, and DeepSpeed's mean is the mean over rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelyard.training.batching import RankPlan, plan


@st.composite
def cuts(draw: st.DrawFn) -> tuple[int, int, list[RankPlan]]:
    """(global batch size, micro-batch size, the plans of all workers)."""
    size = draw(st.integers(1, 120))
    micro = draw(st.integers(1, 40))
    workers = draw(st.integers(1, min(size, 17)))
    return size, micro, [plan(size, micro, workers, rank) for rank in range(workers)]


def rows_of(part: RankPlan) -> list[int]:
    return [row for start, stop in part.micro_batches for row in range(part.start + start, part.start + stop)]


@settings(deadline=None)
@given(cuts())
def test_every_row_is_computed_once_and_in_order(cut: tuple[int, int, list[RankPlan]]) -> None:
    size, _, parts = cut
    assert [row for part in parts for row in rows_of(part)] == list(range(size))
    assert all(part.micro_batches[-1][1] == part.stop - part.start for part in parts)


@settings(deadline=None)
@given(cuts())
def test_all_workers_run_equally_many_micro_batches_of_bounded_size(cut: tuple[int, int, list[RankPlan]]) -> None:
    _, micro, parts = cut
    assert len({len(part.micro_batches) for part in parts}) == 1
    assert all(0 <= stop - start <= micro for part in parts for start, stop in part.micro_batches)
    sizes = [part.stop - part.start for part in parts]
    assert max(sizes) - min(sizes) <= 1


@settings(deadline=None)
@given(cuts())
def test_no_more_micro_batches_are_run_than_the_fullest_worker_needs(cut: tuple[int, int, list[RankPlan]]) -> None:
    _, micro, parts = cut
    assert len(parts[0].micro_batches) == -(-max(part.stop - part.start for part in parts) // micro)


@settings(deadline=None)
@given(cuts(), st.integers(0, 1000))
def test_deepspeeds_mean_of_scaled_losses_is_the_mean_over_the_rows(
    cut: tuple[int, int, list[RankPlan]], seed: int
) -> None:
    size, _, parts = cut
    losses = np.random.default_rng(seed).normal(size=size)
    worker_means = []
    for part in parts:  # DeepSpeed divides each backward pass by their number, then averages over workers
        scaled = [losses[part.start + a : part.start + b].sum() * part.loss_scale for a, b in part.micro_batches]
        worker_means.append(sum(loss / len(scaled) for loss in scaled))
    assert np.mean(worker_means) == pytest.approx(losses.mean(), abs=1e-12)


def test_a_worker_with_fewer_rows_ends_with_an_empty_micro_batch() -> None:
    assert plan(3, 1, 2, 0).micro_batches == ((0, 1), (1, 2))
    assert plan(3, 1, 2, 1).micro_batches == ((0, 1), (1, 1))


@pytest.mark.parametrize(("size", "workers", "rank"), [(2, 3, 0), (4, 2, 2), (4, 2, -1)])
def test_a_cut_that_cannot_be_is_refused_with_its_numbers(size: int, workers: int, rank: int) -> None:
    with pytest.raises(ValueError, match=f"rank {rank} of {workers} workers cannot share {size} rows"):
        plan(size, 1, workers, rank)
