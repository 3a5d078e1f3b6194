from __future__ import annotations

import hashlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from modelyard.artifacts import filesystem
from modelyard.artifacts.filesystem import (
    download,
    is_local,
    list_files,
    local_path,
    read_bytes,
    resolve,
    translate_errors,
    upload,
    write_bytes,
)
from modelyard.errors import ConfigError, NotFoundError, StorageError


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The same tests on a local folder and on a real S3 server."""
    return str(tmp_path / "root") if request.param == "local" else request.getfixturevalue("s3_store_uri")


def test_files_go_up_are_listed_and_come_down_unchanged(root: str, tmp_path: Path) -> None:
    content = os.urandom(9 << 20)  # more than one part of a multipart upload
    source = tmp_path / "source"
    source.write_bytes(content)
    fs, path = resolve(root)
    name = "deep/a b+%20ü#?.bin"
    sent = upload(fs, source, f"{path}/{name}")
    assert (sent.sha256, sent.size_bytes) == (hashlib.sha256(content).hexdigest(), len(content))
    write_bytes(fs, f"{path}/small", b"one")
    write_bytes(fs, f"{path}/small", b"two")
    assert list_files(fs, path) == {name: len(content), "small": 3}
    assert read_bytes(fs, f"{path}/small") == b"two"
    assert download(fs, f"{path}/{name}", tmp_path / "new" / "target") == sent
    assert (tmp_path / "new" / "target").read_bytes() == content
    assert list_files(fs, f"{path}/absent") == {}


def test_a_missing_file_is_not_found_and_leaves_nothing_behind(root: str, tmp_path: Path) -> None:
    fs, path = resolve(root)
    with pytest.raises(NotFoundError), translate_errors(root):
        download(fs, f"{path}/absent", tmp_path / "new" / "target")
    assert list((tmp_path / "new").iterdir()) == []


def test_a_failed_upload_leaves_nothing_behind(root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(reader: object, writer: object) -> None:
        writer.write(b"half")  # type: ignore[attr-defined]
        raise OSError(5, "Input/output error")

    (tmp_path / "source").write_bytes(b"whole")
    monkeypatch.setattr(filesystem, "_pump", broken)
    fs, path = resolve(root)
    with pytest.raises(StorageError, match="Input/output error"), translate_errors(root):
        upload(fs, tmp_path / "source", f"{path}/x")
    assert list_files(fs, path) == {}


def test_a_kill_while_writing_leaves_the_old_content(tmp_path: Path) -> None:
    target = tmp_path / "latest"
    code = (
        "import sys; from modelyard.artifacts.filesystem import resolve, write_bytes\n"
        "fs, path = resolve(sys.argv[1]); print('go', flush=True)\n"
        "while True:\n"
        "    for letter in (b'a', b'b'): write_bytes(fs, path, letter * 300_000)\n"
    )
    for pause_s in (0.05, 0.1, 0.15):
        process = subprocess.Popen([sys.executable, "-c", code, str(target)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(pause_s)
        process.kill()
        process.wait(10)
        process.stdout.close()
        if target.exists():
            assert target.read_bytes() in (b"a" * 300_000, b"b" * 300_000)


def test_local_paths_and_file_uris_are_the_same_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local_path("a b") == local_path("~/a b") == local_path(f"file://{tmp_path}/a%20b") == tmp_path / "a b"
    assert [is_local(uri) for uri in ("a", "file:///a", "s3://b", "gs://b")] == [True, True, False, False]


@pytest.mark.parametrize(
    ("uri", "claim"),
    [
        ("ftp://host/a", "unknown scheme 'ftp'"),
        ("s3:///a", "names no bucket"),
        ("s3://key:secret@bucket/a", "holds a key"),
        ("file://other-host/a", "names the host"),
        ("file:/a/b", "has one slash after file:\n  -> write file:///a/b"),
        ("s3:/bucket/a", "has one slash after s3:\n  -> write s3://bucket/a"),
    ],
)
def test_uris_that_cannot_work_are_refused_without_leaking_keys(uri: str, claim: str) -> None:
    with pytest.raises(ConfigError, match=claim) as raised:
        resolve(uri)
    assert "secret" not in str(raised.value)


def test_a_name_with_a_colon_is_a_folder_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("run:1", "a/b:/c", "./file:/a"):
        assert local_path(name) == Path(resolve(name)[1]) == tmp_path / name


def assert_unreachable(uri: str, seconds: float, *claims: str) -> None:
    started = time.monotonic()
    with pytest.raises(StorageError, match="cannot reach") as raised, translate_errors(uri):
        list_files(*resolve(uri))
    assert time.monotonic() - started < seconds
    for claim in (*claims, "AWS_ENDPOINT_URL", "AWS_REGION"):
        assert claim in str(raised.value)


@pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
def test_an_unreachable_s3_is_a_quick_storage_error_that_names_it(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "http://127.0.0.1:1")
    assert_unreachable("s3://tests/a", 8, "http://127.0.0.1:1", "127.0.0.1 port 1")


def test_a_server_that_accepts_and_never_answers_is_given_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELYARD_S3_TIMEOUT_S", "1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert_unreachable("s3://tests/a", 15, "MODELYARD_S3_TIMEOUT_S")


def test_a_wrong_key_is_a_storage_error_that_names_the_variables(
    s3_store_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        with monkeypatch.context() as patch:
            patch.setenv(key, "wrong")
            with pytest.raises(StorageError, match="denied") as raised, translate_errors(s3_store_uri):
                list_files(*resolve(s3_store_uri))
            assert key in raised.value.todo


def test_a_missing_bucket_is_not_found(s3_store_uri: str) -> None:
    with pytest.raises(NotFoundError, match="no bucket 'absent-bucket'"), translate_errors("s3://absent-bucket/a"):
        list_files(*resolve("s3://absent-bucket/a"))


@pytest.mark.parametrize("text", ["0", "-1", "soon", "inf", "nan"])
def test_a_bad_timeout_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELYARD_S3_TIMEOUT_S", text)
    with pytest.raises(ConfigError, match="MODELYARD_S3_TIMEOUT_S"):
        resolve("s3://tests/a?region=us-east-1")


def test_a_folder_nobody_may_write_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="permission denied"), translate_errors(tmp_path):
        raise PermissionError(13, "Permission denied", str(tmp_path))
