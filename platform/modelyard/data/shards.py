"""Shards: Arrow IPC files of fixed-shape rows, written in order and read without a copy through a memory map.

A split `train` in three shards is `train-00000-of-00003.arrow` and so on; the total is in the name so that a
missing shard is noticed. A column is a FixedSizeList of plain numbers (or, for shape `()`, the numbers), so a
shard's column is one contiguous block of memory, and reading rows is one gather.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from modelyard.config import Config
from modelyard.errors import DataError

Rows = dict[str, npt.NDArray[Any]]

_NAME = re.compile(r"^(?P<split>[a-z][a-z0-9_]*)-(?P<index>\d{5})-of-(?P<total>\d{5})\.arrow$")


class Column(Config):
    """One column of a dataset: every row holds an array of this shape."""

    name: str
    """Name in the shards and in loaded batches."""
    dtype: str
    """numpy name of the numbers, e.g. `uint16`."""
    shape: tuple[int, ...] = ()
    """Shape of one row; `()` is a scalar."""

    @property
    def arrow_type(self) -> Any:
        """The Arrow type of the column."""
        number = pa.from_numpy_dtype(np.dtype(self.dtype))
        return pa.list_(number, math.prod(self.shape)) if self.shape else number


class ShardWriter:
    """Writes one split, rows by rows, as shards of `rows_per_shard` rows. The caller keeps the order.

    The bytes depend on the rows alone, not on how they were cut into `write` calls.
    """

    def __init__(self, folder: Path, split: str, columns: Sequence[Column], rows_per_shard: int) -> None:
        self._folder, self._split, self._columns = folder, split, tuple(columns)
        self._rows_per_shard = rows_per_shard
        self._pending: list[Rows] = []
        self._num_pending = 0
        self._parts: list[Path] = []
        self.num_rows = 0

    def write(self, rows: Rows) -> None:
        """Append rows: every column (n, *shape), already of its dtype."""
        count = len(next(iter(rows.values())))
        self._pending.append(rows)
        self._num_pending += count
        self.num_rows += count
        while self._num_pending >= self._rows_per_shard:
            self._flush(self._rows_per_shard)

    def close(self) -> None:
        """Write what is left and give the shards their final names."""
        if self._num_pending:
            self._flush(self._num_pending)
        for index, part in enumerate(self._parts):
            part.rename(self._folder / f"{self._split}-{index:05d}-of-{len(self._parts):05d}.arrow")

    def _flush(self, count: int) -> None:
        joined = {c.name: np.concatenate([rows[c.name] for rows in self._pending]) for c in self._columns}
        arrays = [_to_arrow(joined[c.name][:count], c) for c in self._columns]
        schema = pa.schema([pa.field(c.name, c.arrow_type, nullable=False) for c in self._columns])
        path = self._folder / f"{self._split}-{len(self._parts):05d}.part"
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            writer.write_batch(pa.record_batch(arrays, schema=schema))
        self._parts.append(path)
        self._pending = [{name: column[count:] for name, column in joined.items()}]
        self._num_pending -= count


class SplitWriters:
    """Writes all splits of a dataset at once; the caller keeps the order of the rows."""

    def __init__(self, folder: Path, splits: Sequence[str], columns: Sequence[Column], rows_per_shard: int) -> None:
        self._writers = {name: ShardWriter(folder, name, columns, rows_per_shard) for name in splits}

    def write(self, rows: Rows, codes: npt.NDArray[Any]) -> None:
        """Append rows, each column (n, *shape), to the splits that `codes` (n,) say: places in `splits`."""
        for code, writer in enumerate(self._writers.values()):
            here = codes == code
            if here.any():
                writer.write({name: values[here] for name, values in rows.items()})

    def close(self) -> dict[str, int]:
        """Name the shards; the number of rows of each split."""
        for writer in self._writers.values():
            writer.close()
        return {name: writer.num_rows for name, writer in self._writers.items()}


def find(folder: Path) -> dict[str, list[Path]]:
    """The shards of each split in `folder`, in order.

    Raises:
        DataError: a shard of a split is missing.
    """
    found: dict[str, dict[int, Path]] = {}
    totals: dict[str, int] = {}
    for path in sorted(folder.iterdir()):
        match = _NAME.match(path.name)
        if match:
            found.setdefault(match["split"], {})[int(match["index"])] = path
            totals[match["split"]] = int(match["total"])
    for split, paths in found.items():
        missing = sorted(set(range(totals[split])) - set(paths))
        if missing:
            name = f"{split}-{missing[0]:05d}-of-{totals[split]:05d}.arrow"
            raise DataError(f"shard {str(folder / name)!r} is missing", "prepare the dataset again")
    return {split: [paths[index] for index in sorted(paths)] for split, paths in found.items()}


def open_columns(path: Path, columns: Sequence[Column]) -> Rows:
    """The columns (n, *shape) of one shard as read-only views of a memory map.

    Raises:
        DataError: the file is truncated, corrupt, or not of these columns; it is named.
    """
    todo = "the file was damaged after it was written: fetch or prepare the dataset again"
    try:
        with pa.memory_map(str(path)) as source:
            reader = pa.ipc.open_file(source)
            if reader.num_record_batches != 1:
                raise DataError(f"shard {str(path)!r} holds {reader.num_record_batches} batches, not 1", todo)
            batch = reader.get_batch(0)
        batch.validate(full=False)
        expected = [(c.name, c.arrow_type) for c in columns]
        if [(field.name, field.type) for field in batch.schema] != expected:
            raise DataError(f"shard {str(path)!r} has the columns {batch.schema.to_string()!r}, not {expected}", todo)
        return {c.name: _to_numpy(batch.column(c.name), c) for c in columns}
    except FileNotFoundError:
        raise DataError(f"shard {str(path)!r} does not exist", "prepare the dataset again") from None
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"shard {str(path)!r} cannot be read: {error}", todo) from error


def _to_arrow(values: npt.NDArray[Any], column: Column) -> Any:
    flat = pa.array(np.ascontiguousarray(values, dtype=column.dtype).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, type=column.arrow_type) if column.shape else flat


def _to_numpy(array: Any, column: Column) -> npt.NDArray[Any]:
    flat = array.flatten() if column.shape else array
    values: npt.NDArray[Any] = flat.to_numpy(zero_copy_only=True)
    return values.reshape(len(array), *column.shape)
