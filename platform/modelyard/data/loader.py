"""The loader: the same global batches, whatever the number of workers, from any point on.

The stream of samples is endless and fixed by the seed (`order.SampleOrder`). Global batch `k` is its stretch
`[k * G, (k + 1) * G)`; a worker reads the slice `[start, stop)` of each. So the state is three integers,
stopping costs nothing, and a run may go on with any number of workers without a sample lost or seen twice.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Iterator
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import numpy.typing as npt

from modelyard.data.order import Int64Array, SampleOrder
from modelyard.errors import ConfigError, ModelyardError

_log = logging.getLogger(__name__)

Rows = dict[str, npt.NDArray[Any]]

_CHUNK_BYTES = 1 << 20
"""Batches are gathered together up to this size, so that small batches do not pay a thread switch each."""
_CHUNK_BATCHES = 256
_JOIN_TIMEOUT_S = 30.0


class Rowed(Protocol):
    """What the loader reads from: `data.dataset.Split`, or a stand-in of a test."""

    @property
    def num_rows(self) -> int:
        """Number of rows."""

    def read(self, row_ids: Int64Array) -> Rows:
        """The rows (n,) as columns (n, *shape)."""


class LoaderState(NamedTuple):
    """Where the global stream stands: all a run needs to go on exactly."""

    seed: int
    epoch: int = 0
    position: int = 0

    def advance(self, n: int, num_rows: int) -> LoaderState:
        """The state after `n` more samples of the global stream over `num_rows` rows."""
        epochs, position = divmod(self.position + n, num_rows)
        return LoaderState(self.seed, self.epoch + epochs, position)


class LoadedBatch(NamedTuple):
    """One worker's slice of one global batch."""

    rows: Rows
    """Columns (stop - start, *shape); views the caller may keep and write to."""
    sample_ids: Int64Array
    """Which samples these are (stop - start,): `epoch * num_rows + row`, unique in the whole run."""
    state: LoaderState
    """The state AFTER this global batch: start a loader from it to get the next one."""


class Loader(Iterator[LoadedBatch]):
    """Endless iterator over one worker's slice `[start, stop)` of every global batch.

    A background thread reads ahead at least `prefetch_batches` batches (0: no thread, read on demand); its
    errors surface in `next`. Use as a context manager, or call `close`. One thread may iterate.

    Raises:
        ConfigError: the slice is not within the batch, or the state does not belong to this split.
        DataError: the split is empty, or (from `next`) a shard cannot be read.
    """

    def __init__(
        self,
        split: Rowed,
        *,
        global_batch_size: int,
        start: int,
        stop: int,
        state: LoaderState,
        prefetch_batches: int = 2,
    ) -> None:
        if global_batch_size < 1 or not 0 <= start <= stop <= global_batch_size:
            raise ConfigError(
                f"the slice {start}..{stop} is not within a global batch of {global_batch_size} samples",
                "need 0 <= start <= stop <= global_batch_size, and at least one sample",
            )
        order = SampleOrder(split.num_rows, state.seed)
        if not 0 <= state.position < split.num_rows or state.epoch < 0:
            raise ConfigError(
                f"loader state {tuple(state)} is not of a split with {split.num_rows} rows",
                "resume with the dataset and split the state was saved with",
            )
        self._ready: deque[LoadedBatch] = deque()
        self._source = _chunks(split, order, global_batch_size, start, stop, state)
        self._ahead = _ReadAhead(self._source, prefetch_batches) if prefetch_batches > 0 else None
        self._closed = False

    def __next__(self) -> LoadedBatch:
        if not self._ready:
            if self._closed:
                raise StopIteration
            self._ready.extend(self._ahead.take() if self._ahead is not None else next(self._source))
        return self._ready.popleft()

    def close(self) -> None:
        """Stop reading ahead and wait for the thread; afterwards iteration ends. Safe to call twice."""
        self._closed = True
        self._ready.clear()
        if self._ahead is not None:
            self._ahead.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        ahead = getattr(self, "_ahead", None)
        if ahead is not None:
            ahead.ask_to_stop()  # a dropped loader leaves no thread behind; joining here could deadlock


def _chunks(
    split: Rowed, order: SampleOrder, batch: int, start: int, stop: int, state: LoaderState
) -> Iterator[list[LoadedBatch]]:
    """Lists of consecutive batches, each list gathered at once: first one batch, then up to the limit."""
    index = state.epoch * order.num_rows + state.position
    size, count = stop - start, 1
    within = np.arange(start, stop, dtype=np.int64)
    while True:
        firsts = index + batch * np.arange(count, dtype=np.int64)
        ids = order.sample_ids((firsts[:, None] + within).reshape(-1))
        columns = split.read(ids % order.num_rows)
        chunk = []
        for part in range(count):
            here = slice(part * size, (part + 1) * size)
            state = state.advance(batch, order.num_rows)
            chunk.append(LoadedBatch({name: column[here] for name, column in columns.items()}, ids[here], state))
        yield chunk
        index += batch * count
        chunk_bytes = max(1, sum(column.nbytes for column in columns.values()) // count)
        count = max(1, min(2 * count, _CHUNK_BATCHES, _CHUNK_BYTES // chunk_bytes))


class _ReadAhead:
    """A thread that keeps at least `num_batches` batches ready. Holds no reference to the loader."""

    def __init__(self, source: Iterator[list[LoadedBatch]], num_batches: int) -> None:
        self._source = source
        self._num_batches = num_batches
        self._chunks: deque[list[LoadedBatch]] = deque()
        self._batches = 0
        self._changed = threading.Condition()
        self._stopping = False
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="modelyard-loader", daemon=True)
        self._thread.start()

    def take(self) -> list[LoadedBatch]:
        """The next chunk; waits for the thread, and raises what stopped it."""
        with self._changed:
            while not self._chunks and self._error is None and not self._stopping:
                if not self._changed.wait(1.0) and not self._thread.is_alive():
                    raise ModelyardError("the loader's thread is gone without an error", "restart the run")
            if self._chunks:
                chunk = self._chunks.popleft()
                self._batches -= len(chunk)
                self._changed.notify_all()
                return chunk
            if self._error is not None:
                raise self._error
            raise StopIteration

    def ask_to_stop(self) -> None:
        """Tell the thread to end; returns at once."""
        with self._changed:
            self._stopping = True
            self._chunks.clear()
            self._changed.notify_all()

    def close(self) -> None:
        """End the thread and wait for it (it finishes the read it is in)."""
        self.ask_to_stop()
        if self._thread is not threading.current_thread():
            self._thread.join(_JOIN_TIMEOUT_S)
            if self._thread.is_alive():
                _log.warning("the loader's thread is still in a read after %.0f s; left behind", _JOIN_TIMEOUT_S)

    def _run(self) -> None:
        try:
            for chunk in self._source:
                with self._changed:
                    self._chunks.append(chunk)
                    self._batches += len(chunk)
                    self._changed.notify_all()
                    while self._batches >= self._num_batches and not self._stopping:
                        self._changed.wait(1.0)
                    if self._stopping:
                        return
        except Exception as error:  # noqa: BLE001 - whatever it is, the consumer must see it instead of waiting
            with self._changed:
                self._error = error
                self._changed.notify_all()
