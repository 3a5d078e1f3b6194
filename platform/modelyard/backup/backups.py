"""Making, checking and restoring snapshots."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from modelyard.artifacts.filesystem import is_local, list_files, local_path, resolve, translate_errors, upload
from modelyard.backup.repository import PIECE_BYTES, Entry, Repository, Snapshot
from modelyard.backup.sources import SECRETS, Source, folders, sources
from modelyard.config import settings
from modelyard.errors import ConfigError, InputError, IntegrityError, StorageError
from modelyard.training.interrupts import terminated_as_interrupted

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
    warnings: tuple[str, ...] = ()
    """About older snapshots."""


def default_key_file() -> Path:
    """`backup.key` in the home folder."""
    return settings().home / "backup.key"


@terminated_as_interrupted()
def create(uri: str, key_file: Path | None = None) -> Report:
    """Back up this machine's registry, artifacts, scheduler journal and keys. Only what is new is sent.

    A key is made with a new backup only. SIGTERM ends it as Ctrl-C does.

    Raises:
        ConfigError: `uri` is a folder in the home folder or the store.
        NotFoundError: there is a backup at `uri`, and its key is not here.
        IntegrityError: the backup at `uri` was made with another key, or its `backup.json` is damaged or missing.
        StorageError: it cannot be reached, or is full.
    """
    _require_elsewhere(uri)
    repository = Repository(uri, key_file or default_key_file(), make=True)
    repository.clear()
    before, warnings = _before(repository)
    found, notes = sources(settings())
    files: dict[str, Entry] = {}
    moved = 0
    for source in found:
        files[source.name], written = _store(repository, source, before.get(source.name))
        moved += written
    snapshot = repository.write(files, notes, folders(settings()))
    return Report(snapshot.name, len(files), snapshot.size_bytes, moved, notes, warnings)


def verify(uri: str, snapshot: str | None = None, key_file: Path | None = None) -> Report:
    """Read every piece of a snapshot and prove that it is what was written.

    A damaged piece is put aside, so that the next `create` sends it again.

    Raises:
        IntegrityError: files are damaged or incomplete; names them.
    """
    repository = Repository(uri, key_file or default_key_file())
    chosen = repository.read(snapshot)
    pieces = dict.fromkeys(piece for entry in chosen.files.values() for piece in entry.pieces)
    read = {piece: _read_piece(repository, piece) for piece in pieces}
    damaged = [f"{name}: {problem}" for name, entry in chosen.files.items() if (problem := _problem(entry, read))]
    if damaged:
        raise IntegrityError(
            f"{len(damaged)} of {len(chosen.files)} files of snapshot {chosen.name} cannot be restored:\n  "
            + "\n  ".join(damaged[:20]),
            _put_aside(repository, [piece for piece, result in read.items() if isinstance(result, str)]),
        )
    return Report(chosen.name, len(chosen.files), chosen.size_bytes, chosen.size_bytes, chosen.notes)


@terminated_as_interrupted()
def restore(
    uri: str, into: Path, snapshot: str | None = None, key_file: Path | None = None, store: str | None = None
) -> Report:
    """Write a snapshot into an empty folder, which then serves as `MODELYARD_HOME`.

    SIGTERM ends it as Ctrl-C does: nothing of it stays beside `into`.

    Args:
        into: made if absent; must hold nothing.
        store: folder or URI for the artifacts; by default `store` in `into`.

    Raises:
        ConfigError: `into` or `store` holds something, or `into` is a file.
        IntegrityError: a file is damaged; what was written before it is in `.NAME.part` beside `into`, complete file
            by file, until the next try.
        StorageError: `into` cannot be made.
    """
    into = into.resolve()
    if into.is_mount():
        raise ConfigError(f"{str(into)!r} is the root of a file system", "name a new folder in it")
    if into.exists() and not into.is_dir():
        raise ConfigError(f"{str(into)!r} is a file", "name a new folder; nothing is ever overwritten")
    if into.exists() and any(into.iterdir()):
        raise ConfigError(f"{str(into)!r} is not empty", "name a new folder; nothing is ever overwritten")
    if store is not None:
        fs, root = resolve(store)
        with translate_errors(store):
            if list_files(fs, root):
                raise ConfigError(f"{store} is not empty", "name an empty folder or prefix")
    repository = Repository(uri, key_file or default_key_file())
    chosen = repository.read(snapshot)
    with _staged(into) as folder:
        for name, entry in chosen.files.items():
            _write(repository, name, entry, folder, store)
        for name, mode in sorted(chosen.folders.items(), reverse=True):
            if (folder / name).is_dir():
                (folder / name).chmod(mode)
    return Report(chosen.name, len(chosen.files), chosen.size_bytes, chosen.size_bytes, chosen.notes)


def snapshots(uri: str, key_file: Path | None = None) -> list[Snapshot]:
    """All snapshots, oldest first; one that cannot be read has a problem and no files."""
    repository = Repository(uri, key_file or default_key_file())
    return [_read(repository, name) for name in repository.names()]


def _require_elsewhere(uri: str) -> None:
    """Refuse a backup that would be lost together with what it keeps."""
    if not is_local(uri):
        return
    at, here = local_path(uri).resolve(), settings()
    kept = {"MODELYARD_HOME": here.home}
    if is_local(here.store):
        kept["MODELYARD_STORE"] = local_path(here.store)
    for name, folder in kept.items():
        if at.is_relative_to(folder.resolve()):
            raise ConfigError(
                f"{uri} is in {name} ({folder}), which it backs up: one would be lost with the other",
                "name a folder on another disk, or a URI such as s3://bucket/prefix",
            )


def _read(repository: Repository, name: str) -> Snapshot:
    try:
        return repository.read(name)
    except IntegrityError as error:
        return Snapshot(name, {}, problem=error.problem)


def _before(repository: Repository) -> tuple[Mapping[str, Entry], tuple[str, ...]]:
    """Files of the newest snapshot that can be read, and what is wrong with newer ones."""
    warnings: list[str] = []
    for name in reversed(repository.names()):
        snapshot = _read(repository, name)
        if not snapshot.problem:
            return snapshot.files, tuple(warnings)
        warnings.append(f"{snapshot.problem}; this snapshot does not need it")
    return {}, tuple(warnings)


def _read_piece(repository: Repository, piece: str) -> int | str:
    """Bytes in a piece, or what is wrong with it."""
    try:
        return len(repository.get(piece))
    except IntegrityError as error:
        return error.problem


def _problem(entry: Entry, read: Mapping[str, int | str]) -> str | None:
    size = 0
    for piece in entry.pieces:
        result = read[piece]
        if isinstance(result, str):
            return result
        size += result
    return None if size == entry.size_bytes else f"{size} bytes instead of {entry.size_bytes}"


def _put_aside(repository: Repository, bad: Iterable[str]) -> str:
    """Move bad pieces out of the way; what to do next."""
    again = "modelyard backup create sends again what is still unchanged here; then verify this snapshot once more"
    there = [piece for piece in bad if piece in repository.pieces]
    if not there:
        return again
    left = {piece: problem for piece in there if (problem := _move_aside(repository, piece))}
    if left:
        return (
            f"damaged pieces could not be put aside ({next(iter(left.values()))}): remove by hand from "
            f"{repository.uri}/pieces: {', '.join(left)}; then {again}"
        )
    return f"damaged pieces were put aside in {repository.uri}/damaged; {again}"


def _move_aside(repository: Repository, piece: str) -> str:
    try:
        repository.put_aside(piece)
    except (StorageError, InputError) as error:
        return error.problem
    return ""


@contextlib.contextmanager
def _staged(into: Path) -> Iterator[Path]:
    """A folder beside `into` that takes its place at the end. One that a stopped restore left is removed."""
    part = into.with_name(f".{into.name}.part")
    try:
        with contextlib.suppress(FileNotFoundError), _locked(part):
            shutil.rmtree(part)
        part.mkdir(parents=True, mode=0o700)
    except OSError as error:
        raise StorageError(f"{str(part)!r} cannot be made: {error}", "name a folder you own") from error
    try:
        with _locked(part):
            yield part
            part.rename(into)
    except IntegrityError as error:
        raise IntegrityError(error.problem, f"{error.todo}; what came before it is in {part}") from error
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise ConfigError(f"another restore writes to {str(folder)!r}", "wait for it, or name another folder") from None
    finally:
        os.close(descriptor)


def _store(repository: Repository, source: Source, before: Entry | None) -> tuple[Entry, int]:
    is_known = before is not None and source.is_final and before.is_final and before.size_bytes == source.size_bytes
    if is_known and before is not None and repository.has(before):
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
        yield repository.get(piece)


def _write(repository: Repository, name: str, entry: Entry, into: Path, store: str | None) -> None:
    target = into / name
    if not target.resolve().is_relative_to(into.resolve()):
        raise IntegrityError(f"{name!r} leads out of {str(into)!r}", "this is no snapshot of Modelyard's")
    for folder in reversed(target.relative_to(into).parents[:-1]):
        (into / folder).mkdir(exist_ok=True, mode=0o700 if folder.parts[0] == SECRETS else 0o755)
    temporary = target.with_name(f".{target.name}.part")
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
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
