"""From what a person wrote (a file, a folder, a glob, `s3://`) to the files that are meant, sorted."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from modelyard.artifacts import filesystem
from modelyard.errors import DataError

_GLOB = re.compile(r"[*\[]|(?<!\\)\?")


class File(NamedTuple):
    """One file of a corpus."""

    uri: str
    size_bytes: int


def find_files(paths: Sequence[str], patterns: Sequence[str]) -> list[File]:
    """The files meant by `paths`: files as they are, folders searched for `patterns`, globs (`**` too).

    Hidden files and folders are passed over. Sorted within each path; a file named twice is read once.

    Raises:
        DataError: a path leads to nothing.
        StorageError: the store cannot be reached.
    """
    found: dict[str, File] = {}
    for path in paths:
        with filesystem.translate_errors(path):
            files = _find(path, patterns)
        if not files:
            raise DataError(
                f"source path {path!r} holds no file like {', '.join(patterns)}", "check `source` in the config"
            )
        found.update((file.uri, file) for file in files)
    return list(found.values())


def open_stream(uri: str, *, compressed: bool = False) -> Any:
    """A readable pyarrow stream of a file; gunzipped when `compressed`."""
    fs, path = filesystem.resolve(uri)
    return fs.open_input_stream(path, compression="gzip" if compressed else None)


def open_file(uri: str) -> Any:
    """A seekable pyarrow file."""
    fs, path = filesystem.resolve(uri)
    return fs.open_input_file(path)


def _find(path: str, patterns: Sequence[str]) -> list[File]:
    from pyarrow import fs as pafs

    location, _, query = path.partition("?") if not filesystem.is_local(path) else (path, "", "")
    base, glob = _split_glob(location)
    suffix = f"?{query}" if query else ""
    fs, root = filesystem.resolve(base + suffix)
    info = fs.get_file_info(root)
    if info.type == pafs.FileType.File and not glob:
        return [File(base + suffix, int(info.size))]
    if info.type == pafs.FileType.NotFound:
        raise DataError(f"source path {path!r} does not exist", "check `source` in the config")
    matches = _glob_matcher(glob) if glob else re.compile("|".join(f"(?:.*/)?{fnmatch.translate(p)}" for p in patterns))
    return [
        File(f"{base.rstrip('/')}/{name}{suffix}", size)
        for name, size in sorted(filesystem.list_files(fs, root).items())
        if matches.match(name) and not any(piece.startswith(".") for piece in name.split("/"))
    ]


def _split_glob(location: str) -> tuple[str, str]:
    """`corpus/2024-*/a.txt` -> (`corpus`, `2024-*/a.txt`); no glob -> (location, '')."""
    if not _GLOB.search(location):
        return location, ""
    pieces = location.split("/")
    first = next(index for index, piece in enumerate(pieces) if _GLOB.search(piece))
    return "/".join(pieces[:first]) or ("/" if location.startswith("/") else "."), "/".join(pieces[first:])


def _glob_matcher(glob: str) -> re.Pattern[str]:
    """`*` stays within a folder, `**/` spans any number of them."""
    expression = ""
    for piece in re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]*\])", glob):
        if piece.startswith("[") and piece.endswith("]"):
            expression += piece.replace("[!", "[^")
        else:
            known = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
            expression += known.get(piece, re.escape(piece))
    return re.compile(expression + r"\Z")
