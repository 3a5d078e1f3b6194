"""One place where a disk's or an object store's refusal becomes a `StorageError` that says what to do."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from modelyard.errors import ModelyardError, NotFoundError, StorageError, UnreachableError

GIB = 1 << 30
ENV_TIMEOUT = "MODELYARD_S3_TIMEOUT_S"
"""Seconds without a byte from an object store before a request is tried again; default 10."""
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_S3_VARIABLES = (
    "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_REGION",
    "AWS_ENDPOINT_URL (or AWS_ENDPOINT_URL_S3) and AWS_REGION",
)
_GCS_VARIABLES = ("GOOGLE_APPLICATION_CREDENTIALS", "CLOUD_STORAGE_EMULATOR_ENDPOINT")
_CREDENTIALS = {"s3": _S3_VARIABLES, "gs": _GCS_VARIABLES, "gcs": _GCS_VARIABLES}
_NETWORK = ("NETWORK_CONNECTION", "curlCode", "Timeout was reached", "SERVICE_UNAVAILABLE", "UNAVAILABLE", "resolve")
_DENIED = (
    "ACCESS_DENIED",
    "SIGNATURE_DOES_NOT_MATCH",
    "INVALID_ACCESS_KEY_ID",
    "INVALID_CLIENT_TOKEN_ID",
    "EXPIRED_TOKEN",
    "MISSING_AUTHENTICATION_TOKEN",
    "InvalidAccessKeyId",
    "ExpiredToken",
    "PERMISSION_DENIED",
    "UNAUTHENTICATED",
    "HTTP status 401",
    "HTTP status 403",
)
_MISSING = ("NO_SUCH_BUCKET", "NoSuchBucket", "NO_SUCH_KEY", "NOT_FOUND", "HTTP status 404")


@contextmanager
def translate_errors(uri: str | os.PathLike[str], needed_bytes: int | None = None) -> Iterator[None]:
    """Turn every `OSError` in the block into a Modelyard error about `uri`.

    Args:
        uri: the folder or URI the block works on; shown in the error.
        needed_bytes: how much the block wanted to write, for the disk-full message.

    Raises:
        StorageError: full, denied, or any other refusal.
        UnreachableError: of StorageError; nobody answers there.
        NotFoundError: a path or a bucket does not exist.
    """
    try:
        yield
    except ModelyardError:
        raise
    except OSError as error:
        raise _translated(str(uri), error, needed_bytes) from error


def check_free_space(path: Path, needed_bytes: int) -> None:
    """Refuse a write that cannot fit, before the first byte.

    Raises:
        StorageError: the disk that holds `path` has less than `needed_bytes` free.
    """
    free = _free_bytes(path)
    if free is not None and free < needed_bytes:
        raise _disk_full(str(path), free, needed_bytes)


def endpoint_of(uri: str) -> str:
    """The server a URI leads to, for messages."""
    if not uri.startswith("s3://"):
        return "Google Cloud Storage" if uri.startswith(("gs://", "gcs://")) else uri
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:
        return endpoint
    if "endpoint_override=" in uri:
        return uri.split("endpoint_override=", 1)[1].split("&", 1)[0]
    return f"AWS, region {os.environ.get('AWS_REGION') or os.environ.get('AWS_DEFAULT_REGION') or '(not set)'}"


def _translated(uri: str, error: OSError, needed_bytes: int | None) -> ModelyardError:
    if error.errno in _FULL:
        return _disk_full(uri, _free_bytes(_as_path(uri)), needed_bytes)
    if error.errno == errno.EFBIG:
        return StorageError(
            f"{uri}: a file would grow beyond the largest size allowed here",
            "raise the limit (ulimit -f), or choose another disk",
        )
    if _is_remote(uri):
        return _remote_error(uri, error)
    if error.errno in _FORBIDDEN:
        return StorageError(
            f"{uri}: permission denied ({error})",
            "give this user the right to read and write there, or choose another folder",
        )
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return NotFoundError(f"{uri}: no such file or folder ({error})", "check the path")
    return StorageError(f"{uri}: the disk refused: {error}", "check the disk and its mount, then try again")


def _remote_error(uri: str, error: OSError) -> ModelyardError:
    text, where = str(error), endpoint_of(uri)
    keys, server = _CREDENTIALS.get(uri.split("://")[0], _S3_VARIABLES)
    if any(mark in text for mark in _DENIED):
        return StorageError(
            f"{uri}: {where} denied access: {_first_line(text)}",
            f"check {keys} and the bucket's policy; on a cluster, set them on every node",
        )
    if any(mark in text for mark in _MISSING) or isinstance(error, FileNotFoundError):
        return NotFoundError(
            f"{uri}: no such bucket or object at {where}: {_first_line(text)}",
            f"check the URI, or create the bucket; the server is chosen by {server}",
        )
    if any(mark in text for mark in _NETWORK):
        return UnreachableError(
            f"{uri}: cannot reach {where}: {_first_line(text)}",
            f"check {server} and the network; if it is only slow, raise {ENV_TIMEOUT}",
        )
    todo = f"check {server}, and see the store's own log"  # e.g. a bucket of another region
    return StorageError(f"{uri}: {where} refused: {_first_line(text)}", todo)


def _disk_full(uri: str, free: int | None, needed: int | None) -> StorageError:
    free_text = "an unknown amount" if free is None else f"{free / GIB:.3f} GiB"
    needed_text = "" if needed is None else f", {needed / GIB:.3f} GiB are needed"
    return StorageError(
        f"{uri}: the disk is full: {free_text} free{needed_text}",
        "free some space, or point MODELYARD_STORE or MODELYARD_HOME at a larger disk",
    )


def _free_bytes(path: Path) -> int | None:
    for candidate in (path, *path.parents):
        try:
            return shutil.disk_usage(candidate).free
        except OSError:
            continue  # not made yet: ask its parent
    return None


def _is_remote(uri: str) -> bool:
    return "://" in uri and not uri.startswith("file://")


def _as_path(uri: str) -> Path:
    return Path(uri.removeprefix("file://")).absolute()


def _first_line(text: str) -> str:
    return text.splitlines()[0][:300] if text else "no detail given"
