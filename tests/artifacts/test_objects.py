"""The store on a real S3 server (SeaweedFS)."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from modelyard.artifacts import Manifest, Store, objects
from modelyard.artifacts.filesystem import list_files, resolve, write_bytes
from modelyard.errors import IntegrityError, NotFoundError, StorageError, UnsafeFileError


def put(store: Store, folder: Path, **others: object) -> Manifest:
    return store.put(folder, kind="model", name="tiny", **others)  # type: ignore[arg-type]


def place(store: Store, manifest: Manifest, file: str) -> tuple[object, str]:
    fs, root = resolve(store.uri)
    return fs, f"{root}/models/{manifest.digest().removeprefix('sha256:')}/{file}"


@pytest.fixture
def store(s3_store_uri: str, tmp_path: Path) -> Store:
    return Store(s3_store_uri, tmp_path / "cache")


def test_an_artifact_goes_up_and_is_opened_through_the_cache(store: Store, folder: Path, tmp_path: Path) -> None:
    manifest = put(store, folder)
    assert put(store, folder).digest() == manifest.digest()
    assert store.digests("model") == [manifest.digest()]
    store.verify("model", manifest.digest())
    opened = store.open("model", manifest.digest())
    assert tmp_path / "cache" in opened.parents
    assert {p.relative_to(opened).as_posix() for p in opened.rglob("*") if p.is_file()} == {
        *manifest.files,
        "manifest.json",
    }
    assert all((opened / name).read_bytes() == (folder / name).read_bytes() for name in manifest.files)


def test_a_cached_artifact_is_opened_without_the_server(
    store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = put(store, folder).digest()
    opened = store.open("model", digest)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    assert store.open("model", digest) == opened
    with pytest.raises(StorageError, match=r"127\.0\.0\.1:1"):
        store.digests("model")


@pytest.mark.parametrize("damage", ["change", "remove", "add", "manifest", "remove manifest", "link"])
def test_a_damaged_cache_entry_is_fetched_again(store: Store, folder: Path, damage: str) -> None:
    digest = put(store, folder).digest()
    opened = store.open("model", digest)
    if damage == "change":
        (opened / "config.json").write_bytes(b'{"layers": 9}')
    elif damage == "remove":
        (opened / "config.json").unlink()
    elif damage == "add":
        (opened / "evil.py").write_bytes(b"import os")
    elif damage == "manifest":
        (opened / "manifest.json").write_bytes(b"{}")
    elif damage == "remove manifest":
        (opened / "manifest.json").unlink()
    else:
        (opened / "config.json").unlink()
        (opened / "config.json").symlink_to(folder / "config.json")
    again = store.open("model", digest)
    assert (again / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    assert not (again / "config.json").is_symlink()
    assert not (again / "evil.py").exists()
    assert Manifest.read(again).digest() == digest


@pytest.mark.parametrize("content", [b'{"layers": 9}', b"{}"])
def test_a_changed_object_is_found_and_named(store: Store, folder: Path, content: bytes) -> None:
    manifest = put(store, folder)
    write_bytes(*place(store, manifest, "config.json"), content)  # type: ignore[arg-type]
    for read in (store.verify, store.open):
        with pytest.raises(IntegrityError, match=r"config\.json"):
            read("model", manifest.digest())
    put(store, folder)  # repairs it
    store.verify("model", manifest.digest())


def test_missing_and_unlisted_objects_are_found_and_named(store: Store, folder: Path) -> None:
    manifest = put(store, folder)
    fs, path = place(store, manifest, "config.json")
    fs.delete_file(path)  # type: ignore[attr-defined]
    write_bytes(*place(store, manifest, "extra.json"), b"x")  # type: ignore[arg-type]
    for read in (store.verify, store.open):
        with pytest.raises(
            IntegrityError, match=r"(?s)'config\.json' is missing.*'extra\.json' is not in the manifest"
        ):
            read("model", manifest.digest())
    put(store, folder)
    store.verify("model", manifest.digest())


def test_a_changed_manifest_is_found(store: Store, folder: Path) -> None:
    manifest = put(store, folder)
    write_bytes(*place(store, manifest, "manifest.json"), manifest.to_bytes().replace(b"tiny", b"tinx"))  # type: ignore[arg-type]
    with pytest.raises(IntegrityError, match=r"manifest\.json"):
        store.open("model", manifest.digest())


def test_a_pickle_put_there_by_another_tool_is_not_opened(
    store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "weights.bin").write_bytes(b"\x80\x04}\x94.")
    monkeypatch.setattr("modelyard.artifacts.store.refuse_unsafe", lambda *_: None)
    manifest = put(store, folder)
    with pytest.raises(UnsafeFileError, match=r"weights\.bin"):
        store.open("model", manifest.digest())
    assert not any((Path(store.open.__self__._root) / "models").glob("*"))  # type: ignore[attr-defined]


_PUT = """
import sys, time, pathlib
from modelyard.artifacts import Store, objects
real = objects.write_bytes
def stuck(*arguments):
    print("files are up", flush=True)
    time.sleep(600)
objects.write_bytes = stuck
Store(sys.argv[1], pathlib.Path(sys.argv[2])).put(pathlib.Path(sys.argv[3]), kind="model", name="tiny")
"""


def test_a_kill_before_the_manifest_leaves_nothing_visible(store: Store, folder: Path, tmp_path: Path) -> None:
    previous = put(store, folder)
    (folder / "config.json").write_bytes(b'{"layers": 3}')
    command = [sys.executable, "-c", _PUT, store.uri, str(tmp_path / "cache"), str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"files are up\n"
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    process.stdout.close()
    assert len(list_files(*resolve(store.uri))) == 5  # three of the previous one, two without a manifest
    assert store.digests("model") == [previous.digest()]
    store.verify("model", previous.digest())

    assert store.sweep(older_than_s=3600) == 0
    assert store.sweep(older_than_s=0) == 1
    assert len(list_files(*resolve(store.uri))) == 3
    new = put(store, folder)
    store.verify("model", new.digest())


def _open(uri: str, cache: str, digest: str, gate: object) -> None:
    gate.wait(60)  # type: ignore[attr-defined]
    Store(uri, Path(cache)).open("model", digest)


def test_processes_of_one_node_that_open_at_once_share_one_copy(store: Store, folder: Path, tmp_path: Path) -> None:
    digest = put(store, folder).digest()
    context = multiprocessing.get_context("spawn")
    gate = context.Barrier(3)
    arguments = (store.uri, str(tmp_path / "cache"), digest, gate)
    workers = [context.Process(target=_open, args=arguments) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(90)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert list((tmp_path / "cache" / ".staging").iterdir()) == []


def test_an_absent_artifact_is_not_found(store: Store) -> None:
    with pytest.raises(NotFoundError, match="no model sha256:00"):
        store.open("model", "sha256:" + "0" * 64)
    assert store.digests("model") == []
    assert store.sweep(0) == 0


def test_a_full_cache_disk_is_a_storage_error(
    store: Store, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = put(store, folder).digest()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))  # type: ignore[attr-defined]
    with pytest.raises(StorageError, match=r"disk is full: 0\.000 GiB free"):
        store.open("model", digest)


def test_a_file_that_changes_while_it_is_stored_is_refused(
    store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = objects.hash_file

    def hash_then_change(path: Path) -> object:
        entry = real(path)
        path.write_bytes(os.urandom(10))
        return entry

    monkeypatch.setattr(objects, "hash_file", hash_then_change)
    with pytest.raises(Exception, match="changed while it was stored"):
        put(store, folder)
    assert store.digests("model") == []
