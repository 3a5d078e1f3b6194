from __future__ import annotations

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from modelyard.errors import ConfigError, StorageError
from modelyard.security import Caller, KeyStore
from modelyard.security.keys import key_id


class Clock:
    def __init__(self) -> None:
        self.now_s = 1_000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.db"


@pytest.fixture
def store(path: Path, clock: Clock) -> KeyStore:
    return KeyStore(f"sqlite:///{path}", clock=clock)


def identity(key: str) -> str:
    found = key_id(key)
    assert found is not None
    return found


def test_a_key_opens_its_record_and_no_other_does(store: KeyStore) -> None:
    key, other = store.create(tenant="a"), store.create(tenant="a")
    record = store.find(identity(key))
    assert record is not None
    assert record.opens_for(key)
    assert not record.opens_for(other)
    assert not record.opens_for(key[:-1] + ("A" if key[-1] != "A" else "B"))
    assert not record.opens_for(f"my-{record.id}-{other.partition('-')[2].partition('-')[2]}")


def test_keys_differ_and_have_256_random_bits(store: KeyStore) -> None:
    keys = {store.create(tenant="a") for _ in range(50)}
    assert len(keys) == 50
    assert {len(key) for key in keys} == {3 + 12 + 1 + 43}


def test_the_database_never_holds_a_secret(store: KeyStore, path: Path) -> None:
    key = store.create(tenant="a")
    store.close()
    held = b"".join(file.read_bytes() for file in path.parent.iterdir())
    assert identity(key).encode() in held
    assert key.encode() not in held
    assert key[16:].encode() not in held


def test_a_key_expires_at_its_moment(store: KeyStore, clock: Clock) -> None:
    record = store.find(identity(store.create(tenant="a", lifetime_s=60)))
    assert record is not None
    assert (record.state(1_059.9), record.state(1_060.0)) == ("active", "expired")


def test_revoking_twice_keeps_the_first_moment(store: KeyStore, clock: Clock) -> None:
    key = identity(store.create(tenant="a"))
    store.revoke(key)
    clock.now_s = 2_000.0
    store.revoke(key)
    record = store.find(key)
    assert record is not None
    assert (record.revoked_s, record.state(0)) == (1_000.0, "revoked")


@pytest.mark.parametrize("text", ["", "my-", "sk-123", "my-0123456789ab", "my-0123456789AB-" + "a" * 43, "a.b.c"])
def test_what_is_no_key_has_no_public_part(text: str) -> None:
    assert key_id(text) is None


def test_globs_bound_the_models_of_a_caller() -> None:
    caller = Caller(subject="key:a", tenant="a", models=("tiny-*", "digits"), within=("*-gpt", "d*"))
    assert caller.visible(["tiny-gpt", "tiny-bert", "digits", "large-gpt", "Tiny-gpt"]) == ["digits", "tiny-gpt"]


@pytest.mark.parametrize("limit", [0, -1, 2**31])
def test_a_limit_out_of_range_is_refused(store: KeyStore, limit: int) -> None:
    with pytest.raises(ConfigError, match="rpm"):
        store.create(tenant="a", requests_per_minute=limit)


def test_a_database_that_cannot_be_opened_is_said_without_its_password(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="gateway database"):
        KeyStore(f"sqlite:///{tmp_path / 'file' / 'keys.db'}")
    with pytest.raises(StorageError) as caught:
        KeyStore("nosuchdatabase://user:hidden-word@host/db")
    assert "hidden-word" not in str(caught.value)


def test_a_file_that_is_no_database_is_said(path: Path) -> None:
    path.write_bytes(b"not a database" * 100)
    with pytest.raises(StorageError, match="not a database"):
        KeyStore(f"sqlite:///{path}")


def test_replicas_that_start_at_once_share_one_database(path: Path) -> None:
    code = f"from modelyard.security import KeyStore; KeyStore('sqlite:///{path}').create(tenant='a')"
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(4)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0, 0, 0]
    with sqlite3.connect(path) as connection:
        assert connection.execute("select count(*) from gateway_keys").fetchone() == (4,)
