"""Where a backup lies: sealed pieces named by content, and one sealed list of files per snapshot.

    <root>/backup.json          format and salt
    <root>/pieces/ab/abcd...    written once, never changed
    <root>/snapshots/20261125T135900Z-1f2e3d4c
    <root>/damaged/abcd...     pieces that a check found damaged, put aside

A snapshot is written after all of its pieces, so a backup that was cut short leaves pieces that the next one uses, and
no snapshot that cannot be restored.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from modelyard.artifacts.filesystem import (
    is_local,
    list_files,
    local_path,
    read_bytes,
    resolve,
    translate_errors,
    write_bytes,
)
from modelyard.backup.sealing import SEAL_BYTES, Sealer, master_key
from modelyard.errors import ConfigError, IntegrityError, NotFoundError

FORMAT = 1
PIECE_BYTES = 16 << 20
"""Of a file in one piece: bounds memory, and what a small change of a large file costs."""
STALE_S = 24 * 3600
"""Age at which an unfinished file has no writer any more."""
_ABOUT, _PIECES, _SNAPSHOTS, _DAMAGED = "backup.json", "pieces", "snapshots", "damaged"
_SNAPSHOT = re.compile(r"[0-9]{8}T[0-9]{6,12}Z-[0-9a-f]{8}")
_HEX = re.compile(r"(?:[0-9a-f]{2})+")


@dataclass(frozen=True)
class Entry:
    """One file of a snapshot."""

    pieces: tuple[str, ...]
    size_bytes: int
    mode: int
    is_final: bool = False
    """Whether its content can never change under this name, so that it need not be read again."""

    @property
    def sealed_sizes(self) -> list[int]:
        """Bytes that each piece has in the backup."""
        left = [self.size_bytes - index * PIECE_BYTES for index in range(len(self.pieces))]
        return [min(PIECE_BYTES, each) + SEAL_BYTES for each in left]


@dataclass(frozen=True)
class Snapshot:
    """All files at one time, by names such as `store/models/<digest>/weights.safetensors`."""

    name: str
    files: Mapping[str, Entry]
    notes: tuple[str, ...] = field(default=())
    """What is not in it, and where to find that."""
    folders: Mapping[str, int] = field(default_factory=dict)
    """Permissions of its folders."""
    problem: str = ""
    """Why its list of files cannot be read; it then has none."""

    @property
    def size_bytes(self) -> int:
        """Of all files, before encryption."""
        return sum(entry.size_bytes for entry in self.files.values())


class Repository:
    """One backup folder or URI."""

    def __init__(self, uri: str, key_file: Path, *, make: bool = False) -> None:
        """Open it, or make it.

        Raises:
            NotFoundError: there is no backup, or no key.
            IntegrityError: it was made with another key or by a newer Modelyard, or `backup.json` is damaged or gone.
            StorageError: it cannot be reached.
        """
        self.uri = uri
        self._fs, self._root = resolve(uri)
        with translate_errors(uri):
            known = self._about()
            if known is None and not make:
                raise NotFoundError(f"no backup at {uri}", "modelyard backup create --at URI makes one")
            about = known or {"format": FORMAT, "salt": secrets.token_hex(16)}
            self.sealer = Sealer.of(master_key(key_file, bytes.fromhex(about["salt"]), make=known is None))
            if known is None:
                about["check"] = self.sealer.seal(_ABOUT, b"modelyard").hex()
                write_bytes(self._fs, f"{self._root}/{_ABOUT}", json.dumps(about).encode())
            else:
                self._check_key(known)
            found = list_files(self._fs, f"{self._root}/{_PIECES}") if known else {}
        self.pieces = {name.rpartition("/")[2]: size for name, size in found.items()}

    def has(self, entry: Entry) -> bool:
        """Whether all pieces of a file are there, in their full size."""
        sizes = zip(entry.pieces, entry.sealed_sizes, strict=True)
        return all(self.pieces.get(piece) == size for piece, size in sizes)

    def put(self, content: bytes) -> tuple[str, int]:
        """Store a piece unless it is there in its full size; its name, and the bytes written."""
        name = self.sealer.name(content)
        if self.pieces.get(name) == len(content) + SEAL_BYTES:
            return name, 0
        sealed = self.sealer.seal(name, content)
        with translate_errors(self.uri, len(sealed)):
            write_bytes(self._fs, self._piece(name), sealed)
        self.pieces[name] = len(sealed)
        return name, len(sealed)

    def get(self, name: str) -> bytes:
        """Read a piece, and check that it is what its name says.

        Raises:
            IntegrityError: it is gone, or not what was written.
        """
        if name not in self.pieces:
            raise IntegrityError(f"piece {name[:12]} is missing", "")
        with translate_errors(self.uri):
            content = self.sealer.open(name, read_bytes(self._fs, self._piece(name)))
        if self.sealer.name(content) != name:
            raise IntegrityError(f"piece {name[:12]} holds something else", "")
        return content

    def put_aside(self, name: str) -> None:
        """Move a damaged piece out of the way, so that the next backup sends it again.

        Raises:
            StorageError: the backup cannot be written from here.
        """
        with translate_errors(self.uri):
            self._fs.create_dir(f"{self._root}/{_DAMAGED}")
            self._fs.move(self._piece(name), f"{self._root}/{_DAMAGED}/{name}")
        del self.pieces[name]

    def clear(self) -> None:
        """Remove what writers that were killed left behind."""
        if not is_local(self.uri):  # object stores show a file once it is whole
            return
        root = local_path(self.uri)
        for pattern in (".*.tmp", f"{_SNAPSHOTS}/.*.tmp", f"{_PIECES}/*/.*.tmp"):
            for path in root.glob(pattern):
                with contextlib.suppress(OSError):
                    if time.time() - path.stat().st_mtime > STALE_S:
                        path.unlink()

    def names(self) -> list[str]:
        """All snapshots, oldest first."""
        with translate_errors(self.uri):
            found = list_files(self._fs, f"{self._root}/{_SNAPSHOTS}")
        return sorted(name for name in found if _SNAPSHOT.fullmatch(name))

    def write(
        self, files: Mapping[str, Entry], notes: tuple[str, ...], folders: Mapping[str, int] | None = None
    ) -> Snapshot:
        """Store the list of files, now that all pieces are there."""
        now = dt.datetime.now(dt.UTC)
        snapshot = Snapshot(f"{now:%Y%m%dT%H%M%S%fZ}-{secrets.token_hex(4)}", files, notes, folders or {})
        listed = {name: asdict(entry) for name, entry in files.items()}
        body = {"files": listed, "notes": notes, "folders": snapshot.folders}
        sealed = self.sealer.seal(snapshot.name, json.dumps(body).encode())
        with translate_errors(self.uri, len(sealed)):
            write_bytes(self._fs, f"{self._root}/{_SNAPSHOTS}/{snapshot.name}", sealed)
        return snapshot

    def read(self, name: str | None = None) -> Snapshot:
        """A snapshot by name or the beginning of it; by default the newest.

        Raises:
            ConfigError: several begin like this.
            NotFoundError: there is none.
            IntegrityError: it is damaged.
        """
        chosen = self._choose(name)
        with translate_errors(self.uri):
            sealed = read_bytes(self._fs, f"{self._root}/{_SNAPSHOTS}/{chosen}")
        try:
            body = json.loads(self.sealer.open(chosen, sealed))
        except IntegrityError:
            todo = "modelyard backup list shows the others: choose one by --snapshot; modelyard backup create makes one"
            raise IntegrityError(f"the list of files of snapshot {chosen} is damaged", todo) from None
        files = {each: Entry(**{**entry, "pieces": tuple(entry["pieces"])}) for each, entry in body["files"].items()}
        return Snapshot(chosen, files, tuple(body["notes"]), body.get("folders", {}))

    def _choose(self, name: str | None) -> str:
        if name == "":
            raise ConfigError("--snapshot is empty", "name a snapshot, or leave it out for the newest")
        names = self.names()
        found = [each for each in names if name is None or each.startswith(name)]
        if not found:
            todo = f"there are: {', '.join(names)}" if names else "modelyard backup create makes the first"
            raise NotFoundError(f"no snapshot {name or ''} in {self.uri}", todo)
        if name is not None and len(found) > 1 and name not in found:
            raise ConfigError(f"{len(found)} snapshots begin with {name}", f"name one of: {', '.join(found)}")
        return name if name in found else found[-1]

    def _about(self) -> dict[str, Any] | None:
        """What `backup.json` says; None when there is no backup yet."""
        path = f"{self._root}/{_ABOUT}"
        try:
            about = json.loads(read_bytes(self._fs, path))
        except FileNotFoundError:
            if self.names():
                todo = f"bring it back from a copy, or name an empty folder for a new backup: {path} held the salt"
                raise IntegrityError(f"{self.uri} holds snapshots, but its {_ABOUT} is missing", todo) from None
            return None
        except ValueError:
            about = None
        if isinstance(about, dict) and about.get("format", FORMAT) != FORMAT:
            raise IntegrityError(f"the backup at {self.uri} has format {about['format']}", "use a newer Modelyard")
        if not isinstance(about, dict) or not all(_is_hex(about.get(key)) for key in ("salt", "check")):
            raise IntegrityError(f"{path} is damaged", "restore it from a copy: without its salt nothing opens")
        return about

    def _check_key(self, about: Mapping[str, Any]) -> None:
        try:
            self.sealer.open(_ABOUT, bytes.fromhex(about["check"]))
        except IntegrityError:
            todo = "give the key file or the passphrase it was made with"
            raise IntegrityError(f"the backup at {self.uri} was made with another key", todo) from None

    def _piece(self, name: str) -> str:
        return f"{self._root}/{_PIECES}/{name[:2]}/{name}"


def _is_hex(value: object) -> bool:
    return isinstance(value, str) and _HEX.fullmatch(value) is not None
