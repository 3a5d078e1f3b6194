"""Artifacts on an object store: files first, `manifest.json` last. `store.Store` is the way in."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pyarrow import fs as pafs

from modelyard.artifacts.filesystem import (
    download,
    hash_file,
    hash_remote,
    list_files,
    read_bytes,
    upload,
    write_bytes,
)
from modelyard.artifacts.folder import compare_names, refuse_damage
from modelyard.artifacts.manifest import KINDS, MANIFEST_NAME, FileEntry, Kind, Manifest
from modelyard.errors import DataError, IntegrityError

_TRANSFERS = 4


def put(
    fs: pafs.FileSystem,
    root: str,
    folder: Path,
    names: list[str],
    build: Callable[[Mapping[str, FileEntry]], Manifest],
) -> Manifest:
    """Upload a folder and then its manifest; other files under its digest are removed.

    Raises:
        DataError: a file changed while it was read.
    """
    manifest = build({name: hash_file(folder / name) for name in names})
    target = _place(root, manifest.kind, manifest.digest().removeprefix("sha256:"))
    with ThreadPoolExecutor(_TRANSFERS) as pool:
        sent = list(pool.map(lambda name: upload(fs, folder / name, f"{target}/{name}"), names))
    for name, entry in zip(names, sent, strict=True):
        if entry != manifest.files[name]:
            fs.delete_file(f"{target}/{name}")
            raise DataError(f"{name!r} in {str(folder)!r} changed while it was stored", "store it when it is finished")
    for name in set(list_files(fs, target)) - set(names) - {MANIFEST_NAME}:
        fs.delete_file(f"{target}/{name}")
    write_bytes(fs, f"{target}/{MANIFEST_NAME}", manifest.to_bytes())
    return manifest


def read_manifest(fs: pafs.FileSystem, root: str, kind: Kind, hex_digest: str) -> bytes | None:
    """The bytes of an artifact's manifest, None when there is none."""
    path = f"{_place(root, kind, hex_digest)}/{MANIFEST_NAME}"
    return read_bytes(fs, path) if fs.get_file_info(path).type == pafs.FileType.File else None


def fetch(fs: pafs.FileSystem, root: str, manifest: Manifest, target: Path, label: str) -> None:
    """Download every listed file into `target`.

    Raises:
        IntegrityError: the store has not exactly the listed files, or a byte differs.
    """
    place = _checked_place(fs, root, manifest, label)
    with ThreadPoolExecutor(_TRANSFERS) as pool:
        got = pool.map(lambda name: (name, download(fs, f"{place}/{name}", target / name)), manifest.files)
        problems = {name: "differs from what was stored" for name, entry in got if entry != manifest.files[name]}
    refuse_damage(problems, manifest, label)


def check(fs: pafs.FileSystem, root: str, manifest: Manifest, label: str) -> None:
    """Read every byte at the store, keeping none.

    Raises:
        IntegrityError: files are damaged, missing or not listed.
    """
    place = _checked_place(fs, root, manifest, label)
    with ThreadPoolExecutor(_TRANSFERS) as pool:
        got = pool.map(lambda name: (name, hash_remote(fs, f"{place}/{name}")), manifest.files)
        problems = {name: "differs from what was stored" for name, entry in got if entry != manifest.files[name]}
    refuse_damage(problems, manifest, label)


def digests(fs: pafs.FileSystem, root: str, kind: Kind) -> list[str]:
    """The digests of all artifacts of a kind that have a manifest, sorted."""
    folders = fs.get_file_info(pafs.FileSelector(f"{root}/{kind}s", allow_not_found=True))
    paths = [f"{info.path}/{MANIFEST_NAME}" for info in folders if info.type == pafs.FileType.Directory]
    present = fs.get_file_info(paths) if paths else []
    return sorted(f"sha256:{info.path.split('/')[-2]}" for info in present if info.type == pafs.FileType.File)


def sweep(fs: pafs.FileSystem, root: str, older_than_s: float) -> int:
    """Remove files that lie under no manifest and are older than `older_than_s`; returns how many folders."""
    removed = 0
    for kind in KINDS:
        complete = {digest.removeprefix("sha256:") for digest in digests(fs, root, kind)}
        for folder in fs.get_file_info(pafs.FileSelector(f"{root}/{kind}s", allow_not_found=True)):
            if folder.type != pafs.FileType.Directory or folder.base_name in complete:
                continue
            files = fs.get_file_info(pafs.FileSelector(folder.path, recursive=True, allow_not_found=True))
            ages = [time.time() - info.mtime_ns / 1e9 for info in files if info.mtime_ns]
            if min(ages, default=older_than_s) >= older_than_s:
                fs.delete_dir(folder.path)
                removed += 1
    return removed


def _checked_place(fs: pafs.FileSystem, root: str, manifest: Manifest, label: str) -> str:
    place = _place(root, manifest.kind, manifest.digest().removeprefix("sha256:"))
    found = list_files(fs, place)
    if found.pop(MANIFEST_NAME, None) is None:
        raise IntegrityError(
            f"{manifest.kind} {manifest.name!r} ({label}) has lost its {MANIFEST_NAME}", "store it again"
        )
    problems = compare_names(found, manifest)
    for name in found.keys() & manifest.files.keys():
        if found[name] != manifest.files[name].size_bytes:
            problems[name] = f"has {found[name]} bytes, not {manifest.files[name].size_bytes}"
    refuse_damage(problems, manifest, label)
    return place


def _place(root: str, kind: Kind, hex_digest: str) -> str:
    return f"{root}/{kind}s/{hex_digest}"
