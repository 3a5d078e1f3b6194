"""Text files and JSON Lines."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from modelyard.data.cleaning import decode
from modelyard.data.config import JsonLines, TextFiles
from modelyard.data.sources import Part, paths, plan, read
from modelyard.errors import DataError

_RANGE_BYTES = 32 << 20
"""A JSON Lines file is cut into ranges of this size. Part of the document numbers, so it never changes."""


@plan.register
def plan_text(source: TextFiles) -> list[Part]:
    """One part per file."""
    return [Part(file.uri) for file in paths.find_files(source.paths, [source.pattern])]


@read.register
def read_text(source: TextFiles, part: Part) -> Iterator[str | None]:
    """The file as one document, or its pieces between separators."""
    with paths.open_stream(part.uri) as stream:
        text = decode(bytes(stream.read()))
    if text is None or source.separator is None:
        yield text
    else:
        yield from text.replace("\r\n", "\n").split(source.separator)


@plan.register
def plan_jsonl(source: JsonLines) -> list[Part]:
    """See `plan_json_lines`."""
    return plan_json_lines(source.paths)


def plan_json_lines(files: Sequence[str]) -> list[Part]:
    """Ranges of bytes; a line belongs to the range in which it begins. Compressed files stay whole."""
    parts = []
    for file in paths.find_files(files, ["*.jsonl", "*.jsonl.gz", "*.ndjson"]):
        ranges = range(0, file.size_bytes, _RANGE_BYTES) if not _is_gzip(file.uri) else range(1)
        parts += [Part(file.uri, start, start + _RANGE_BYTES) for start in ranges]
    return parts


@read.register
def read_jsonl(source: JsonLines, part: Part) -> Iterator[str | None]:
    """The text of each line.

    Raises:
        DataError: a line is not a JSON object, or lacks the column (file, place and keys are named).
    """
    for where, row in read_json_lines(part, skip_undecodable=False):
        yield None if row is None else _text_of(row, source.text_column, where)


def read_json_lines(part: Part, *, skip_undecodable: bool = True) -> Iterator[tuple[str, Any]]:
    """The place and the object of each line that is not blank; None for a line that is no UTF-8, unless skipped.

    Raises:
        DataError: a line is not a JSON object.
    """
    for place, line in _lines(part):
        if line.isspace():
            continue
        where = f"{part.uri}, byte {place}"
        try:
            row = json.loads(line.decode("utf-8-sig" if place == 0 else "utf-8"))
        except UnicodeDecodeError:
            if not skip_undecodable:
                yield where, None
            continue
        except ValueError as error:
            raise DataError(f"{where}: the line is not JSON: {error}", "one JSON object per line is needed") from None
        if not isinstance(row, dict):
            raise DataError(f"{where}: the line holds a {type(row).__name__}", "one JSON object per line is needed")
        yield where, row


def _text_of(row: dict[str, Any], column: str, where: str) -> str:
    if column not in row:
        raise DataError(f"{where}: no column {column!r}; it has: {', '.join(row)}", "set source.text_column")
    value = row[column]
    if value is not None and not isinstance(value, str):
        raise DataError(f"{where}: column {column!r} holds a {type(value).__name__}", "text is needed")
    return value or ""


def _lines(part: Part) -> Iterator[tuple[int, bytes]]:
    """The lines that begin in the range, with the byte each begins at."""
    if _is_gzip(part.uri):
        place = 0
        with paths.open_stream(part.uri, compressed=True) as stream:
            for line in _split(stream):
                yield place, line
                place += len(line)
        return
    with paths.open_file(part.uri) as file:
        place = max(part.start - 1, 0)
        file.seek(place)
        for number, line in enumerate(_split(file)):
            if place >= part.stop:
                return
            if not (number == 0 and part.start > 0):  # the rest of a line that began in the range before
                yield place, line
            place += len(line)


def _split(stream: Any) -> Iterator[bytes]:
    """Lines of a pyarrow stream, their ends kept; memory is bounded by the longest line."""
    rest: list[bytes] = []
    while chunk := bytes(stream.read(4 << 20)):
        head, *lines = chunk.split(b"\n")
        rest.append(head)
        for line in lines:
            yield b"".join(rest) + b"\n"
            rest = [line]
    if last := b"".join(rest):
        yield last


def _is_gzip(uri: str) -> bool:
    return uri.partition("?")[0].endswith(".gz")
