"""A prepared dataset: a folder of shards, `dataset.json` that describes them, and the tokenizer of a text.

The formats, by what a row is (T is `block_tokens`):

- `tokens`: one column `input_ids`, uint16 or uint32, shape `(T,)`.
- `images`: `pixels`, uint8, shape `(channels, height, width)`, and `label`, int64, shape `()`.
- `numbers`: `features` and `targets`, float32, shapes `(len(features),)` and `(len(targets),)`.
- `labelled_text`: `input_ids` `(T,)` padded at the end, `length`, int32, the tokens that count, and `label`, int64.
- `tagged_text`: the same, with `tags`, int16, `(T,)` instead of `label`: -100 where a token begins no word.
- `series`: `past` `(L,)` and `future` `(H,)`, float32, `series`, int32, and `scale`, float32, the mean absolute error
  of the seasonal-naive forecast within the train split (Hyndman and Koehler 2006).
- `interactions`: `history` `(L,)`, int32, item numbers plus 1, padded in front with 0; `target`, int32, the item
  number plus 1 that came next; and `popularity_rank`, int32, the target's place among the items not in the history.
- `boxes`: `pixels` as for `images`; `boxes`, float32, `(max_boxes, 4)`, centre x, centre y, width and height as shares
  of the image; and `labels`, int16, `(max_boxes,)`, padded at the end with -1.
- `masks`: `pixels` as for `images`, and `mask`, uint8, `(height, width)`, class numbers, 255 where none counts.
- `speech`: `samples`, int16, `(N,)` padded at the end, `length`, int32, the samples that count, and `text`, int16,
  character numbers padded at the end with -1.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from modelyard.config import Config, parse
from modelyard.data import shards
from modelyard.data.order import Int64Array
from modelyard.data.shards import Column, Rows
from modelyard.errors import ConfigError, DataError, nearest

__all__ = ["INFO_FILE", "TOKENIZER_FOLDER", "Column", "Dataset", "DatasetInfo", "Split"]

INFO_FILE = "dataset.json"
TOKENIZER_FOLDER = "tokenizer"


class DatasetInfo(Config):
    """What a dataset holds; stored in it as `dataset.json`."""

    format: Literal[
        "tokens",
        "images",
        "numbers",
        "labelled_text",
        "tagged_text",
        "series",
        "interactions",
        "boxes",
        "masks",
        "speech",
    ]
    """What a row is; see the head of this module."""
    columns: tuple[Column, ...]
    """The columns of every split."""
    splits: dict[str, int]
    """Rows of each split; splits without rows are left out."""
    vocab_size: int | None = None
    """Number of token ids the tokenizer can give (text only)."""
    block_tokens: int | None = None
    """Tokens per row (text only)."""
    classes: tuple[str, ...] = ()
    """Name of each label, tag (`O`, `B-NAME`, `I-NAME`) or item; the characters of transcripts."""
    features: tuple[str, ...] = ()
    """Names of the numbers to predict from (numbers only), or of the series (series only)."""
    targets: tuple[str, ...] = ()
    """Names of the numbers to predict (numbers only)."""
    season: int | None = None
    """Points of time until the pattern repeats (series only)."""
    sample_rate: int | None = None
    """Samples per second (speech only)."""
    end_of_text_id: int | None = None
    """Token id that ends each document (text only)."""
    tokenizer: str | None = None
    """Folder of the tokenizer inside the dataset (text only)."""
    documents: dict[str, int] = Field(default_factory=dict)
    """How many documents each step of the preparation read, dropped and kept."""


class Split:
    """One split, memory-mapped. Thread-safe; every process opens its own.

    `num_rows` is the number of rows.
    """

    def __init__(self, name: str, columns: tuple[Column, ...], paths: list[Path]) -> None:
        self.name = name
        self.columns = columns
        self._shards = [shards.open_columns(path, columns) for path in paths]
        lengths = [len(next(iter(shard.values()))) for shard in self._shards]
        self._ends: Int64Array = np.cumsum(lengths, dtype=np.int64)
        self.num_rows: int = int(self._ends[-1]) if lengths else 0

    def read(self, row_ids: Int64Array) -> Rows:
        """The rows `row_ids` (n,), in that order, as fresh columns (n, *shape).

        Raises:
            DataError: a row id is outside 0..num_rows-1.
        """
        row_ids = np.asarray(row_ids, dtype=np.int64)
        lowest, highest = (int(row_ids.min()), int(row_ids.max())) if row_ids.size else (0, 0)
        if row_ids.size and not 0 <= lowest <= highest < self.num_rows:
            raise DataError(
                f"rows {lowest}..{highest} asked of split {self.name!r}, which has 0..{self.num_rows - 1}",
                "these ids belong to another dataset or split",
            )
        if len(self._shards) == 1:
            return {name: values.take(row_ids, axis=0) for name, values in self._shards[0].items()}
        return self._gather(row_ids)

    def _gather(self, row_ids: Int64Array) -> Rows:
        out: Rows = {c.name: np.empty((row_ids.size, *c.shape), dtype=c.dtype) for c in self.columns}
        homes: npt.NDArray[Any] = np.searchsorted(self._ends, row_ids, side="right")
        for home in np.unique(homes):
            places = np.flatnonzero(homes == home)
            shard = self._shards[home]
            first = int(self._ends[home - 1]) if home else 0
            for name, values in shard.items():
                out[name][places] = values.take(row_ids[places] - first, axis=0)
        return out


class Dataset:
    """A prepared dataset in a local folder; `open` checks that it is whole before a row is read."""

    def __init__(self, folder: Path, info: DatasetInfo, splits: dict[str, Split]) -> None:
        self.folder = folder
        self.info = info
        self._splits = splits

    @classmethod
    def open(cls, folder: str | Path) -> Dataset:
        """Map every shard of the dataset in `folder`.

        Raises:
            DataError: it is no dataset, or a shard is missing, truncated or corrupt (the file is named).
        """
        folder = Path(folder)
        info = _read_info(folder)
        found = shards.find(folder)
        splits = {name: Split(name, info.columns, found.get(name, [])) for name in info.splits}
        for name, split in splits.items():
            if split.num_rows != info.splits[name]:
                raise DataError(
                    f"split {name!r} of {str(folder)!r} has {split.num_rows} rows, "
                    f"{INFO_FILE} says {info.splits[name]}",
                    "the dataset was changed after it was written: fetch or prepare it again",
                )
        return cls(folder, info, splits)

    def split(self, name: str) -> Split:
        """The split `name`.

        Raises:
            DataError: there is no such split; the nearest name is suggested.
        """
        if name not in self._splits:
            raise DataError(f"dataset {str(self.folder)!r} has no split {name!r}", nearest(name, self._splits))
        return self._splits[name]

    @property
    def tokenizer_folder(self) -> Path | None:
        """Folder that `transformers.AutoTokenizer.from_pretrained` loads, if the dataset has a tokenizer."""
        return self.folder / self.info.tokenizer if self.info.tokenizer is not None else None


def _read_info(folder: Path) -> DatasetInfo:
    path = folder / INFO_FILE
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{str(folder)!r} is no dataset: it has no {INFO_FILE}", "name a prepared dataset") from None
    except OSError as error:
        raise DataError(f"{str(path)!r} cannot be read: {error}") from error
    try:
        return parse(DatasetInfo, json.loads(text), source=str(path))
    except (ValueError, ConfigError) as error:
        raise DataError(f"{str(path)!r} is damaged: {error}", "fetch or prepare the dataset again") from error
