"""From series to windows: a past to look at and the future that followed. Splits follow time, never chance."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from modelyard.data import sources
from modelyard.data.config import PrepareConfig, Series, WindowConfig
from modelyard.data.dataset import Column, DatasetInfo
from modelyard.data.numbers import write_splits
from modelyard.data.progress import OnProgress, finished
from modelyard.data.sources import Part
from modelyard.data.sources.tables import numeric
from modelyard.errors import DataError

PAST, FUTURE, SERIES, SCALE = "past", "future", "series", "scale"

Values = npt.NDArray[np.float64]


def prepare_windows(
    config: PrepareConfig, windows: WindowConfig, parts: Sequence[Part], folder: Path, report: OnProgress
) -> DatasetInfo:
    """Write the shards of a source of series into `folder`.

    The points of time are divided once, in order, by the shares of the splits. A window belongs to the split in which
    its whole future lies; its past may reach back into the split before, as it would in use.

    Raises:
        DataError: a split is too short for one window, or a series never changes in the train split.
    """
    source = config.source
    assert isinstance(source, Series), "PrepareConfig pairs windows with series"
    values = _read(source, parts)  # (points, series)
    report(finished("read", points=len(values), series=values.shape[1]))
    shares = config.splits.shares()
    ends = np.rint(np.cumsum(list(shares.values())) * len(values)).astype(int)
    scales = seasonal_scales(values[: ends[0]], windows.season, source.columns)
    firsts, codes = _starts(windows, ends, list(shares))
    offsets = np.arange(windows.past + windows.future)
    cut = np.concatenate([values[firsts[:, None] + offsets, index] for index in range(values.shape[1])])
    table: dict[str, Any] = {
        PAST: cut[:, : windows.past].astype(np.float32),
        FUTURE: cut[:, windows.past :].astype(np.float32),
        SERIES: np.repeat(np.arange(values.shape[1], dtype=np.int32), len(firsts)),
        SCALE: np.repeat(scales, len(firsts)).astype(np.float32),
    }
    columns = (
        Column(name=PAST, dtype="float32", shape=(windows.past,)),
        Column(name=FUTURE, dtype="float32", shape=(windows.future,)),
        Column(name=SERIES, dtype="int32"),
        Column(name=SCALE, dtype="float32"),
    )
    every = np.tile(codes, values.shape[1])
    counts = write_splits(folder, columns, table, every, list(shares), config.rows_per_shard)
    report(finished("pack", **{f"{name}_rows": count for name, count in counts.items()}))
    return DatasetInfo(
        format="series",
        columns=columns,
        splits=counts,
        features=source.columns,
        season=windows.season,
        documents={"documents": int(values.size), "kept": int(values.size)},
    )


def seasonal_scales(train: Values, season: int, names: Sequence[str]) -> Values:
    """Mean absolute error of the seasonal-naive forecast within `train` (points, series), per series.

    Raises:
        DataError: a series repeats itself exactly, or there is not one season to compare.
    """
    if len(train) <= season:
        raise DataError(f"the train split has {len(train)} points, one season has {season}", "raise splits.train")
    scales: Values = np.abs(train[season:] - train[:-season]).mean(axis=0)
    for name, scale in zip(names, scales, strict=True):
        if scale == 0:
            raise DataError(f"series {name!r} repeats itself exactly in the train split", "leave it out")
    return scales


def _starts(
    windows: WindowConfig, ends: npt.NDArray[np.int_], names: Sequence[str]
) -> tuple[npt.NDArray[np.int_], npt.NDArray[np.uint8]]:
    """The first point of each window, and the place of its split."""
    firsts, codes = [], []
    begin = windows.past
    for code, (name, end) in enumerate(zip(names, ends, strict=True)):
        stride = windows.stride if code == 0 else windows.held_out_stride or windows.future
        found = np.arange(begin, end - windows.future + 1, stride) - windows.past
        if not found.size:
            raise DataError(
                f"split {name!r} has no room for a window: it ends at point {end}, a future begins at {begin} or later",
                f"raise splits.{name}, shorten windows.past or windows.future, or give a longer series",
            )
        firsts.append(found)
        codes.append(np.full(len(found), code, dtype=np.uint8))
        begin = max(int(end), windows.past)
    return np.concatenate(firsts), np.concatenate(codes)


def _read(source: Series, parts: Sequence[Part]) -> Values:
    tables = [table for part in parts for table in sources.read(source, part)]
    joined = pa.concat_tables(tables, promote_options="permissive")
    if source.time_column:
        joined = joined.sort_by(source.time_column)
    return np.stack([numeric(joined[name], f"column {name!r}") for name in source.columns], axis=1)
