"""A folder of a run in the store, local or remote, seen the same from every worker and the driver."""

from __future__ import annotations

import contextlib
from pathlib import Path

from pyarrow import fs as pafs

from modelyard.artifacts import filesystem
from modelyard.artifacts.manifest import FileEntry


class RunFolder:
    """Small whole-file operations below `uri`; every error of the storage is a `StorageError`."""

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/")
        self._fs, self._root = filesystem.resolve(self.uri)

    @property
    def local(self) -> Path | None:
        """The folder itself when it is on a local (or shared) disk."""
        return filesystem.local_path(self.uri) if filesystem.is_local(self.uri) else None

    def sub(self, name: str) -> RunFolder:
        """A folder inside this one."""
        return RunFolder(f"{self.uri}/{name}")

    def read(self, name: str) -> bytes | None:
        """A file's content; None when there is no such file."""
        with filesystem.translate_errors(f"{self.uri}/{name}"):
            if self._fs.get_file_info(f"{self._root}/{name}").type != pafs.FileType.File:
                return None
            return filesystem.read_bytes(self._fs, f"{self._root}/{name}")

    def write(self, name: str, data: bytes) -> None:
        """Write a file so that it is there as a whole or not at all."""
        with filesystem.translate_errors(f"{self.uri}/{name}"):
            filesystem.write_bytes(self._fs, f"{self._root}/{name}", data)

    def folders(self) -> list[str]:
        """Names of the folders directly inside, sorted."""
        with filesystem.translate_errors(self.uri):
            inside = self._fs.get_file_info(pafs.FileSelector(self._root, allow_not_found=True))
        return sorted(info.base_name for info in inside if info.type == pafs.FileType.Directory)

    def files(self) -> list[str]:
        """Names of the files directly inside, sorted; none when there is no such folder."""
        with filesystem.translate_errors(self.uri):
            inside = self._fs.get_file_info(pafs.FileSelector(self._root, allow_not_found=True))
        return sorted(info.base_name for info in inside if info.type == pafs.FileType.File)

    def copy(self, name: str, target: RunFolder) -> None:
        """Copy the file `name` to the same name in `target`."""
        source, destination = f"{self._root}/{name}", f"{target._root}/{name}"
        with filesystem.translate_errors(f"{self.uri}/{name}"):
            target._fs.create_dir(destination.rpartition("/")[0], recursive=True)
            pafs.copy_files(source, destination, source_filesystem=self._fs, destination_filesystem=target._fs)

    def put(self, source: Path, name: str) -> FileEntry:
        """Move a local file in: a rename where `source` is on the same disk, else an upload."""
        local = self.local
        with filesystem.translate_errors(f"{self.uri}/{name}"):
            if local is not None:
                target = local / name
                target.parent.mkdir(parents=True, exist_ok=True)
                if source.stat().st_dev == target.parent.stat().st_dev:
                    entry = filesystem.hash_file(source)
                    source.replace(target)
                    return entry
            entry = filesystem.upload(self._fs, source, f"{self._root}/{name}")
            source.unlink()
            return entry

    def fetch(self, name: str, scratch: Path) -> tuple[Path, FileEntry]:
        """A local path of the file (in place on a local disk, else downloaded below `scratch`) and its digest."""
        local = self.local
        with filesystem.translate_errors(f"{self.uri}/{name}"):
            if local is not None:
                return local / name, filesystem.hash_file(local / name)
            return scratch / name, filesystem.download(self._fs, f"{self._root}/{name}", scratch / name)

    def delete(self, name: str, first: str) -> None:
        """Delete the folder `name`, its file `first` before all others; one that has gone already is fine.

        Some object stores go on listing a folder for a while after its last file was deleted.
        """
        with filesystem.translate_errors(f"{self.uri}/{name}"):
            if self._fs.get_file_info(f"{self._root}/{name}/{first}").type == pafs.FileType.File:
                self._fs.delete_file(f"{self._root}/{name}/{first}")
            with contextlib.suppress(FileNotFoundError):
                self._fs.delete_dir(f"{self._root}/{name}")
