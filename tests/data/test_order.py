from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelyard.data.order import SampleOrder
from modelyard.errors import DataError

seeds = st.integers(-(2**70), 2**70)
epochs = st.integers(0, 2**40)


def epoch_rows(num_rows: int, seed: int, epoch: int = 0) -> np.ndarray:
    return SampleOrder(num_rows, seed).rows(epoch, np.arange(num_rows))


@given(st.integers(1, 3000), seeds, epochs)
@settings(deadline=None)
def test_each_epoch_is_a_permutation_of_the_rows(num_rows: int, seed: int, epoch: int) -> None:
    assert np.array_equal(np.sort(epoch_rows(num_rows, seed, epoch)), np.arange(num_rows))


@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 5, 2**16 - 1, 2**16, 2**16 + 1, 2**17 + 3])
def test_sizes_beside_powers_of_two_are_permuted_too(num_rows: int) -> None:
    assert np.array_equal(np.sort(epoch_rows(num_rows, seed=7)), np.arange(num_rows))


@given(st.integers(1, 10**12), seeds, epochs, st.lists(st.integers(0, 10**12), min_size=1, max_size=20))
@settings(deadline=None)
def test_a_position_gives_the_same_row_alone_and_among_others(
    num_rows: int, seed: int, epoch: int, positions: list[int]
) -> None:
    order = SampleOrder(num_rows, seed)
    wanted = np.array(positions) % num_rows
    together = order.rows(epoch, wanted)
    alone = [int(order.rows(epoch, wanted[i : i + 1])[0]) for i in range(len(wanted))]
    assert together.tolist() == alone
    assert ((together >= 0) & (together < num_rows)).all()


def test_seed_and_epoch_each_change_the_order() -> None:
    first = epoch_rows(1000, seed=1)
    for other in (epoch_rows(1000, seed=2), epoch_rows(1000, seed=1, epoch=1), epoch_rows(1000, seed=-1)):
        assert (first == other).mean() < 0.02


def test_the_order_is_fixed_for_all_time() -> None:
    # A saved loader state is worthless if this ever changes: these values are part of the format.
    assert SampleOrder(10, 0).rows(0, np.arange(10)).tolist() == [1, 4, 8, 7, 3, 6, 2, 5, 0, 9]
    assert SampleOrder(10**9, 42).rows(3, np.array([0, 1, 10**9 - 1])).tolist() == [
        349844002,
        275403979,
        779046201,
    ]


def test_the_order_looks_random() -> None:
    # Rank correlation of a random permutation of 50,000 has a standard deviation of 0.0045: 6 of them here.
    rows = epoch_rows(50_000, seed=3)
    positions = np.arange(rows.size)
    assert abs(np.corrcoef(rows, positions)[0, 1]) < 0.027
    assert abs(np.corrcoef(rows[:-1], rows[1:])[0, 1]) < 0.027
    near = np.abs(np.diff(rows)) <= 256  # chance 2 * 256 / 50,000
    assert 0.0075 < near.mean() < 0.0130


def test_sample_ids_are_unique_over_epochs_and_name_their_row() -> None:
    order = SampleOrder(7, seed=5)
    ids = order.sample_ids(np.arange(21))
    assert np.array_equal(np.sort(ids), np.arange(21))
    assert np.array_equal(ids[7:14] % 7, order.rows(1, np.arange(7)))


def test_an_empty_split_has_no_order() -> None:
    with pytest.raises(DataError, match="0 rows"):
        SampleOrder(0, seed=1)
