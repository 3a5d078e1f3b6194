"""The one place where a preparation meets Ray Data: parts go to workers, tables come back in order."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from modelyard import cluster, errors
from modelyard.artifacts.filesystem import translate_errors
from modelyard.data import sources
from modelyard.data.cleaning import Verdict
from modelyard.data.sources import Part
from modelyard.errors import DataError, ModelyardError

Item = tuple[int, Verdict, Any]
"""Id, verdict, content (a text or a `Picture`; for `FAILED` the reason)."""

_PLACE_BITS = 32
_MAX_ITEMS, _MAX_ITEM_BYTES = 1024, 4 << 20
_BLOCKS_PER_CPU = 4
_CREDENTIALS = "AWS_"
_LOG_LEVELS = {"ray.data": logging.WARNING, "ray.data._internal.progress": logging.ERROR}
"""Plans and timings go to Ray's own log files; the second warns of progress bars that were switched off here."""
_ENV_PRELOAD = "RAY_preload_python_modules"


@contextlib.contextmanager
def ray_data() -> Iterator[Any]:
    """Ray Data, connected, quiet and keeping order; its settings are put back afterwards."""
    _connect()
    import ray.data

    context = ray.data.DataContext.get_current()
    order, bars = context.execution_options.preserve_order, context.enable_progress_bars
    logs = {logging.getLogger(name): level for name, level in _LOG_LEVELS.items()}
    levels = {log: log.level for log in logs}
    context.execution_options.preserve_order, context.enable_progress_bars = True, False
    for log, level in logs.items():
        log.setLevel(level)
    try:
        yield ray.data
    finally:
        context.execution_options.preserve_order, context.enable_progress_bars = order, bars
        for log, level in levels.items():
            log.setLevel(level)


def read_parts(
    data: Any, parts: Sequence[Part], to_tables: Callable[..., Iterator[Any]], num_blocks: int | None
) -> Any:
    """A materialized Ray dataset of what `to_tables` makes of the parts, in the order of the parts.

    Args:
        data: what `ray_data` gave.
        parts: the parts of the source.
        to_tables: a picklable function from an iterator of numbered parts to Arrow tables; runs on the workers.
        num_blocks: number of parallel pieces; chosen by the cluster's CPUs when None. Never changes the result.
    """
    import ray

    cpus = int(ray.cluster_resources().get("CPU", 1))
    rows = [{"index": index, **part._asdict()} for index, part in enumerate(parts)]
    blocks = min(len(rows), num_blocks or max(8, _BLOCKS_PER_CPU * cpus))
    task = partial(_run_part, to_tables=to_tables, environment=_credentials(parts))
    dataset = data.from_items(rows, override_num_blocks=blocks)
    return dataset.map_batches(task, batch_size=None, batch_format="pyarrow").materialize()


def tables(dataset: Any, columns: Sequence[str] | None = None) -> Iterator[Any]:
    """The Arrow tables of a Ray dataset in order, empty ones left out; only `columns` travel here."""
    chosen = dataset if columns is None else dataset.select_columns(list(columns))
    for table in chosen.iter_batches(batch_size=None, batch_format="pyarrow"):
        if table.num_rows:
            yield table


def number_items(parts: Iterable[tuple[int, Part]], read: Callable[[Part], Iterator[Any]]) -> Iterator[Item]:
    """Read parts one after the other and number what they hold; an error becomes one FAILED item.

    Errors travel as data, so that the driver raises the very error, whatever a cluster does to exceptions.
    """
    for index, part in parts:
        place = -1
        try:
            with translate_errors(part.uri):
                for place, content in enumerate(read(part)):
                    yield (index << _PLACE_BITS) + place, Verdict.KEPT, content
        except ModelyardError as error:
            reason = "\n".join([type(error).__name__, error.todo, error.problem])
            yield (index << _PLACE_BITS) + place + 1, Verdict.FAILED, reason
            return


def in_batches(items: Iterable[Item], size_of: Callable[[Any], int]) -> Iterator[list[Item]]:
    """Consecutive items in lists of bounded count and size, so that a worker's memory is bounded."""
    batch: list[Item] = []
    size = 0
    for item in items:
        batch.append(item)
        size += size_of(item[2])
        if len(batch) >= _MAX_ITEMS or size >= _MAX_ITEM_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def heads(batch: Sequence[Item], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """The columns every table has: id, verdict, and the reason of a failure."""
    reasons = [content if verdict is Verdict.FAILED else "" for _, verdict, content in batch]
    return {
        "id": pa.array([identity for identity, _, _ in batch], pa.int64()),
        "verdict": pa.array([int(verdict) for verdict in verdicts], pa.uint8()),
        "reason": pa.array(reasons, pa.string()),
    }


def raise_failure(reason: str) -> None:
    """Raise the error that a FAILED item carries.

    Raises:
        ModelyardError: always, of the type it had on the worker.
    """
    kind, todo, problem = reason.split("\n", 2)
    error = getattr(errors, kind, DataError)
    raise error(problem, todo)


def fixed_lists(values: npt.NDArray[Any]) -> Any:
    """A (n, k) array as an Arrow FixedSizeList column."""
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(values).reshape(-1)), values.shape[1])


def from_fixed_lists(column: Any) -> npt.NDArray[Any]:
    """The (n, k) array of an Arrow FixedSizeList column."""
    joined = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    flat: npt.NDArray[Any] = joined.flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(len(joined), -1)


def _connect() -> None:
    """Join or start a cluster; one started here gets idle workers that know this work, not training's modules."""
    import ray

    if ray.is_initialized() or _ENV_PRELOAD in os.environ:
        cluster.connect()
        return
    os.environ[_ENV_PRELOAD] = "ray.data,pyarrow.parquet,modelyard.data.execution"
    try:
        cluster.connect()
    finally:
        del os.environ[_ENV_PRELOAD]


def _run_part(block: Any, *, to_tables: Callable[..., Iterator[Any]], environment: Mapping[str, str]) -> Iterator[Any]:
    os.environ.update(environment)
    sources.load_all()
    rows = block.to_pylist()
    numbered = [(row["index"], Part(row["uri"], row["start"], row["stop"])) for row in rows]
    yield from to_tables(iter(numbered))


def _credentials(parts: Sequence[Part]) -> dict[str, str]:
    """The driver's access to an object store, for the workers; empty for local files."""
    if not any("://" in part.uri for part in parts):
        return {}
    return {name: value for name, value in os.environ.items() if name.startswith(_CREDENTIALS)}
