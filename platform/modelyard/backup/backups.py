"""Making, checking and restoring snapshots."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from modelyard.artifacts.filesystem import list_files, resolve, translate_errors, upload
from modelyard.backup.repository import PIECE_BYTES, Entry, Repository, Snapshot
from modelyard.backup.sources import Source, sources
from modelyard.config import settings
from modelyard.errors import ConfigError, IntegrityError

Say = Callable[[str], None]
STORE = "store/"


@dataclass(frozen=True)
class Report:
    """What a backup, a check or a restore did."""

    snapshot: str
    files: int
    size_bytes: int
    """Of all files of the snapshot."""
    moved_bytes: int
    """Written to the backup, or read from it."""
    notes: tuple[str, ...] = ()


def default_key_file() -> Path:
    """`backup.key` in the home folder."""
    return settings().home / "backup.key"


def create(uri: str, key_file: Path | None = None) -> Report:
    """Back up this machine's registry, artifacts, scheduler journal and keys. Only what is new is sent.

    Raises:
        IntegrityError: the backup at `uri` was made with another key.
        StorageError: it cannot be reached, or is full.
    """
    repository = Repository(uri, key_file or default_key_file(), make=True)
    before = repository.read().files if repository.names() else {}
    found, notes = sources(settings())
    files: dict[str, Entry] = {}
    moved = 0
    for source in found:
        files[source.name], written = _store(repository, source, before.get(source.name))
        moved += written
    snapshot = repository.write(files, notes)
    return Report(snapshot.name, len(files), snapshot.size_bytes, moved, notes)


def verify(uri: str, snapshot: str | None = None, key_file: Path | None = None) -> Report:
    """Read every piece of a snapshot and prove that it is what was written.

    Raises:
        IntegrityError: files are damaged or incomplete; names them.
    """
    repository = Repository(uri, key_file or default_key_file())
    chosen = repository.read(snapshot)
    damaged = [problem for name, entry in chosen.files.items() if (problem := _problem(repository, name, entry))]
    if damaged:
        raise IntegrityError(
            f"{len(damaged)} of {len(chosen.files)} files of snapshot {chosen.name} cannot be restored:\n  "
            + "\n  ".join(damaged[:20]),
            "modelyard backup create sends them again, if they are still good here; then remove this snapshot",
        )
    return Report(chosen.name, len(chosen.files), chosen.size_bytes, chosen.size_bytes, chosen.notes)


def restore(
    uri: str, into: Path, snapshot: str | None = None, key_file: Path | None = None, store: str | None = None
) -> Report:
    """Write a snapshot into an empty folder, which then serves as `MODELYARD_HOME`.

    Args:
        into: made if absent; must hold nothing.
        store: folder or URI for the artifacts; by default `store` in `into`.

    Raises:
        ConfigError: `into` or `store` holds something.
        IntegrityError: a file is damaged; what was written before it stays, and is complete file by file.
    """
    if into.exists() and any(into.iterdir()):
        raise ConfigError(f"{str(into)!r} is not empty", "name a new folder; nothing is ever overwritten")
    if store is not None:
        fs, root = resolve(store)
        with translate_errors(store):
            if list_files(fs, root):
                raise ConfigError(f"{store} is not empty", "name an empty folder or prefix")
    repository = Repository(uri, key_file or default_key_file())
    chosen = repository.read(snapshot)
    into.mkdir(parents=True, exist_ok=True, mode=0o700)
    for name, entry in chosen.files.items():
        _write(repository, name, entry, into, store)
    return Report(chosen.name, len(chosen.files), chosen.size_bytes, chosen.size_bytes, chosen.notes)


def snapshots(uri: str, key_file: Path | None = None) -> list[Snapshot]:
    """All snapshots, oldest first."""
    repository = Repository(uri, key_file or default_key_file())
    return [repository.read(name) for name in repository.names()]


def _store(repository: Repository, source: Source, before: Entry | None) -> tuple[Entry, int]:
    is_known = before is not None and source.is_final and before.is_final and before.size_bytes == source.size_bytes
    if is_known and before is not None and all(piece in repository.pieces for piece in before.pieces):
        return before, 0
    pieces, size, moved = [], 0, 0
    with source.open() as stream:
        while content := stream.read(PIECE_BYTES):
            name, written = repository.put(content)
            pieces.append(name)
            size += len(content)
            moved += written
    return Entry(tuple(pieces), size, source.mode, source.is_final), moved


def _contents(repository: Repository, entry: Entry) -> Iterator[bytes]:
    for piece in entry.pieces:
        content = repository.get(piece)
        if repository.sealer.name(content) != piece:
            raise IntegrityError(f"piece {piece[:12]} holds something else", "")
        yield content


def _problem(repository: Repository, name: str, entry: Entry) -> str | None:
    try:
        size = sum(len(content) for content in _contents(repository, entry))
    except IntegrityError as error:
        return f"{name}: {error.problem}"
    return None if size == entry.size_bytes else f"{name}: {size} bytes instead of {entry.size_bytes}"


def _write(repository: Repository, name: str, entry: Entry, into: Path, store: str | None) -> None:
    target = into / name
    if not target.resolve().is_relative_to(into.resolve()):
        raise IntegrityError(f"{name!r} leads out of {str(into)!r}", "this is no snapshot of Modelyard's")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.part")
    try:
        with temporary.open("xb") as stream:
            for content in _contents(repository, entry):
                stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.chmod(entry.mode)
        if store is not None and name.startswith(STORE):
            fs, root = resolve(store)
            with translate_errors(store, entry.size_bytes):
                upload(fs, temporary, f"{root}/{name.removeprefix(STORE)}")
        else:
            temporary.replace(target)
    except IntegrityError as error:
        raise IntegrityError(f"{name}: {error.problem}", "modelyard backup verify names all that is damaged") from error
    finally:
        temporary.unlink(missing_ok=True)
