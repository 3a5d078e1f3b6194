"""What an artifact is: a folder with a `manifest.json` that names every file by its SHA-256.

The digest of the manifest is the artifact's identity. It covers everything but `created_at`, so that storing
the same content twice gives the same artifact; the time is protected by the checksum that the file carries.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError, field_validator

from modelyard.config import Config
from modelyard.errors import ConfigError, DataError, IntegrityError, NotFoundError

Kind = Literal["dataset", "model"]
KINDS: tuple[Kind, ...] = ("dataset", "model")
MANIFEST_NAME = "manifest.json"
NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
METRIC_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./ -]{0,199}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_CHECKSUM = "checksum"


class FileEntry(Config):
    """One file of an artifact."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """SHA-256 of the content, lower-case hex."""
    size_bytes: int = Field(ge=0)
    """Size of the content."""


class Parent(BaseModel):
    """An artifact that this one was made from."""

    model_config = Config.model_config  # not a Config: its `digest` is a field, not the digest of itself

    reference: str
    """How it was named then, e.g. `datasets:/pydocs/1`; aliases move, so the digest is what counts."""
    digest: str
    """`sha256:<hex>` of the parent's manifest."""


class Manifest(Config):
    """Everything known of one artifact: its files, where it came from, how good it is."""

    format_version: Literal[1] = 1
    """Version of this file's layout."""
    kind: Kind
    """What the artifact is."""
    name: str = Field(pattern=f"^{NAME_PATTERN}$")
    """Name it is registered under: letters, digits, `.`, `_` and `-`, at most 128."""
    created_at: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    """ISO time in UTC; not part of the digest."""
    files: dict[str, FileEntry]
    """Path inside the artifact (`/` as separator) to content."""
    parents: tuple[Parent, ...] = ()
    """What it was made from."""
    metrics: dict[str, float] = {}
    """Figures known when it was stored; later ones are written onto the registered version."""
    config: dict[str, Any] = {}
    """The config of the job that made it."""
    code: dict[str, str] = {}
    """Versions of the code that made it: modelyard, python, git commit."""

    @field_validator("files")
    @classmethod
    def _names_stay_inside(cls, files: dict[str, FileEntry]) -> dict[str, FileEntry]:
        for name in files:
            check_name(name)
        return files

    @field_validator("metrics")
    @classmethod
    def _metrics_have_plain_names(cls, metrics: dict[str, float]) -> dict[str, float]:
        for name in metrics:
            if not METRIC_NAME.fullmatch(name):
                raise ValueError(f"metric {name!r}: use letters, digits, '_', '-', '.', '/' and spaces")
        return metrics

    def digest(self) -> str:
        """The artifact's identity, `sha256:<64 hex>`, over canonical JSON without `created_at`."""
        return "sha256:" + hashlib.sha256(_canonical(self._plain(exclude={"created_at"}))).hexdigest()

    @property
    def size_bytes(self) -> int:
        """Sum of all files."""
        return sum(entry.size_bytes for entry in self.files.values())

    def to_bytes(self) -> bytes:
        """The content of `manifest.json`: readable JSON that carries a checksum of itself."""
        plain = self._plain()
        checksum = hashlib.sha256(_canonical(plain)).hexdigest()
        return json.dumps({_CHECKSUM: checksum, **plain}, indent=1, ensure_ascii=False).encode() + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes, source: str = MANIFEST_NAME) -> Manifest:
        """Read what `to_bytes` wrote.

        Raises:
            IntegrityError: it is not a manifest, or one byte of it was changed.
        """
        try:
            plain = json.loads(data)
            checksum = plain.pop(_CHECKSUM)
            manifest = cls.model_validate(plain)
            intact = data == manifest.to_bytes() and checksum == hashlib.sha256(_canonical(plain)).hexdigest()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            detail = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise IntegrityError(f"{source} is not a readable manifest: {detail}", _RESTORE) from error
        if not intact:
            raise IntegrityError(f"{source} was changed after it was written", _RESTORE)
        return manifest

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """The manifest at `path`, a `manifest.json` or the artifact's folder.

        Raises:
            NotFoundError: there is none.
            IntegrityError: it is damaged.
        """
        path = path / MANIFEST_NAME if path.is_dir() else path
        try:
            data = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise NotFoundError(f"there is no {MANIFEST_NAME} at {str(path)!r}", "name an artifact's folder") from None
        return cls.from_bytes(data, str(path))

    def _plain(self, exclude: set[str] | None = None) -> dict[str, Any]:
        plain: dict[str, Any] = self.model_dump(mode="json", exclude=exclude)
        return plain


def build_manifest(
    kind: Kind,
    name: str,
    files: Mapping[str, FileEntry],
    *,
    parents: tuple[Parent, ...] = (),
    metrics: Mapping[str, float] | None = None,
    config: Mapping[str, Any] | None = None,
) -> Manifest:
    """A manifest made now by this code.

    Raises:
        ConfigError: the name, a metric or the config cannot be recorded (NaN, or not expressible as JSON).
    """
    try:
        recorded = json.loads(json.dumps(dict(config or {}), default=_as_json, allow_nan=False))
        return Manifest(
            kind=kind,
            name=name,
            files=dict(sorted(files.items())),
            parents=parents,
            metrics=dict(sorted((metrics or {}).items())),
            config=recorded,
            code=code_version(str(Path.cwd())),
        )
    except ValidationError as error:
        detail = error.errors()[0]
        field = ".".join(str(part) for part in detail["loc"])
        raise ConfigError(f"{kind} {name!r}: {field}: {detail['msg']} (got {detail['input']!r})") from None
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{kind} {name!r}: its config cannot be recorded as JSON: {error}") from None


def check_name(name: str) -> None:
    """Refuse a file name that could leave the artifact's folder or hide another.

    Raises:
        ValueError: absolute, with `..`, `.`, an empty part, a backslash, a control character, or reserved.
    """
    parts = name.split("/")
    if name != PurePosixPath(name).as_posix() or any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"file name {name!r} is not a plain path inside the artifact")
    if "\\" in name or any(ord(character) < 32 or ord(character) == 127 for character in name):
        raise ValueError(f"file name {name!r} holds a backslash or a control character")
    if any("\ud800" <= character <= "\udfff" for character in name):
        raise ValueError(f"file name {name!r} is not valid UTF-8")
    if name == MANIFEST_NAME:
        raise ValueError(f"{MANIFEST_NAME!r} is the artifact's own record; rename the file")


def check_digest(digest: str) -> str:
    """The hex part of `sha256:<64 hex>`.

    Raises:
        DataError: it is anything else.
    """
    if not _DIGEST.fullmatch(digest):
        raise DataError(f"{digest!r} is not a digest", "give 'sha256:' and 64 lower-case hexadecimal digits")
    return digest.removeprefix("sha256:")


@functools.lru_cache(maxsize=8)
def code_version(folder: str) -> dict[str, str]:
    """Versions of this package, of Python and of the git checkout at `folder` (`+changes` when not clean)."""
    try:
        package = importlib.metadata.version("modelyard")
    except importlib.metadata.PackageNotFoundError:
        from modelyard import __version__ as package
    versions = {"modelyard": package, "python": platform.python_version()}
    commit = _git(folder, "rev-parse", "HEAD")
    if commit:
        changes = "+changes" if _git(folder, "status", "--porcelain", "--untracked-files=no") else ""
        versions["git"] = commit + changes
    return versions


_RESTORE = "nothing was read from it; restore it from a copy, or store the artifact again"


def _git(folder: str, *arguments: str) -> str:
    command = ["git", "--no-optional-locks", "-C", folder, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""  # no git, no checkout, or a slow disk: the commit is simply not known
    return done.stdout.strip()


def _as_json(value: Any) -> Any:
    if isinstance(value, Config):
        return value.model_dump(mode="json")
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"{type(value).__name__} is not JSON")


def _canonical(plain: Mapping[str, Any]) -> bytes:
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
