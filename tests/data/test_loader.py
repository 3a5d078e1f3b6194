from __future__ import annotations

import gc
import threading
import time
from itertools import islice, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelyard.data.loader import LoadedBatch, Loader, LoaderState
from modelyard.errors import ConfigError, DataError


class Numbers:
    """A split whose row `i` is `[i, i + 1]`; breaks when a row in `broken` is read."""

    def __init__(self, num_rows: int, broken: frozenset[int] = frozenset()) -> None:
        self.num_rows = num_rows
        self.broken = broken
        self.reads = 0

    def read(self, row_ids: np.ndarray) -> dict[str, np.ndarray]:
        self.reads += 1
        if self.broken & set(row_ids.tolist()):
            raise DataError("shard 'x.arrow' cannot be read")
        return {"input_ids": np.stack([row_ids, row_ids + 1], axis=1)}


def load(num_rows: int, batch: int, start: int, stop: int, state: LoaderState, prefetch: int = 2) -> Loader:
    return Loader(
        Numbers(num_rows),
        global_batch_size=batch,
        start=start,
        stop=stop,
        state=state,
        prefetch_batches=prefetch,
    )


def take(count: int, *arguments: int | LoaderState, prefetch: int = 2) -> list[LoadedBatch]:
    with load(*arguments, prefetch=prefetch) as loader:  # type: ignore[arg-type]
        return list(islice(loader, count))


def ids(batches: list[LoadedBatch]) -> list[int]:
    return [int(i) for batch in batches for i in batch.sample_ids]


def loader_threads() -> int:
    return sum(thread.name == "modelyard-loader" for thread in threading.enumerate())


sizes = st.integers(1, 60)


@given(sizes, sizes, st.integers(0, 2**63), st.data())
@settings(deadline=None, max_examples=60)
def test_any_workers_and_resume_points_give_the_undisturbed_samples(
    num_rows: int, batch: int, seed: int, data: st.DataObject
) -> None:
    """Stop anywhere, go on with another number of workers, again and again: the same stream of samples."""
    begin = LoaderState(seed, data.draw(st.integers(0, 3)), data.draw(st.integers(0, num_rows - 1)))
    steps = data.draw(st.integers(1, 25))
    undisturbed = take(steps, num_rows, batch, 0, batch, begin)
    seen: list[int] = []
    state, done = begin, 0
    while done < steps:
        leg = data.draw(st.integers(1, steps - done))
        cuts = sorted(data.draw(st.lists(st.integers(0, batch), max_size=4)))
        bounds = [0, *cuts, batch]
        workers = [
            take(leg, num_rows, batch, start, stop, state, prefetch=data.draw(st.integers(0, 3)))
            for start, stop in pairwise(bounds)
        ]
        for parts in zip(*workers, strict=True):
            assert len({part.state for part in parts}) == 1
            seen += [i for part in parts for i in part.sample_ids.tolist()]
        state, done = parts[0].state, done + leg
    assert seen == ids(undisturbed)
    assert state == undisturbed[-1].state


@given(sizes, sizes, st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_each_epoch_sees_each_row_once(num_rows: int, batch: int, seed: int) -> None:
    stream = ids(take(-(-3 * num_rows // batch), num_rows, batch, 0, batch, LoaderState(seed)))
    for epoch in range(3):
        rows = [i - epoch * num_rows for i in stream[epoch * num_rows : (epoch + 1) * num_rows]]
        assert sorted(rows) == list(range(num_rows))


def test_the_rows_are_those_of_the_sample_ids() -> None:
    for batch in take(300, 11, 4, 1, 3, LoaderState(seed=9)):
        rows = batch.sample_ids % 11
        assert np.array_equal(batch.rows["input_ids"], np.stack([rows, rows + 1], axis=1))


def test_a_kept_batch_is_not_written_over_later() -> None:
    with load(1000, 8, 0, 8, LoaderState(3)) as loader:
        first = next(loader)
        before = first.rows["input_ids"].copy()
        list(islice(loader, 600))
        assert np.array_equal(first.rows["input_ids"], before)


def test_state_counts_global_samples_and_turns_over_epochs() -> None:
    assert LoaderState(1, 0, 5).advance(2, 10) == LoaderState(1, 0, 7)
    assert LoaderState(1, 2, 5).advance(5, 10) == LoaderState(1, 3, 0)
    assert LoaderState(1, 0, 0).advance(25, 10) == LoaderState(1, 2, 5)


def test_an_error_of_the_reading_thread_surfaces_after_the_good_batches() -> None:
    order = ids(take(40, 40, 1, 0, 1, LoaderState(0)))
    split = Numbers(40, broken=frozenset({order[20]}))
    with Loader(split, global_batch_size=1, start=0, stop=1, state=LoaderState(0)) as loader:
        with pytest.raises(DataError, match=r"x\.arrow"):
            list(islice(loader, 40))
        with pytest.raises(DataError):
            next(loader)


def test_closing_early_ends_the_thread_at_once() -> None:
    before = loader_threads()
    began = time.monotonic()
    loader = load(1000, 8, 0, 8, LoaderState(0))
    next(loader)
    assert loader_threads() == before + 1
    loader.close()
    loader.close()
    assert loader_threads() == before
    assert time.monotonic() - began < 5
    assert list(loader) == []


def test_a_forgotten_loader_leaves_no_thread() -> None:
    before = loader_threads()
    loader = load(1000, 8, 0, 8, LoaderState(0))
    next(loader)
    del loader
    gc.collect()
    deadline = time.monotonic() + 5
    while loader_threads() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert loader_threads() == before


def test_closing_while_another_thread_waits_ends_its_iteration() -> None:
    class Slow(Numbers):
        def read(self, row_ids: np.ndarray) -> dict[str, np.ndarray]:
            time.sleep(0.3)
            return super().read(row_ids)

    loader = Loader(Slow(10), global_batch_size=2, start=0, stop=2, state=LoaderState(0))
    ended = threading.Event()
    consumer = threading.Thread(target=lambda: (list(loader), ended.set()))
    consumer.start()
    time.sleep(0.1)
    loader.close()
    assert ended.wait(5)


def test_reading_ahead_is_bounded() -> None:
    split = Numbers(10**6)
    with Loader(split, global_batch_size=8, start=0, stop=8, state=LoaderState(0)) as loader:
        next(loader)
        time.sleep(0.2)
        assert split.reads <= 4


@pytest.mark.parametrize(("start", "stop", "batch"), [(0, 9, 8), (-1, 4, 8), (5, 4, 8), (0, 0, 0)])
def test_a_slice_outside_the_batch_is_refused(start: int, stop: int, batch: int) -> None:
    with pytest.raises(ConfigError, match="not within a global batch"):
        load(10, batch, start, stop, LoaderState(0))


def test_a_state_of_another_dataset_is_refused() -> None:
    with pytest.raises(ConfigError, match="10 rows"):
        load(10, 4, 0, 4, LoaderState(0, 0, 10))
