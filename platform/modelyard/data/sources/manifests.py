"""JSON Lines files that name other files: read some lines at a time, with errors that name the line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from modelyard.artifacts import filesystem
from modelyard.data.sources import Part, paths
from modelyard.errors import DataError, nearest

_LINES_PER_PART = 64


@dataclass(frozen=True)
class Line:
    """One object of a file."""

    uri: str
    """The file it stands in."""
    number: int
    values: dict[str, Any]

    @property
    def where(self) -> str:
        """For errors."""
        return f"{self.uri}, line {self.number}"

    def get(self, name: str) -> Any:
        """The value of a key.

        Raises:
            DataError: there is no such key.
        """
        if name not in self.values:
            raise DataError(f"{self.where}: no key {name!r}; {nearest(name, self.values)}", "check `source`")
        return self.values[name]

    def text(self, name: str) -> str:
        """A value that has to be a text.

        Raises:
            DataError: it is none.
        """
        value = self.get(name)
        if not isinstance(value, str):
            raise DataError(f"{self.where}: {name!r} is {type(value).__name__}, no text")
        return value

    def file(self, name: str) -> str:
        """Where the file lies that a value names; from the folder of this file unless it is absolute.

        Raises:
            DataError: it is no text, or no such file exists.
        """
        value = self.text(name)
        base, _, query = self.uri.partition("?")
        folder = base.rpartition("/")[0]
        uri = value if value.startswith("/") or "://" in value else f"{folder}/{value}" if folder else value
        uri += f"?{query}" if query and "?" not in uri else ""
        return existing(uri, self.where)

    def split(self, name: str | None) -> str:
        """The split a value names; empty without a key."""
        return "" if name is None else self.text(name)


def existing(uri: str, where: str) -> str:
    """The same address, if a file is there.

    Raises:
        DataError: none is.
    """
    from pyarrow import fs as pafs

    fs, path = filesystem.resolve(uri)
    if fs.get_file_info(path).type != pafs.FileType.File:
        raise DataError(f"{where}: there is no file {uri!r}", "check the path; it counts from the folder of the list")
    return uri


def plan_lines(files: Sequence[str]) -> list[Part]:
    """Some lines of a file a part.

    Raises:
        DataError: a path leads to nothing.
    """
    parts = []
    for file in paths.find_files(files, ["*.jsonl", "*.ndjson"]):
        count = len(_lines(file.uri))
        parts += [Part(file.uri, at, min(at + _LINES_PER_PART, count)) for at in range(0, count, _LINES_PER_PART)]
    return parts


def read_lines(part: Part) -> Iterator[Line]:
    """The objects of some lines; empty lines are passed over.

    Raises:
        DataError: a line is no JSON object.
    """
    for number, text in enumerate(_lines(part.uri)[part.start : part.stop], part.start + 1):
        if not text.strip():
            continue
        try:
            values = json.loads(text)
        except ValueError as error:
            raise DataError(f"{part.uri}, line {number} is no JSON: {error}") from None
        if not isinstance(values, dict):
            raise DataError(f"{part.uri}, line {number} holds no JSON object")
        yield Line(part.uri, number, values)


def _lines(uri: str) -> list[bytes]:
    with paths.open_stream(uri) as stream:
        return bytes(stream.read()).splitlines()
