"""Parquet files with a column of text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
from pyarrow import parquet as pq

from modelyard.artifacts.filesystem import translate_errors
from modelyard.data.config import Parquet
from modelyard.data.sources import Part, paths, plan, read
from modelyard.errors import DataError


@plan.register
def plan_parquet(source: Parquet) -> list[Part]:
    """One part per row group; every footer is read now, so that a damaged file is found before work starts."""
    files = [file.uri for file in paths.find_files(source.paths, ["*.parquet"])]
    return plan_row_groups(files, {source.text_column: _is_text}, "source.text_column")


@read.register
def read_parquet(source: Parquet, part: Part) -> Iterator[str | None]:
    """The text of each row; a null is an empty document."""
    for table in read_row_group(part, [source.text_column]):
        for value in table.column(0):
            yield value.as_py() or ""


def plan_row_groups(uris: Sequence[str], columns: dict[str, Any], setting: str) -> list[Part]:
    """One part per row group of each file, after checking that `columns` (name -> type test) are there.

    Raises:
        DataError: a file is no Parquet or truncated, or a column is missing or of another type (all are named).
    """
    with ThreadPoolExecutor(16) as pool:
        footers = list(pool.map(_footer, uris))
    parts = []
    for uri, footer in zip(uris, footers, strict=True):
        schema = footer.schema.to_arrow_schema()
        for name, is_fit in columns.items():
            if name not in schema.names:
                raise DataError(f"{uri}: no column {name!r}; it has: {', '.join(schema.names)}", f"set {setting}")
            if not is_fit(schema.field(name).type):
                raise DataError(f"{uri}: column {name!r} is of type {schema.field(name).type}", f"set {setting}")
        groups = [group for group in range(footer.num_row_groups) if footer.row_group(group).num_rows]
        parts += [Part(uri, group, group + 1) for group in groups]
    return parts


def read_row_group(part: Part, columns: Sequence[str]) -> Iterator[Any]:
    """The columns of one row group as tables of bounded size.

    Raises:
        DataError: the data of the row group is damaged; the file is named.
    """
    try:
        with translate_errors(part.uri), paths.open_file(part.uri) as source:
            reader = pq.ParquetFile(source)
            for batch in _batches(reader, part, columns):
                yield pa.table(batch).select(list(columns))
    except pa.ArrowException as error:
        raise _damaged(part, error) from error


_STORES = ("AWS Error", "google::cloud")
"""How pyarrow's errors of object stores begin or go on."""


def _batches(reader: Any, part: Part, columns: Sequence[str]) -> Iterator[Any]:
    try:
        yield from reader.iter_batches(1024, row_groups=[part.start], columns=list(columns))
    except OSError as error:
        # A disk gives an errno and an object store its name; without either it is a codec that met damaged data.
        if error.errno is not None or any(store in str(error) for store in _STORES):
            raise
        raise _damaged(part, error) from error


def _damaged(part: Part, error: Exception) -> DataError:
    return DataError(f"{part.uri}: row group {part.start} is damaged: {error}", "write the file again")


def _footer(uri: str) -> Any:
    try:
        with translate_errors(uri), paths.open_file(uri) as source:
            return pq.read_metadata(source)
    except pa.ArrowException as error:
        raise DataError(
            f"{uri}: no whole Parquet file: {error}", "it may be truncated: copy or write it again"
        ) from error


def _is_text(kind: Any) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))
