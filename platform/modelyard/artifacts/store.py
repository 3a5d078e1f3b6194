"""Where artifacts live: one folder per artifact, named by the digest of its manifest.

    <root>/models/<64 hex>/manifest.json, weights.safetensors, ...
    <root>/datasets/<64 hex>/...
    <root>/.staging/<uuid>/             being written; nobody looks here

On a local disk an artifact appears by one rename of a complete, synced folder. On an object store the files go
first and `manifest.json` last; without it an artifact does not exist. So a kill at any moment leaves no half
artifact.
"""

from __future__ import annotations

import fcntl
import functools
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from modelyard.artifacts import objects
from modelyard.artifacts.filesystem import copy_file, is_local, local_path, resolve, write_bytes
from modelyard.artifacts.folder import (
    HASH_THREADS,
    age_s,
    check_folder,
    commit_folder,
    list_folder,
    remove_folder,
)
from modelyard.artifacts.manifest import (
    MANIFEST_NAME,
    FileEntry,
    Kind,
    Manifest,
    Parent,
    build_manifest,
    check_digest,
)
from modelyard.artifacts.storage_errors import check_free_space, translate_errors
from modelyard.artifacts.unsafe import refuse_unsafe, refuse_unsafe_name
from modelyard.config import settings
from modelyard.errors import IntegrityError, NotFoundError

_STAGING = ".staging"
_ABANDONED_S = 24 * 3600.0
_Build = Callable[[Mapping[str, FileEntry]], Manifest]


class Store:
    """Artifacts below one folder or URI, with a node-local cache of verified copies for remote ones."""

    def __init__(self, uri: str, cache: Path) -> None:
        """Name the store; nothing is opened.

        Args:
            uri: a folder, `file://`, `s3://bucket/prefix` or `gs://bucket/prefix`; made when first written.
            cache: local folder for copies of remote artifacts.
        """
        self.uri = str(local_path(uri)) if is_local(uri) else uri.rstrip("/")
        self.is_local = is_local(uri)
        self._root = local_path(uri) if self.is_local else cache

    @classmethod
    def from_settings(cls) -> Store:
        """The store of this process: `MODELYARD_STORE`, with its cache below `MODELYARD_HOME`."""
        current = settings()
        return cls(current.store, current.cache)

    def put(
        self,
        folder: Path,
        *,
        kind: Kind,
        name: str,
        parents: tuple[Parent, ...] = (),
        metrics: Mapping[str, float] | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> Manifest:
        """Store a copy of every file of `folder`; it is visible as a whole or not at all.

        Storing the same content again gives the same artifact, and repairs it where it was damaged.

        Raises:
            NotFoundError, DataError: the folder cannot be stored: absent, empty, links, impossible names.
            ConfigError: the name, a metric or the config cannot be recorded.
            UnsafeFileError: a file is a pickle.
            StorageError: the store is full, unreachable or denies access.
        """
        names = list_folder(folder)
        with translate_errors(folder):
            for file in names:
                refuse_unsafe(folder / file, file)
            needed = sum((folder / file).stat().st_size for file in names)
        build = functools.partial(build_manifest, kind, name, parents=parents, metrics=metrics, config=config)
        build({})  # refuses a bad name or metric before the work of copying
        with translate_errors(self.uri, needed):
            if not self.is_local:
                return objects.put(*resolve(self.uri), folder, names, build)
            check_free_space(self._root, needed)
            return self._put_local(folder, names, build)

    def check_writable(self) -> None:
        """Write and delete a small object, so that a store that refuses does so before the work of hours.

        Raises:
            StorageError: the store is full, unreachable or denies access.
        """
        fs, root = resolve(self.uri)
        path = f"{root}/{_STAGING}/{uuid.uuid4().hex}"
        with translate_errors(self.uri):
            write_bytes(fs, path, b"writable")
            fs.delete_file(path)

    def manifest(self, kind: Kind, digest: str) -> Manifest:
        """The manifest of a stored artifact.

        Raises:
            NotFoundError: it is not in this store.
            IntegrityError: the manifest is damaged, or belongs to another digest.
        """
        final = self._folder(kind, digest)
        if self.is_local or (final / MANIFEST_NAME).exists():
            try:
                with translate_errors(self.uri):
                    return _expect(Manifest.read(final / MANIFEST_NAME), kind, digest, self.uri)
            except NotFoundError:
                raise _absent(kind, digest, self.uri) from None
            except IntegrityError:
                if self.is_local:
                    raise  # a damaged cache entry is fetched again
        with translate_errors(self.uri):
            data = objects.read_manifest(*resolve(self.uri), kind, check_digest(digest))
        if data is None:
            raise _absent(kind, digest, self.uri)
        return _expect(Manifest.from_bytes(data, f"{MANIFEST_NAME} of {digest}"), kind, digest, self.uri)

    def open(self, kind: Kind, digest: str) -> Path:
        """A local folder with the artifact's files, every byte verified: in place, or in the node's cache.

        The files are shared; do not write to them. A damaged cache entry is fetched again.

        Raises:
            NotFoundError: it is not in this store.
            IntegrityError: a stored file is damaged, missing or not listed; it is named.
            UnsafeFileError: a file is a pickle.
            StorageError: the store is unreachable, or the cache's disk is full.
        """
        manifest, final = self.manifest(kind, digest), self._folder(kind, digest)
        for name in manifest.files:
            refuse_unsafe_name(name)
        with translate_errors(final, manifest.size_bytes):
            if self.is_local:
                check_folder(final, manifest, _label(digest))
            else:
                with self._one_at_a_time(digest):
                    self._fill_cache(manifest, final, digest)
        return final

    def verify(self, kind: Kind, digest: str) -> None:
        """Read every byte where it is stored (not in the cache) and compare it with the manifest.

        Raises:
            IntegrityError: files are damaged, missing or not listed; all of them are named.
            NotFoundError, StorageError: as for `open`.
        """
        manifest = self.manifest(kind, digest)
        with translate_errors(self.uri):
            if self.is_local:
                check_folder(self._folder(kind, digest), manifest, _label(digest))
            else:
                objects.check(*resolve(self.uri), manifest, _label(digest))

    def digests(self, kind: Kind) -> list[str]:
        """The digests of all complete artifacts of a kind, sorted."""
        with translate_errors(self.uri):
            if not self.is_local:
                return objects.digests(*resolve(self.uri), kind)
            return sorted(f"sha256:{path.parent.name}" for path in self._root.glob(f"{kind}s/*/{MANIFEST_NAME}"))

    def sweep(self, older_than_s: float = _ABANDONED_S) -> int:
        """Remove what killed writers left behind and nobody touched for `older_than_s` seconds.

        Returns:
            How many unfinished artifacts were removed.
        """
        with translate_errors(self.uri):
            staging = self._root / _STAGING
            left = [path for path in staging.iterdir() if age_s(path) >= older_than_s] if staging.is_dir() else []
            for path in left:
                shutil.rmtree(path, ignore_errors=True)
            return len(left) + (0 if self.is_local else objects.sweep(*resolve(self.uri), older_than_s))

    def _put_local(self, folder: Path, names: list[str], build: _Build) -> Manifest:
        self.sweep()
        with self._staged() as staged:
            with ThreadPoolExecutor(HASH_THREADS) as pool:
                entries = list(pool.map(lambda name: copy_file(folder / name, staged / name), names))
            for name in names:
                refuse_unsafe(staged / name, name)  # again: the source may have changed while it was copied
            manifest = build(dict(zip(names, entries, strict=True)))
            write_bytes(resolve(str(staged))[0], str(staged / MANIFEST_NAME), manifest.to_bytes())
            return self._commit(staged, manifest)

    def _commit(self, staged: Path, manifest: Manifest) -> Manifest:
        digest = manifest.digest()
        final = self._folder(manifest.kind, digest)
        if commit_folder(staged, final):
            return manifest
        with self._one_at_a_time(digest):  # somebody stored the same content before; one writer at a time repairs it
            while True:
                try:
                    existing = self.manifest(manifest.kind, digest)
                    check_folder(final, existing, _label(digest))
                    return existing
                except (IntegrityError, NotFoundError):
                    remove_folder(final, self._root / _STAGING / uuid.uuid4().hex)
                if commit_folder(staged, final):
                    return manifest

    def _fill_cache(self, manifest: Manifest, final: Path, digest: str) -> None:
        if final.exists():
            try:
                check_folder(final, manifest, _label(digest))
                _expect(Manifest.read(final / MANIFEST_NAME), manifest.kind, digest, str(final))
                return
            except (IntegrityError, NotFoundError):
                remove_folder(final, self._root / _STAGING / uuid.uuid4().hex)
        check_free_space(self._root, manifest.size_bytes)
        with self._staged() as staged:
            with translate_errors(self.uri, manifest.size_bytes):
                objects.fetch(*resolve(self.uri), manifest, staged, _label(digest))
            check_folder(staged, manifest, _label(digest))
            write_bytes(resolve(str(staged))[0], str(staged / MANIFEST_NAME), manifest.to_bytes())
            commit_folder(staged, final)

    def _folder(self, kind: Kind, digest: str) -> Path:
        return self._root / f"{kind}s" / check_digest(digest)

    @contextmanager
    def _staged(self) -> Iterator[Path]:
        staged = self._root / _STAGING / uuid.uuid4().hex
        staged.mkdir(parents=True)
        try:
            yield staged
        finally:
            shutil.rmtree(staged, ignore_errors=True)  # gone already when it was committed

    @contextmanager
    def _one_at_a_time(self, digest: str) -> Iterator[None]:
        """Let one writer of this node fetch or repair an artifact while the others wait for it."""
        lock = self._root / ".locks" / check_digest(digest)
        lock.parent.mkdir(parents=True, exist_ok=True)
        with lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # no timeout: the kernel frees it when its holder ends, however it ends
            yield


def _expect(manifest: Manifest, kind: Kind, digest: str, where: str) -> Manifest:
    if manifest.kind != kind or manifest.digest() != digest:
        raise IntegrityError(
            f"{where}: {MANIFEST_NAME} in {kind}s/{digest} is that of {manifest.kind} {manifest.digest()}",
            "nothing was read from it; store the artifact again",
        )
    return manifest


def _absent(kind: Kind, digest: str, where: str) -> NotFoundError:
    return NotFoundError(f"there is no {kind} {digest} in {where}", "check MODELYARD_STORE, or store it again")


def _label(digest: str) -> str:
    return digest[: len("sha256:") + 12]
