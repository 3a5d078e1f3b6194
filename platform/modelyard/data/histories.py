"""From interactions to histories: what a user did, and what came next. The last two of each user are held out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from modelyard.data import sources
from modelyard.data.config import HistoryConfig, PrepareConfig
from modelyard.data.dataset import Column, DatasetInfo
from modelyard.data.numbers import write_splits
from modelyard.data.progress import OnProgress, finished
from modelyard.data.sources import Part
from modelyard.errors import ConfigError, DataError

HISTORY, TARGET, POPULARITY = "history", "target", "popularity_rank"

Items = npt.NDArray[np.int32]


def prepare_histories(
    config: PrepareConfig, histories: HistoryConfig, parts: Sequence[Part], folder: Path, report: OnProgress
) -> DatasetInfo:
    """Write the shards of a source of interactions into `folder`.

    Raises:
        ConfigError: `splits` does without one of the three splits.
        DataError: no user has enough interactions.
    """
    if set(config.splits.shares()) != {"train", "validation", "test"}:
        raise ConfigError(
            "splits: interactions are split into train, validation and test", "give each of them a share above 0"
        )
    users, items, names = _read(config.source, parts)
    report(finished("read", interactions=len(items), items=len(names)))
    sequences = [found for found in _by_user(users, items) if len(found) >= histories.min_interactions]
    if not sequences:
        raise DataError(f"no user has {histories.min_interactions} interactions", "lower histories.min_interactions")
    counts = np.bincount(np.concatenate([found[:-2] for found in sequences]), minlength=len(names) + 1)
    rows, codes = _rows(sequences, histories)
    history = np.stack([_padded(past, histories.length) for past, _ in rows])
    target = np.array([following for _, following in rows], dtype=np.int32)
    table: dict[str, Any] = {
        HISTORY: history,
        TARGET: target,
        POPULARITY: popularity_ranks(history, target, counts),
    }
    columns = (
        Column(name=HISTORY, dtype="int32", shape=(histories.length,)),
        Column(name=TARGET, dtype="int32"),
        Column(name=POPULARITY, dtype="int32"),
    )
    splits = write_splits(folder, columns, table, codes, ["train", "validation", "test"], config.rows_per_shard)
    report(finished("pack", users=len(sequences), **{f"{name}_rows": count for name, count in splits.items()}))
    return DatasetInfo(
        format="interactions",
        columns=columns,
        splits=splits,
        classes=names,
        documents={"documents": len(items), "users": len(sequences), "kept": sum(map(len, sequences))},
    )


def popularity_ranks(history: Items, target: Items, counts: npt.NDArray[np.integer[Any]]) -> Items:
    """The target's place (n,), from 1, among all items not in its history, the most popular first.

    `counts` holds how often each item number occurs in the train split; of equals the lower number goes first.
    """
    order = np.lexsort((np.arange(len(counts)), -counts))
    place = np.empty(len(counts), dtype=np.int64)
    place[order[order != 0]] = np.arange(len(counts) - 1)
    ahead = np.array(
        [len({i for i in past.tolist() if i and place[i] < place[t]}) for past, t in zip(history, target, strict=True)]
    )
    ranks: Items = (place[target] - ahead + 1).astype(np.int32)
    return ranks


def _rows(
    sequences: Sequence[Items], histories: HistoryConfig
) -> tuple[list[tuple[Items, int]], npt.NDArray[np.uint8]]:
    """(history, what came next) of each row, and the place of its split."""
    rows: list[tuple[Items, int]] = []
    codes: list[int] = []
    for found in sequences:
        last = len(found)
        ends = range(last - 3, 0, -histories.stride)
        for code, end in [*((0, end) for end in ends), (1, last - 2), (2, last - 1)]:
            rows.append((found[max(0, end - histories.length) : end], int(found[end])))
            codes.append(code)
    return rows, np.array(codes, dtype=np.uint8)


def _padded(past: Items, length: int) -> Items:
    out = np.zeros(length, dtype=np.int32)
    out[length - len(past) :] = past
    return out


def _read(source: Any, parts: Sequence[Part]) -> tuple[Any, Items, tuple[str, ...]]:
    """Users and items of all interactions in the order of time, and the items' names; item numbers begin at 1."""
    tables = [table for part in parts for table in sources.read(source, part)]
    joined = pa.concat_tables(tables, promote_options="permissive")
    order = pc.sort_indices(joined["time"])  # stable: ties stay in the order of the files
    users = joined["user"].take(order).combine_chunks().dictionary_encode()
    items = joined["item"].take(order).combine_chunks()
    names = pc.unique(joined["item"]).sort()
    numbers = pc.index_in(items, value_set=names).to_numpy(zero_copy_only=False).astype(np.int32) + 1
    return users.indices.to_numpy(), numbers, tuple(str(name) for name in names.to_pylist())


def _by_user(users: Any, items: Items) -> Iterator[Items]:
    order = np.argsort(users, kind="stable")
    cuts = np.flatnonzero(np.diff(users[order])) + 1
    yield from np.split(items[order], cuts)
