"""Rows of named columns: numbers written in the config, and CSV, TSV, JSON Lines and Parquet files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
from pyarrow import parquet as pq

from modelyard.artifacts.filesystem import translate_errors
from modelyard.data.config import Interactions, NumberTable, Points, Series
from modelyard.data.sources import Numbers, Part, paths, plan, read
from modelyard.errors import DataError, nearest

PATTERNS = ["*.csv", "*.tsv", "*.jsonl", "*.ndjson", "*.parquet"]


def plan_files(files: Sequence[str]) -> list[Part]:
    """One part per file.

    Raises:
        DataError: a path leads to nothing, or a file is of no known format.
    """
    parts = [Part(file.uri) for file in paths.find_files(files, PATTERNS)]
    for part in parts:
        if _suffix(part.uri) not in {pattern[2:] for pattern in PATTERNS}:
            raise DataError(f"{part.uri}: the suffix tells no format", f"name it like {', '.join(PATTERNS)}")
    return parts


def read_columns(uri: str, columns: Sequence[str], setting: str) -> Any:
    """The named columns of a file as an Arrow table; `setting` is what a person changes when one is missing.

    Raises:
        DataError: the file is damaged, or a column is missing; both are named.
    """
    try:
        with translate_errors(uri), paths.open_file(uri) as file:
            table = _parse(file, _suffix(uri))
    except (pa.ArrowException, ValueError) as error:
        raise DataError(f"{uri} cannot be read: {error}", "write the file again") from error
    for name in columns:
        if name not in table.column_names:
            known = nearest(name, table.column_names)
            raise DataError(f"{uri}: no column {name!r}; {known}", f"set {setting}")
    return table.select(list(dict.fromkeys(columns)))


def numeric(column: Any, where: str) -> Any:
    """A column as float64 without gaps, (n,).

    Raises:
        DataError: it holds something else.
    """
    import numpy as np

    try:
        values: Any = column.cast(pa.float64()).to_numpy()
    except pa.ArrowException as error:
        raise DataError(f"{where} holds {column.type}, no numbers: {error}", "name a column of numbers") from None
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        raise DataError(f"{where} has no finite number in row {int(bad[0])}", "fill the gaps, or leave the rows out")
    return values


def _parse(file: Any, suffix: str) -> Any:
    if suffix == "parquet":
        return pq.read_table(file)
    if suffix in ("csv", "tsv"):
        options = pyarrow.csv.ParseOptions(delimiter="," if suffix == "csv" else "\t", newlines_in_values=True)
        return pyarrow.csv.read_csv(file, parse_options=options)
    return pyarrow.json.read_json(file)


def _suffix(uri: str) -> str:
    return uri.partition("?")[0].rpartition(".")[2].lower()


@plan.register
def plan_points(source: Points) -> list[Part]:
    """One part: they are few."""
    return [Part("points")]


@read.register
def read_points(source: Points, part: Part) -> Iterator[Numbers]:
    """The rows of the config."""
    for row in source.rows:
        yield Numbers(row[: -source.targets], row[-source.targets :])


@plan.register
def plan_table(source: NumberTable) -> list[Part]:
    """One part per file."""
    return plan_files(source.paths)


@read.register
def read_table(source: NumberTable, part: Part) -> Iterator[Numbers]:
    """The rows of one file."""
    names = [*source.features, *source.targets]
    table = read_columns(part.uri, names, "source.features and source.targets")
    columns = [numeric(table[name], f"{part.uri}: column {name!r}").tolist() for name in names]
    for row in zip(*columns, strict=True):
        yield Numbers(row[: len(source.features)], row[len(source.features) :])


@plan.register
def plan_series(source: Series) -> list[Part]:
    """One part per file."""
    return plan_files(source.paths)


@read.register
def read_series(source: Series, part: Part) -> Iterator[Any]:
    """The columns of one file."""
    extra = [source.time_column] if source.time_column else []
    yield read_columns(part.uri, [*source.columns, *extra], "source.columns and source.time_column")


@plan.register
def plan_interactions(source: Interactions) -> list[Part]:
    """One part per file."""
    return plan_files(source.paths)


@read.register
def read_interactions(source: Interactions, part: Part) -> Iterator[Any]:
    """The columns of one file: user, item, time."""
    names = [source.user_column, source.item_column, source.time_column]
    setting = "source.user_column, source.item_column and source.time_column"
    yield read_columns(part.uri, names, setting).rename_columns(["user", "item", "time"])
