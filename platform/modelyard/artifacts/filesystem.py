"""Local folders and object stores behind one small set of functions, on `pyarrow.fs`.

Used for artifacts, for reading corpora (`s3://...`) and for checkpoints. `s3://` honours
`AWS_ENDPOINT_URL_S3`, `AWS_ENDPOINT_URL`, `AWS_REGION` and the usual credentials; every request has a timeout
and few retries.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import urllib.parse
import uuid
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO

from pyarrow import fs as pafs

from modelyard.artifacts.manifest import FileEntry
from modelyard.artifacts.storage_errors import ENV_TIMEOUT, translate_errors
from modelyard.errors import ConfigError, NotFoundError

__all__ = [
    "copy_file",
    "download",
    "fsync_folder",
    "hash_file",
    "hash_remote",
    "is_local",
    "list_files",
    "local_path",
    "read_bytes",
    "resolve",
    "translate_errors",
    "upload",
    "write_bytes",
]

_CHUNK_BYTES = 4 << 20
_CONNECT_TIMEOUT_S = 2.0
_S3_ATTEMPTS = 3
_ONE_SLASH = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/(?!/)")


def is_local(uri: str | os.PathLike[str]) -> bool:
    """Whether `uri` is a folder of this machine: a plain path or `file://`."""
    return "://" not in str(uri) or str(uri).startswith("file://")


def local_path(uri: str | os.PathLike[str]) -> Path:
    """The absolute path of a local `uri` (`~` expanded, `file://` decoded).

    Raises:
        ConfigError: it names a host, or is a URI with one slash, such as `file:/path`.
    """
    text = str(uri)
    if match := _ONE_SLASH.match(text):
        scheme, rest = match[1], text[match.end() :]
        right = f"file:///{rest}" if scheme == "file" else f"{scheme}://{rest}"
        raise ConfigError(f"{text!r} has one slash after {scheme}:", f"write {right}, or ./{text} for a folder here")
    if text.startswith("file://"):
        parts = urllib.parse.urlsplit(text)
        if parts.netloc not in ("", "localhost"):
            raise ConfigError(f"{text!r} names the host {parts.netloc!r}", "write file:///absolute/path")
        text = urllib.parse.unquote(parts.path)
    return Path(text).expanduser().absolute()


def resolve(uri: str | os.PathLike[str]) -> tuple[pafs.FileSystem, str]:
    """The file system behind a path or URI, and the path in it. Opens no connection.

    Raises:
        ConfigError: the scheme is unknown or has one slash, no bucket is named, or the URI holds a password.
        StorageError: the client cannot be made.
    """
    if is_local(uri):
        return pafs.LocalFileSystem(), str(local_path(uri))
    text = str(uri)
    parts = urllib.parse.urlsplit(text)
    if parts.password or parts.username:
        raise ConfigError(
            f"a URI of {parts.hostname!r} holds a key",
            "give keys as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        )
    if not parts.netloc:
        raise ConfigError(f"{text!r} names no bucket", "write s3://bucket/prefix")
    path = f"{parts.netloc}/{parts.path.strip('/')}".rstrip("/")
    with translate_errors(text):
        if parts.scheme == "s3":
            return _s3(parts), path
        if parts.scheme in ("gs", "gcs"):
            return pafs.GcsFileSystem(retry_time_limit=timedelta(seconds=_timeout_s() / 2)), path
    raise ConfigError(f"{text!r}: unknown scheme {parts.scheme!r}", "use a folder, file://, s3:// or gs://")


def list_files(fs: pafs.FileSystem, path: str) -> dict[str, int]:
    """Name (relative to `path`) and size in bytes of every file below it; empty when there is none.

    Raises:
        NotFoundError: the bucket does not exist.
    """
    found = fs.get_file_info(pafs.FileSelector(path, recursive=True, allow_not_found=True))
    bucket = path.split("/")[0]
    if not found and bucket and fs.get_file_info(bucket).type == pafs.FileType.NotFound:
        raise NotFoundError(f"there is no bucket {bucket!r}", "check the URI, or create the bucket")
    prefix = path.rstrip("/") + "/"
    return {info.path.removeprefix(prefix): int(info.size) for info in found if info.type == pafs.FileType.File}


def read_bytes(fs: pafs.FileSystem, path: str) -> bytes:
    """The whole content of a small file."""
    with fs.open_input_stream(path) as stream:
        return bytes(stream.read())


def write_bytes(fs: pafs.FileSystem, path: str, data: bytes) -> None:
    """Write a small file so that it is there as a whole or not at all, and on disk when this returns."""
    if not isinstance(fs, pafs.LocalFileSystem):
        with fs.open_output_stream(path) as stream:
            stream.write(data)
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _replacing(target) as file:
        file.write(data)


def upload(fs: pafs.FileSystem, source: Path, path: str) -> FileEntry:
    """Copy a local file to `path` (atomically); returns its SHA-256 and size as they were read."""
    if isinstance(fs, pafs.LocalFileSystem):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with source.open("rb") as reader, _replacing(Path(path)) as writer:
            return _pump(reader, writer)
    with source.open("rb") as reader:
        stream = fs.open_output_stream(path)
        try:
            entry = _pump(reader, stream)
        except BaseException:
            with contextlib.suppress(OSError):  # pyarrow can only close, which keeps what was sent
                stream.close()
                fs.delete_file(path)
            raise
        stream.close()
    return entry


def download(fs: pafs.FileSystem, path: str, target: Path) -> FileEntry:
    """Copy `path` to a local file (atomically); returns its SHA-256 and size as they were received."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with fs.open_input_stream(path) as reader, _replacing(target) as writer:
        return _pump(reader, writer)


def copy_file(source: Path, target: Path) -> FileEntry:
    """Copy a file to a new one, on disk when this returns; gives the SHA-256 and size of what was copied."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as reader, target.open("xb") as writer:
        entry = _pump(reader, writer)
        os.fsync(writer.fileno())
    return entry


def hash_file(path: Path) -> FileEntry:
    """SHA-256 and size of a local file."""
    with path.open("rb") as reader:
        return _pump(reader, None)


def hash_remote(fs: pafs.FileSystem, path: str) -> FileEntry:
    """SHA-256 and size of a file on any file system, read in a stream."""
    with fs.open_input_stream(path) as reader:
        return _pump(reader, None)


def fsync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _replacing(target: Path) -> Iterator[BinaryIO]:
    """A temporary file beside `target` that takes its place at the end, or vanishes."""
    temporary = target.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
        fsync_folder(target.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _pump(reader: Any, writer: Any) -> FileEntry:
    digest, size = hashlib.sha256(), 0
    while chunk := reader.read(_CHUNK_BYTES):
        digest.update(chunk)
        size += len(chunk)
        if writer is not None:
            writer.write(chunk)
    return FileEntry(sha256=digest.hexdigest(), size_bytes=size)


def _s3(parts: urllib.parse.SplitResult) -> pafs.FileSystem:
    query = dict(urllib.parse.parse_qsl(parts.query))
    environment = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    endpoint = query.get("endpoint_override") or environment
    options: dict[str, Any] = {
        "connect_timeout": _CONNECT_TIMEOUT_S,
        "request_timeout": _timeout_s(),
        "retry_strategy": pafs.AwsStandardS3RetryStrategy(max_attempts=_S3_ATTEMPTS),
        "region": query.get("region") or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"),
    }
    if endpoint:
        scheme, separator, host = endpoint.rpartition("://")
        options["endpoint_override"] = host.rstrip("/") if separator else endpoint.rstrip("/")
        options["scheme"] = scheme or query.get("scheme", "https")
        options["region"] = options["region"] or "us-east-1"  # other servers accept any, but one must be signed for
    return pafs.S3FileSystem(**options)


def _timeout_s() -> float:
    text = os.environ.get(ENV_TIMEOUT) or "10"
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ConfigError(f"{ENV_TIMEOUT}={text!r} is not a positive number of seconds")
    return seconds
