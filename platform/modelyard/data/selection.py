"""Which documents or images stay, and in which split: one decision over plain arrays, made on the driver."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from modelyard.data import deduplication, execution, splitting
from modelyard.data.cleaning import Verdict
from modelyard.data.config import PrepareConfig
from modelyard.data.deduplication import UInt32Array, UInt64Array
from modelyard.data.progress import OnProgress, finished
from modelyard.errors import DataError

_DROPPED = {Verdict.TOO_SHORT: "too_short", Verdict.TOO_LONG: "too_long", Verdict.UNREADABLE: "unreadable"}


class Chosen(NamedTuple):
    """The items that stay, in the order of their ids."""

    ids: npt.NDArray[np.int64]
    splits: npt.NDArray[np.uint8]
    """Place of each item's split in `PrepareConfig.splits.shares()`."""
    counts: dict[str, int]
    """What was read, dropped and kept, in the order of the steps."""

    def split_codes(self, ids: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.uint8]]:
        """Of `ids` (n,): which stay (n,), and the split codes of those (number that stay,)."""
        places = np.minimum(np.searchsorted(self.ids, ids), len(self.ids) - 1)
        stays = self.ids[places] == ids
        return stays, self.splits[places[stays]]


def choose(dataset: Any, config: PrepareConfig, similarity: float | None, report: OnProgress) -> Chosen:
    """Decide from ids, verdicts, digests and (with a `similarity`) signatures; contents stay where they are.

    Raises:
        ModelyardError: what a worker met while it read.
        DataError: nothing is left, or a split is empty.
    """
    said = "split" in (dataset.schema().names or ())
    names = ["id", "verdict", "digest", *([] if similarity is None else ["signature"]), *(["split"] if said else [])]
    found = list(execution.tables(dataset, names))
    if not found:
        raise DataError("the corpus is empty: it holds no document", "check `source` in the config")
    ids, verdicts = (np.concatenate([table[name].to_numpy() for table in found]) for name in names[:2])
    if (verdicts == Verdict.FAILED).any():
        _raise_first_failure(dataset)
    digests = np.concatenate([execution.from_fixed_lists(table["digest"]) for table in found])
    sketches = None
    if similarity is not None:
        sketches = np.concatenate([execution.from_fixed_lists(table["signature"]) for table in found])
    given = [name for table in found for name in table["split"].to_pylist()] if said else None
    return decide(ids, verdicts, digests, sketches, similarity or 1.0, config, report, given)


def decide(
    ids: npt.NDArray[np.int64],
    verdicts: npt.NDArray[np.uint8],
    digests: UInt64Array,
    sketches: UInt32Array | None,
    similarity: float,
    config: PrepareConfig,
    report: OnProgress,
    given: Sequence[str] | None = None,
) -> Chosen:
    """The decision itself: pure, of arrays (n, ...) in the order of ids; of equals and alikes the lowest id stays.

    Args:
        given: the split that the source itself says, of each item; empty where it leaves it to the content.

    Raises:
        DataError: nothing is left, a split is empty, or one is said that the config does not want.
    """
    counts = {"documents": len(ids)}
    counts |= {name: int((verdicts == verdict).sum()) for verdict, name in _DROPPED.items()}
    report(finished("read", **counts))
    kept = np.flatnonzero(verdicts == Verdict.KEPT)
    if not kept.size:
        raise DataError(f"no document of the corpus is usable: {_sentence(counts)}", _todo(counts))
    before = len(kept)
    kept = kept[deduplication.first_of_equals(digests[kept])]
    duplicates = {"exact_duplicates": before - len(kept)}
    if sketches is not None:
        before = len(kept)
        kept = kept[deduplication.first_of_alikes(sketches[kept], similarity)]
        duplicates["near_duplicates"] = before - len(kept)
    report(finished("deduplicate", **duplicates))
    splits = splitting.assign(digests[kept], config.splits.shares())
    if given is not None:
        splits = _as_said(splits, [given[place] for place in kept.tolist()], list(config.splits.shares()))
    sizes = {name: int((splits == code).sum()) for code, name in enumerate(config.splits.shares())}
    report(finished("split", **sizes))
    _check_sizes(sizes, len(kept), config)
    return Chosen(ids[kept], splits, {**counts, **duplicates, "kept": len(kept)})


def _as_said(splits: npt.NDArray[np.uint8], given: Sequence[str], names: Sequence[str]) -> npt.NDArray[np.uint8]:
    unknown = sorted(set(given) - {"", *names})
    if unknown:
        raise DataError(
            f"the source says split {unknown[0]!r}, but the config wants {', '.join(names)}",
            "give this split a share above 0 in `splits`, or rename it in the source",
        )
    said = np.array([names.index(name) if name else 0 for name in given], np.uint8)
    return np.where(np.array([bool(name) for name in given]), said, splits)


def _check_sizes(sizes: Mapping[str, int], kept: int, config: PrepareConfig) -> None:
    for name, size in sizes.items():
        if size == 0:
            share = config.splits.shares()[name]
            raise DataError(
                f"split {name!r} is empty: none of the {kept} documents falls into its share of {share:g}",
                _split_todo(name, kept),
            )


def ordered(names: Iterable[str]) -> tuple[str, ...]:
    """Names of classes, sorted: as numbers when they all are."""
    found = set(names)
    return tuple(sorted(found, key=int) if all(name.lstrip("-").isdigit() for name in found) else sorted(found))


def _split_todo(name: str, kept: int) -> str:
    if kept < 20:
        return f"give more documents (source.separator cuts text files), or set splits.{name} to 0 to do without it"
    return f"raise splits.{name}" if name == "train" else f"raise splits.{name}, or set it to 0 to do without it"


def _raise_first_failure(dataset: Any) -> None:
    for table in execution.tables(dataset, ["verdict", "reason"]):
        for row in table.to_pylist():
            if row["verdict"] == Verdict.FAILED:
                execution.raise_failure(row["reason"])


def _sentence(counts: Mapping[str, int]) -> str:
    dropped = [f"{count} {name.replace('_', ' ')}" for name, count in counts.items() if count and name != "documents"]
    return f"of {counts['documents']} read, {', '.join(dropped)}"


def _todo(counts: Mapping[str, int]) -> str:
    if counts["unreadable"]:
        return "the files are no UTF-8 text (or no images): check `source` in the config"
    return "lower text.clean.min_characters, or raise text.clean.max_characters"
