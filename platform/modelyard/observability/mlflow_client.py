"""The one way to MLflow: a client for any tracking URI, quiet, with timeouts, and with errors translated."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import socket
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from modelyard.errors import ConfigError, ModelyardError, NotFoundError, StorageError

if TYPE_CHECKING:
    from mlflow import MlflowClient

_CONNECT_TIMEOUT_S = 3.0
_QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",  # the default, 7 with growing pauses, keeps a user waiting for minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "GIT_PYTHON_REFRESH": "quiet",
}
_LIBRARIES = frozenset({"mlflow", "sqlalchemy", "requests", "urllib3", "sqlite3", "alembic"})


def connect(tracking_uri: str) -> MlflowClient:
    """An MLflow client for any tracking URI, with the database made when it is new.

    Raises:
        ConfigError: the URI is of no kind that MLflow knows.
        StorageError: the server or the database cannot be used.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    _check_reachable(tracking_uri)
    with translate_mlflow_errors(tracking_uri), database_lock(tracking_uri):
        from mlflow import MlflowClient

        for name in ("mlflow", "alembic"):
            logger = logging.getLogger(name)
            if logger.getEffectiveLevel() < logging.WARNING:  # a person's DEBUG=... is not ours to keep; INFO is noise
                logger.setLevel(logging.WARNING)
        client = MlflowClient(tracking_uri, registry_uri=tracking_uri)
        if not tracking_uri.startswith(("http:", "https:")):
            client.search_registered_models(max_results=1)  # opens the registry's side of the database as well
        return client


@contextlib.contextmanager
def database_lock(tracking_uri: str) -> Iterator[None]:
    """Serialize the processes that create or change one SQLite file; nothing to do for other URIs."""
    path = sqlite_path(tracking_uri)
    if path is None:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(path.name + ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # no timeout: the kernel frees it when its holder ends, however it ends
        yield


@contextlib.contextmanager
def translate_mlflow_errors(tracking_uri: str) -> Iterator[None]:
    """Turn MLflow's, SQLAlchemy's and the network's errors into Modelyard's.

    Raises:
        NotFoundError: what was asked for does not exist.
        ConfigError: MLflow refuses a value.
        StorageError: the server or the database cannot be used.
    """
    try:
        yield
    except ModelyardError:
        raise
    except Exception as error:  # MLflow lets errors of every library below it through; unknown ones are raised again
        translated = _translated(tracking_uri, error)
        if translated is None:
            raise
        raise translated from error


def _translated(uri: str, error: Exception) -> ModelyardError | None:
    text = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
    code = getattr(error, "error_code", "")
    if code in ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND"):
        return NotFoundError(text, f"looked in {_shown(uri)}")
    if code in ("INVALID_PARAMETER_VALUE", "RESOURCE_ALREADY_EXISTS", "BAD_REQUEST"):
        return ConfigError(f"{_shown(uri)}: {text}", "")
    if type(error).__module__.partition(".")[0] in _LIBRARIES or isinstance(error, OSError):
        return StorageError(
            f"tracking at {_shown(uri)} cannot be used: {text}",
            "check MODELYARD_TRACKING_URI, that its server runs, and that its disk is writable and has room",
        )
    return None


def _check_reachable(uri: str) -> None:
    parts = urllib.parse.urlsplit(uri)
    if parts.scheme not in ("http", "https") or os.environ.get(f"{parts.scheme}_proxy"):
        return
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=_CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise StorageError(
            f"the tracking server {_shown(uri)} cannot be reached: {error}",
            "start it (mlflow server --port ...), or correct MODELYARD_TRACKING_URI",
        ) from error


def sqlite_path(uri: str) -> Path | None:
    """The file of a SQLite URI, None for any other URI."""
    return Path(uri.removeprefix("sqlite:///")).absolute() if uri.startswith("sqlite:///") else None


def _shown(uri: str) -> str:
    """The URI without its password."""
    parts = urllib.parse.urlsplit(uri)
    if parts.password is None:
        return uri
    return uri.replace(f":{parts.password}@", ":***@", 1)
