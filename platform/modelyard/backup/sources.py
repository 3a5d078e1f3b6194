"""What a backup holds, and where each file of it belongs."""

from __future__ import annotations

import contextlib
import io
import sqlite3
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from modelyard.artifacts.filesystem import is_local, list_files, local_path, resolve, translate_errors
from modelyard.config import Settings

ARTIFACTS = ("models", "datasets")
DATABASES = ("scheduler.db", "gateway.db")
REGISTRY = "mlflow.db"
SECRETS = "cluster"
"""Folder of the authority and the token, below the home folder."""
_SQLITE = "sqlite:///"


class Source(Protocol):
    """One file to be backed up."""

    @property
    def name(self) -> str:
        """Its name in a snapshot."""
        ...

    @property
    def size_bytes(self) -> int | None:
        """Its size, when that is known without reading it."""
        ...

    @property
    def is_final(self) -> bool:
        """Whether its content can never change under this name."""
        ...

    @property
    def mode(self) -> int:
        """Permissions."""
        ...

    def open(self) -> contextlib.AbstractContextManager[BinaryIO]:
        """Its content, as of one moment."""
        ...


@dataclass(frozen=True)
class Plain:
    """A file of this machine that is read as it is."""

    name: str
    path: Path
    is_final: bool = False

    @property
    def size_bytes(self) -> int | None:
        """Its size now."""
        return self.path.stat().st_size if self.is_final else None

    @property
    def mode(self) -> int:
        """Permissions."""
        return self.path.stat().st_mode & 0o777

    @contextlib.contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Its content."""
        with self.path.open("rb") as stream:
            yield stream


@dataclass(frozen=True)
class Remote:
    """A file of an artifact on an object store."""

    name: str
    uri: str
    path: str
    size_bytes: int | None
    is_final: bool = True
    mode: int = 0o644

    @contextlib.contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Its content."""
        fs, _ = resolve(self.uri)
        with translate_errors(self.uri), fs.open_input_file(self.path) as stream:
            yield io.BufferedReader(stream)


@dataclass(frozen=True)
class Database:
    """A SQLite database that others may be writing to: copied by SQLite itself, as of one moment."""

    name: str
    path: Path
    is_final: bool = False
    mode: int = 0o600
    size_bytes: int | None = None

    @contextlib.contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """A consistent copy."""
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "copy.db"
            with (
                contextlib.closing(sqlite3.connect(f"file:{self.path}?mode=ro", uri=True, timeout=30)) as original,
                contextlib.closing(sqlite3.connect(copy)) as target,
            ):
                original.backup(target)
            with copy.open("rb") as stream:
                yield stream


def sources(settings: Settings) -> tuple[list[Source], tuple[str, ...]]:
    """Everything that is to be backed up here, and notes about what is kept elsewhere."""
    found: list[Source] = [*_artifacts(settings.store)]
    notes: list[str] = []
    if settings.tracking_uri.startswith(_SQLITE):
        path = Path(settings.tracking_uri.removeprefix(_SQLITE))
        found += [Database(REGISTRY, path)] if path.exists() else []
    else:
        notes.append(
            f"the registry is a server ({_without_password(settings.tracking_uri)}): back up its database there"
        )
    databases = [settings.home / name for name in DATABASES]
    found += [Database(path.name, path) for path in databases if path.exists()]
    secrets = settings.home / SECRETS
    found += [Plain(f"{SECRETS}/{path.name}", path) for path in sorted(secrets.glob("*")) if path.is_file()]
    return found, tuple(notes)


def folders(settings: Settings) -> dict[str, int]:
    """Permissions of the folders of this machine that a backup holds, by their names in it."""
    found = {}
    if is_local(settings.store):
        root = local_path(settings.store)
        inner = [path for kind in ARTIFACTS for path in (root / kind, *(root / kind).rglob("*")) if path.is_dir()]
        found = {f"store/{path.relative_to(root).as_posix()}": path for path in inner}
    if (settings.home / SECRETS).is_dir():
        found[SECRETS] = settings.home / SECRETS
    return {name: path.stat().st_mode & 0o777 for name, path in found.items()}


def _artifacts(store: str) -> Iterator[Source]:
    for kind in ARTIFACTS:
        if is_local(store):
            root = local_path(store)
            for path in sorted((root / kind).rglob("*")):
                if path.is_file():
                    yield Plain(f"store/{path.relative_to(root).as_posix()}", path, is_final=True)
            continue
        fs, root_path = resolve(store)
        with translate_errors(store):
            listed = list_files(fs, f"{root_path}/{kind}")
        for name, size in sorted(listed.items()):
            yield Remote(f"store/{kind}/{name}", store, f"{root_path}/{kind}/{name}", size)


def _without_password(uri: str) -> str:
    head, separator, rest = uri.partition("://")
    return f"{head}{separator}{rest.rpartition('@')[2]}"
