"""From rows of numbers to shards of features and targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from modelyard.data import deduplication, sources, splitting
from modelyard.data.config import NumberTable, PrepareConfig
from modelyard.data.dataset import Column, DatasetInfo
from modelyard.data.progress import OnProgress, finished
from modelyard.data.shards import SplitWriters
from modelyard.data.sources import Part
from modelyard.errors import DataError

FEATURES, TARGETS = "features", "targets"


def prepare_numbers(config: PrepareConfig, parts: Sequence[Part], folder: Path, report: OnProgress) -> DatasetInfo:
    """Write the shards of a table of numbers into `folder`; equal rows share a split, and all of them stay.

    Raises:
        DataError: there are no rows, or a split is empty.
    """
    rows = [row for part in parts for row in sources.read(config.source, part)]
    if not rows:
        raise DataError("the table holds no rows", "check `source` in the config")
    features = np.array([row.features for row in rows], dtype=np.float32)
    targets = np.array([row.targets for row in rows], dtype=np.float32)
    report(finished("read", rows=len(rows)))
    digests = deduplication.content_digests(
        [np.concatenate(row).tobytes() for row in zip(features, targets, strict=True)]
    )
    codes = splitting.assign(digests, config.splits.shares())
    columns = (
        Column(name=FEATURES, dtype="float32", shape=(features.shape[1],)),
        Column(name=TARGETS, dtype="float32", shape=(targets.shape[1],)),
    )
    table = {FEATURES: features, TARGETS: targets}
    counts = write_splits(folder, columns, table, codes, list(config.splits.shares()), config.rows_per_shard)
    report(finished("pack", **{f"{name}_rows": count for name, count in counts.items()}))
    names = (
        (config.source.features, config.source.targets)
        if isinstance(config.source, NumberTable)
        else (_numbered("x", features.shape[1]), _numbered("y", targets.shape[1]))
    )
    return DatasetInfo(
        format="numbers",
        columns=columns,
        splits=counts,
        features=names[0],
        targets=names[1],
        documents={"documents": len(rows), "kept": len(rows)},
    )


def write_splits(
    folder: Path,
    columns: Sequence[Column],
    table: Mapping[str, npt.NDArray[Any]],
    codes: npt.NDArray[np.uint8],
    names: Sequence[str],
    rows_per_shard: int,
) -> dict[str, int]:
    """Write the rows (n, ...) of each split, `codes` (n,) being places in `names`; the number of rows of each.

    Raises:
        DataError: a split gets no row.
    """
    counts = {name: int((codes == code).sum()) for code, name in enumerate(names)}
    for name, count in counts.items():
        if not count:
            raise DataError(
                f"split {name!r} is empty: none of the {len(codes)} rows falls into its share",
                f"raise splits.{name}, or set it to 0 to do without it",
            )
    writers = SplitWriters(folder, names, columns, rows_per_shard)
    writers.write(dict(table), codes)
    return writers.close()


def _numbered(letter: str, count: int) -> tuple[str, ...]:
    return (letter,) if count == 1 else tuple(f"{letter}{index}" for index in range(1, count + 1))
