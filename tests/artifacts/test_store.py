from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from modelyard.artifacts import Manifest, Parent, Store
from modelyard.errors import ConfigError, DataError, IntegrityError, NotFoundError, StorageError, UnsafeFileError


def put(store: Store, folder: Path, name: str = "tiny", **others: object) -> Manifest:
    return store.put(folder, kind="model", name=name, **others)  # type: ignore[arg-type]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def stored(store: Store, manifest: Manifest) -> Path:
    return Path(store.uri) / f"{manifest.kind}s" / manifest.digest().removeprefix("sha256:")


def test_an_opened_artifact_has_the_bytes_that_were_put(store: Store, folder: Path) -> None:
    manifest = put(store, folder, metrics={"loss": 1.5}, config={"steps": 3})
    opened = tree(store.open("model", manifest.digest()))
    opened.pop("manifest.json")
    assert opened == tree(folder)
    assert store.manifest("model", manifest.digest()) == manifest
    assert store.digests("model") == [manifest.digest()]
    assert store.digests("dataset") == []


def test_a_store_that_cannot_be_written_says_so_before_any_work(tmp_path: Path) -> None:
    good = Store(str(tmp_path / "good"), tmp_path / "cache")
    good.check_writable()
    assert [path for path in Path(good.uri).rglob("*") if path.is_file()] == []
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(NotFoundError, match="file/store"):
        Store(str(tmp_path / "file" / "store"), tmp_path / "cache").check_writable()


def test_the_same_content_is_the_same_artifact_and_other_lineage_is_another(store: Store, folder: Path) -> None:
    first, again = put(store, folder), put(store, folder)
    assert again == first
    parent = Parent(reference="datasets:/d/1", digest="sha256:" + "0" * 64)
    others = [
        put(store, folder, name="other"),
        put(store, folder, parents=(parent,)),
        put(store, folder, metrics={"m": 1}),
    ]
    assert len({m.digest() for m in (first, *others)}) == 4


@pytest.mark.parametrize("file", ["config.json", "weights/part 1.safetensors"])
@pytest.mark.parametrize("position", [0, -1])
def test_one_changed_byte_is_found_and_the_file_named(store: Store, folder: Path, file: str, position: int) -> None:
    manifest = put(store, folder)
    path = stored(store, manifest) / file
    data, times = bytearray(path.read_bytes()), path.stat()
    data[position] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # size and time are as before
    for read in (store.open, store.verify):
        with pytest.raises(IntegrityError, match=file) as raised:
            read("model", manifest.digest())
        assert "1 damaged" in str(raised.value)


def test_any_changed_byte_of_the_manifest_is_found(store: Store, folder: Path) -> None:
    manifest = put(store, folder, metrics={"loss": 1.5})
    path = stored(store, manifest) / "manifest.json"
    intact = path.read_bytes()
    for position in range(len(intact)):
        path.write_bytes(intact[:position] + bytes([intact[position] ^ 1]) + intact[position + 1 :])
        with pytest.raises(IntegrityError, match=r"manifest\.json"):
            store.open("model", manifest.digest())


def test_missing_unlisted_and_replaced_files_are_all_named(store: Store, folder: Path) -> None:
    manifest = put(store, folder)
    place = stored(store, manifest)
    (place / "weights" / "extra.bin").write_bytes(b"x")
    (place / "config.json").unlink()
    (place / "config.json").symlink_to(folder / "config.json")
    (place / "weights" / "part 1.safetensors").unlink()
    with pytest.raises(IntegrityError) as raised:
        store.open("model", manifest.digest())
    for claim in (
        "'config.json' is a symbolic link",
        "'weights/extra.bin' is not in the manifest",
        "'weights/part 1.safetensors' is missing",
    ):
        assert claim in str(raised.value)


def test_putting_the_content_again_repairs_a_damaged_artifact(store: Store, folder: Path) -> None:
    manifest = put(store, folder)
    (stored(store, manifest) / "config.json").write_bytes(b"{}")
    put(store, folder)
    store.verify("model", manifest.digest())


def test_a_folder_renamed_to_another_digest_is_refused(store: Store, folder: Path) -> None:
    manifest = put(store, folder)
    other = "sha256:" + "1" * 64
    stored(store, manifest).rename(Path(store.uri) / "models" / ("1" * 64))
    with pytest.raises(IntegrityError, match="is that of model"):
        store.open("model", other)
    with pytest.raises(NotFoundError):
        store.open("model", manifest.digest())


@pytest.mark.parametrize("digest", ["", "sha256:", "../../etc", "sha256:../../../etc/passwd", "SHA256:" + "0" * 64])
def test_what_is_not_a_digest_is_refused(store: Store, digest: str) -> None:
    with pytest.raises(DataError, match="not a digest"):
        store.open("model", digest)


def test_folders_that_cannot_be_stored_are_refused_with_the_reason(store: Store, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no file"):
        put(store, tmp_path / "empty")
    with pytest.raises(NotFoundError, match="no folder"):
        put(store, tmp_path / "absent")
    with pytest.raises(ConfigError, match=r"name.*'\.\./x'"):
        put(store, folder, name="../x")
    with pytest.raises(ConfigError, match=r"metrics\.loss.*got nan"):
        put(store, folder, metrics={"loss": float("nan")})
    with pytest.raises(ConfigError, match="cannot be recorded"):
        put(store, folder, config={"f": object()})
    assert not Path(store.uri).exists()


@pytest.mark.parametrize("bad", ["link", "folder-link", "fifo", "manifest.json", "back\\slash", "new\nline", b"\xff"])
def test_links_devices_and_impossible_names_are_refused(store: Store, folder: Path, bad: str | bytes) -> None:
    target = folder / os.fsdecode(bad)
    if bad == "link":
        target.symlink_to("/etc/hostname")
    elif bad == "folder-link":
        target.symlink_to("/etc", target_is_directory=True)
    elif bad == "fifo":
        os.mkfifo(target)
    else:
        target.write_bytes(b"x")
    with pytest.raises(DataError):
        put(store, folder)
    assert store.digests("model") == []


_PUT = """
import sys, pathlib
from modelyard.artifacts import Store, filesystem
pump = filesystem._pump
def slow(reader, writer):
    chunk = reader.read(100)
    if writer is not None:
        writer.write(chunk); getattr(writer, "flush", lambda: None)(); sys.stdout.write("half\\n"); sys.stdout.flush()
    import time; time.sleep(600)
filesystem._pump = slow
Store(sys.argv[1], pathlib.Path(sys.argv[2])).put(pathlib.Path(sys.argv[3]), kind="model", name="tiny")
"""


def test_a_kill_in_the_middle_of_put_leaves_no_half_artifact(store: Store, folder: Path, tmp_path: Path) -> None:
    previous = put(store, folder)
    (folder / "config.json").write_bytes(b'{"layers": 3}')
    command = [sys.executable, "-c", _PUT, store.uri, str(tmp_path / "cache"), str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"half\n"
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    process.stdout.close()
    assert list((Path(store.uri) / ".staging").iterdir()) != []
    assert store.digests("model") == [previous.digest()]
    store.verify("model", previous.digest())

    new = put(store, folder)
    store.verify("model", new.digest())
    assert store.sweep(older_than_s=3600) == 0
    assert store.sweep(older_than_s=0) == 1
    assert list((Path(store.uri) / ".staging").iterdir()) == []


def test_kills_at_random_moments_of_real_puts_never_show_a_half_artifact(store: Store, tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from modelyard.artifacts import Store\n"
        "s = Store(sys.argv[1], pathlib.Path('/nonexistent')); f = pathlib.Path(sys.argv[2]); print('go', flush=True)\n"
        "for i in range(10000):\n"
        "    (f / 'n.json').write_text(str(i)); s.put(f, kind='model', name='tiny')\n"
    )
    source = tmp_path / "source"
    source.mkdir()
    (source / "big.safetensors").write_bytes(os.urandom(2_000_000))
    for pause_s in (0.02, 0.05, 0.08):
        process = subprocess.Popen([sys.executable, "-c", code, store.uri, str(source)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(pause_s)
        process.kill()
        process.wait(10)
        process.stdout.close()
    for digest in store.digests("model"):
        store.verify("model", digest)


def test_an_artifact_appears_with_all_its_files_at_once(store: Store, tmp_path: Path) -> None:
    source = tmp_path / "many"
    source.mkdir()
    for number in range(400):
        (source / f"{number}.json").write_text(str(number))
    seen: list[int] = []
    done = threading.Event()

    def watch() -> None:
        while not seen and not done.is_set():
            seen.extend(len(list(place.iterdir())) for place in (Path(store.uri) / "models").glob("*"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    put(store, source)
    time.sleep(0.2)
    done.set()
    watcher.join(30)
    assert seen == [401]


def _put_many(uri: str, folder: str, gate: object) -> None:
    store = Store(uri, Path(uri) / "cache")
    gate.wait(30)  # type: ignore[attr-defined]
    for _ in range(5):
        put(store, Path(folder))


def test_processes_that_put_the_same_content_at_once_all_succeed(store: Store, folder: Path) -> None:
    context = multiprocessing.get_context("spawn")
    gate = context.Barrier(3)
    workers = [context.Process(target=_put_many, args=(store.uri, str(folder), gate)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    (digest,) = store.digests("model")
    store.verify("model", digest)
    assert list((Path(store.uri) / ".staging").iterdir()) == []


def test_threads_that_repair_the_same_artifact_at_once_all_succeed(store: Store, folder: Path) -> None:
    manifest = put(store, folder)
    (stored(store, manifest) / "config.json").write_bytes(b"{}")
    errors: list[BaseException] = []

    def run() -> None:
        try:
            put(store, folder)
        except BaseException as error:  # noqa: BLE001 - handed to the assertion below
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    store.verify("model", manifest.digest())


@pytest.fixture
def small_disk(tmp_path: Path) -> Path:
    mounted = tmp_path / "small"
    mounted.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", mounted], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"cannot mount a small disk here: {done.stderr.strip()}")
    yield mounted  # type: ignore[misc]
    subprocess.run(["umount", "-l", mounted], check=True)


def test_a_full_disk_is_a_storage_error_with_the_room_there_is(
    small_disk: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(str(small_disk / "store"), small_disk / "cache")
    previous = put(store, folder)
    (folder / "big.safetensors").write_bytes(os.urandom(6_000_000))
    claim = r"disk is full: 0\.00\d GiB free, 0\.006 GiB are needed"
    with pytest.raises(StorageError, match=claim):  # refused before the first byte
        put(store, folder)
    monkeypatch.setattr("modelyard.artifacts.store.check_free_space", lambda *_: None)
    with pytest.raises(StorageError, match=claim) as raised:  # the disk itself refuses, in the middle of a file
        put(store, folder)
    assert raised.value.__cause__.errno == 28  # type: ignore[union-attr]
    assert store.digests("model") == [previous.digest()]
    store.verify("model", previous.digest())
    assert list((small_disk / "store" / ".staging").iterdir()) == []


def test_a_file_size_limit_is_a_storage_error(store: Store, folder: Path) -> None:
    code = (
        "import sys, pathlib, resource\n"
        "from modelyard.artifacts import Store; from modelyard.errors import StorageError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "try: Store(sys.argv[1], pathlib.Path('/x')).put(pathlib.Path(sys.argv[2]), kind='model', name='tiny')\n"
        "except StorageError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, store.uri, str(folder)], capture_output=True, text=True)
    assert "beyond the largest size allowed" in done.stdout, done.stderr
    assert store.digests("model") == []


def test_a_pickle_is_refused_on_put_and_on_open(store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00}\x94\x8c\x01a\x94K\x01s.")
    with pytest.raises(UnsafeFileError, match=r"pytorch_model\.bin.*pickle") as raised:
        put(store, folder)
    assert "safetensors" in raised.value.todo
    monkeypatch.setattr("modelyard.artifacts.store.refuse_unsafe", lambda *_: None)
    manifest = put(store, folder)
    with pytest.raises(UnsafeFileError, match=r"pytorch_model\.bin"):
        store.open("model", manifest.digest())
