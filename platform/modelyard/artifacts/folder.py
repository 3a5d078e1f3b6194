"""One artifact as a local folder: list it, check every byte against its manifest, commit it by one rename."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from modelyard.artifacts.filesystem import fsync_folder, hash_file
from modelyard.artifacts.manifest import MANIFEST_NAME, FileEntry, Manifest, check_name
from modelyard.artifacts.unsafe import refuse_unsafe
from modelyard.errors import DataError, IntegrityError, NotFoundError

HASH_THREADS = 4
_ADVICE = "nothing was read from it; store the artifact again, or restore the named files from a copy"


def list_folder(folder: Path) -> list[str]:
    """The files of a folder that is to be stored, as sorted `/` paths.

    Raises:
        NotFoundError: there is no such folder.
        DataError: it is empty, or holds a symbolic link, a device, or a file with an impossible name.
    """
    if not folder.is_dir():
        raise NotFoundError(f"there is no folder {str(folder)!r}", "give the folder that holds the artifact's files")
    names = []
    for name, mode in _walk(folder):
        if not stat.S_ISREG(mode):
            raise DataError(f"{name!r} in {str(folder)!r} is {_type(mode)}", "replace it by a regular file")
        try:
            check_name(name)
        except ValueError as error:
            raise DataError(f"{str(folder)!r}: {error}", "rename it") from None
        names.append(name)
    if not names:
        raise DataError(f"folder {str(folder)!r} holds no file", "an artifact needs at least one")
    return names


def check_folder(folder: Path, manifest: Manifest, label: str) -> None:
    """Read every byte of a stored artifact and compare it with its manifest.

    Raises:
        IntegrityError: files are damaged, missing or not listed; all of them are named.
        UnsafeFileError: one is a pickle.
    """
    found = dict(_walk(folder))
    found.pop(MANIFEST_NAME, None)
    problems = compare_names(found, manifest)
    regular = [name for name in manifest.files if name in found and stat.S_ISREG(found[name])]
    problems.update({n: f"is {_type(found[n])}" for n in found if n in manifest.files and n not in regular})
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        for name, problem in pool.map(lambda n: (n, _damage(folder / n, manifest.files[n])), regular):
            if problem:
                problems[name] = problem
    refuse_damage(problems, manifest, label)
    for name in regular:
        refuse_unsafe(folder / name, name)


def compare_names(found: Iterable[str], manifest: Manifest) -> dict[str, str]:
    """What is wrong by name alone: file -> "is missing" or "is not in the manifest"."""
    names = set(found)
    problems = {name: "is missing" for name in manifest.files if name not in names}
    problems.update({name: "is not in the manifest" for name in names if name not in manifest.files})
    return problems


def refuse_damage(problems: dict[str, str], manifest: Manifest, label: str) -> None:
    """Raise one `IntegrityError` that names every damaged file; do nothing when there is none."""
    if problems:
        shown = "".join(f"\n  {name!r} {problems[name]}" for name in sorted(problems)[:20])
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        count = f"{len(problems)} damaged, missing or unlisted file{'s' if len(problems) > 1 else ''}"
        raise IntegrityError(f"{manifest.kind} {manifest.name!r} ({label}) has {count}:{shown}{more}", _ADVICE)


def commit_folder(staged: Path, final: Path) -> bool:
    """Put a complete, synced folder in its place by one rename; False when another process was first."""
    for folder in {path.parent for path in staged.rglob("*")} | {staged}:
        fsync_folder(folder)
    final.parent.mkdir(parents=True, exist_ok=True)
    try:
        staged.rename(final)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    fsync_folder(final.parent)
    return True


def remove_folder(folder: Path, aside: Path) -> None:
    """Make a folder vanish at once (rename to `aside`), then free its space. Open files stay readable."""
    aside.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.rename(aside)
    except FileNotFoundError:
        return  # another process did it
    shutil.rmtree(aside, ignore_errors=True)


def age_s(folder: Path) -> float:
    """Seconds since anything below `folder` was written; 0 when it is gone."""
    newest = 0.0
    for parent, folders, files in os.walk(folder):  # skips what its owner, at work, just renamed or removed
        for name in (".", *folders, *files):
            with contextlib.suppress(FileNotFoundError):
                newest = max(newest, Path(parent, name).lstat().st_mtime)
    return time.time() - newest if newest else 0.0


def _damage(path: Path, expected: FileEntry) -> str:
    try:
        size = path.stat().st_size
        if size != expected.size_bytes:
            return f"has {size} bytes, not {expected.size_bytes}"
        actual = hash_file(path)
    except FileNotFoundError:
        return "is missing"
    if actual != expected:
        return f"differs: its SHA-256 is {actual.sha256[:16]}…, not {expected.sha256[:16]}…"
    return ""


def _walk(folder: Path) -> Iterator[tuple[str, int]]:
    """Name and mode of everything that is not a folder, sorted; links are not followed."""
    for parent, folders, files in os.walk(folder, onerror=_raise):
        folders.sort()
        links = [name for name in folders if Path(parent, name).is_symlink()]
        for name in sorted(files + links):
            path = Path(parent, name)
            yield path.relative_to(folder).as_posix(), path.lstat().st_mode


def _raise(error: OSError) -> None:
    raise error


def _type(mode: int) -> str:
    return "a symbolic link" if stat.S_ISLNK(mode) else "not a regular file"
