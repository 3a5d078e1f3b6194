"""Where a worker's rows come from: its slice of every global batch in turn, or any part that it has claimed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import numpy as np

from modelyard.data.loader import Loader, LoaderState, Rowed, Rows
from modelyard.data.order import Int64Array, SampleOrder
from modelyard.training.batching import RankPlan


class PartRows(NamedTuple):
    """The rows of one part of a global batch."""

    columns: Rows
    sample_ids: Int64Array


class RowSource(Protocol):
    """Gives the rows of parts, whose global batches come in order."""

    def read(self, state: LoaderState, part: RankPlan) -> PartRows:
        """The rows of `part` of the global batch that starts at `state`."""


class _Slices:
    """The same slice of every global batch, read ahead by a thread."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def read(self, state: LoaderState, part: RankPlan) -> PartRows:
        loaded = next(self._loader)
        return PartRows(loaded.rows, loaded.sample_ids)


class _AnyPart:
    """Any part, read when it is asked for: which one comes next is not known."""

    def __init__(self, split: Rowed, seed: int) -> None:
        self._split, self._order = split, SampleOrder(split.num_rows, seed)

    def read(self, state: LoaderState, part: RankPlan) -> PartRows:
        first = state.epoch * self._order.num_rows + state.position
        ids = self._order.sample_ids(first + np.arange(part.start, part.stop, dtype=np.int64))
        return PartRows(self._split.read(ids % self._order.num_rows), ids)


@contextmanager
def row_source(
    split: Rowed, state: LoaderState, own: RankPlan, *, global_batch_size: int, is_claiming: bool
) -> Iterator[RowSource]:
    """Rows from `state` on: of part `own` of every batch, or with `is_claiming` of whichever part is asked for."""
    if is_claiming:
        yield _AnyPart(split, state.seed)
        return
    with Loader(split, global_batch_size=global_batch_size, start=own.start, stop=own.stop, state=state) as loader:
        yield _Slices(loader)
