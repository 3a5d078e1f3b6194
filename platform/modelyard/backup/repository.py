"""Where a backup lies: sealed pieces named by content, and one sealed list of files per snapshot.

    <root>/backup.json          format and salt
    <root>/pieces/ab/abcd...    written once, never changed
    <root>/snapshots/20261125T135900Z-1f2e3d4c

A snapshot is written after all of its pieces, so a backup that was cut short leaves pieces that the next one uses, and
no snapshot that cannot be restored.
"""

from __future__ import annotations

import datetime as dt
import json
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from modelyard.artifacts.filesystem import list_files, read_bytes, resolve, translate_errors, write_bytes
from modelyard.backup.sealing import Sealer, master_key
from modelyard.errors import IntegrityError, NotFoundError

FORMAT = 1
PIECE_BYTES = 16 << 20
"""Of a file in one piece: bounds memory, and what a small change of a large file costs."""
_ABOUT, _PIECES, _SNAPSHOTS = "backup.json", "pieces", "snapshots"


@dataclass(frozen=True)
class Entry:
    """One file of a snapshot."""

    pieces: tuple[str, ...]
    size_bytes: int
    mode: int
    is_final: bool = False
    """Whether its content can never change under this name, so that it need not be read again."""


@dataclass(frozen=True)
class Snapshot:
    """All files at one time, by names such as `store/models/<digest>/weights.safetensors`."""

    name: str
    files: Mapping[str, Entry]
    notes: tuple[str, ...] = field(default=())
    """What is not in it, and where to find that."""

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
            IntegrityError: it was made with another key or by a newer Modelyard.
            StorageError: it cannot be reached.
        """
        self.uri = uri
        self._fs, self._root = resolve(uri)
        with translate_errors(uri):
            about = self._about(make)
            self.sealer = Sealer.of(master_key(key_file, bytes.fromhex(about["salt"]), make=make))
            self._check_key(about, make)
            found = list_files(self._fs, f"{self._root}/{_PIECES}") if not make or about.get("check") else {}
        self.pieces = {name.rpartition("/")[2]: size for name, size in found.items()}

    def put(self, content: bytes) -> tuple[str, int]:
        """Store a piece unless it is there; its name, and the bytes written."""
        name = self.sealer.name(content)
        if name in self.pieces:
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
            return self.sealer.open(name, read_bytes(self._fs, self._piece(name)))

    def names(self) -> list[str]:
        """All snapshots, oldest first."""
        with translate_errors(self.uri):
            return sorted(list_files(self._fs, f"{self._root}/{_SNAPSHOTS}"))

    def write(self, files: Mapping[str, Entry], notes: tuple[str, ...]) -> Snapshot:
        """Store the list of files, now that all pieces are there."""
        now = dt.datetime.now(dt.UTC)
        snapshot = Snapshot(f"{now:%Y%m%dT%H%M%S%fZ}-{secrets.token_hex(4)}", files, notes)
        body = {"files": {name: asdict(entry) for name, entry in files.items()}, "notes": notes}
        sealed = self.sealer.seal(snapshot.name, json.dumps(body).encode())
        with translate_errors(self.uri, len(sealed)):
            write_bytes(self._fs, f"{self._root}/{_SNAPSHOTS}/{snapshot.name}", sealed)
        return snapshot

    def read(self, name: str | None = None) -> Snapshot:
        """A snapshot by name or the beginning of it; by default the newest.

        Raises:
            NotFoundError: there is none.
            IntegrityError: it is damaged.
        """
        names = self.names()
        found = [each for each in names if name is None or each.startswith(name)]
        if not found:
            todo = f"there are: {', '.join(names)}" if names else "modelyard backup create makes the first"
            raise NotFoundError(f"no snapshot {name or ''} in {self.uri}", todo)
        with translate_errors(self.uri):
            sealed = read_bytes(self._fs, f"{self._root}/{_SNAPSHOTS}/{found[-1]}")
        body = json.loads(self.sealer.open(found[-1], sealed))
        files = {each: Entry(**{**entry, "pieces": tuple(entry["pieces"])}) for each, entry in body["files"].items()}
        return Snapshot(found[-1], files, tuple(body["notes"]))

    def _about(self, make: bool) -> dict[str, Any]:
        path = f"{self._root}/{_ABOUT}"
        try:
            about: dict[str, Any] = json.loads(read_bytes(self._fs, path))
        except FileNotFoundError:
            if not make:
                raise NotFoundError(f"no backup at {self.uri}", "modelyard backup create --to URI makes one") from None
            return {"format": FORMAT, "salt": secrets.token_hex(16)}
        except ValueError:
            raise IntegrityError(
                f"{path} is damaged", "restore it from a copy: without its salt nothing opens"
            ) from None
        if about.get("format") != FORMAT:
            raise IntegrityError(f"the backup at {self.uri} has format {about.get('format')}", "use a newer Modelyard")
        return about

    def _check_key(self, about: dict[str, Any], make: bool) -> None:
        if "check" in about:
            try:
                self.sealer.open(_ABOUT, bytes.fromhex(about["check"]))
            except IntegrityError:
                todo = "give the key file or the passphrase it was made with"
                raise IntegrityError(f"the backup at {self.uri} was made with another key", todo) from None
        elif make:
            about = {**about, "check": self.sealer.seal(_ABOUT, b"modelyard").hex()}
            write_bytes(self._fs, f"{self._root}/{_ABOUT}", json.dumps(about).encode())

    def _piece(self, name: str) -> str:
        return f"{self._root}/{_PIECES}/{name[:2]}/{name}"
