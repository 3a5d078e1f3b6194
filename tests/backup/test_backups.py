"""Backups: what comes back is what was there, nothing is readable without the key, and damage is found and named."""

from __future__ import annotations

import shutil
import sqlite3
import stat
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner

from modelyard import backup
from modelyard.artifacts import Registry, Store
from modelyard.cli.main import modelyard
from modelyard.config import settings
from modelyard.errors import ConfigError, IntegrityError, NotFoundError
from modelyard.scheduling.journal import Journal

SECRET = b"the-weights-are-worth-a-lot"


def register(name: str, content: bytes = SECRET, folder: Path | None = None) -> str:
    """A dataset artifact in store and registry; its digest."""
    source = (folder or settings().home.parent) / f"source-{name}"
    source.mkdir(parents=True)
    (source / "rows.bin").write_bytes(content * 1000)
    manifest = Store.from_settings().put(source, kind="dataset", name=name)
    Registry.from_settings().register(manifest)
    return manifest.digest


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with an artifact: made once, since MLflow takes seconds to make its database."""
    home = tmp_path_factory.mktemp("template") / "home"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODELYARD_HOME", str(home))
        patch.delenv("MODELYARD_STORE", raising=False)
        patch.delenv("MODELYARD_TRACKING_URI", raising=False)
        register("rows")
    return home


@pytest.fixture
def full_home(template: Path) -> Path:
    """A home with an artifact, a journal, and the cluster's authority."""
    shutil.copytree(template, settings().home)
    journal = Journal(f"sqlite:///{settings().home / 'scheduler.db'}")
    journal.append(("submitted", {"job_id": "night-run"}))
    journal.close()
    folder = settings().home / "cluster"
    folder.mkdir()
    (folder / "ca.key").write_text("a key")
    (folder / "ca.key").chmod(0o600)
    return settings().home


def test_a_restored_home_has_the_same_models_journal_and_keys(
    full_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backup.create(str(tmp_path / "backup"))
    restored = tmp_path / "restored"
    backup.restore(str(tmp_path / "backup"), restored)
    monkeypatch.setenv("MODELYARD_HOME", str(restored))
    monkeypatch.delenv("MODELYARD_STORE")
    monkeypatch.delenv("MODELYARD_TRACKING_URI")
    full_home.rename(tmp_path / "gone")
    version, folder = Registry.from_settings().open("datasets:/rows/1")
    assert (folder / "rows.bin").read_bytes() == SECRET * 1000
    Store.from_settings().verify("dataset", version.digest)
    journal = Journal(f"sqlite:///{restored / 'scheduler.db'}")
    assert [event.kind for event in journal.read()] == ["submitted"]
    assert stat.S_IMODE((restored / "cluster" / "ca.key").stat().st_mode) == 0o600


def test_a_second_backup_sends_only_what_is_new(full_home: Path, tmp_path: Path) -> None:
    first = backup.create(str(tmp_path / "backup"))
    again = backup.create(str(tmp_path / "backup"))
    assert again.files == first.files
    assert again.moved_bytes == 0
    register("more", b"other rows")
    third = backup.create(str(tmp_path / "backup"))
    assert 10_000 < third.moved_bytes < third.size_bytes


def test_an_older_snapshot_comes_back_as_it_was(full_home: Path, tmp_path: Path) -> None:
    first = backup.create(str(tmp_path / "backup"))
    register("more", b"other rows")
    backup.create(str(tmp_path / "backup"))
    report = backup.restore(str(tmp_path / "backup"), tmp_path / "old", snapshot=first.snapshot)
    assert report.files == first.files


def test_nothing_of_it_can_be_read_without_the_key(full_home: Path, tmp_path: Path) -> None:
    backup.create(str(tmp_path / "backup"))
    stored = b"".join(path.read_bytes() for path in (tmp_path / "backup").rglob("*") if path.is_file())
    assert SECRET not in stored
    assert b"rows.bin" not in stored
    key = settings().home / "backup.key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    key.write_text("00" * 32)
    with pytest.raises(IntegrityError, match="made with another key"):
        backup.verify(str(tmp_path / "backup"))
    key.unlink()
    with pytest.raises(NotFoundError, match="no key file"):
        backup.verify(str(tmp_path / "backup"))


def test_a_passphrase_serves_as_key(full_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELYARD_BACKUP_PASSPHRASE", "correct horse battery")
    backup.create(str(tmp_path / "backup"))
    assert not (settings().home / "backup.key").exists()
    backup.verify(str(tmp_path / "backup"))
    monkeypatch.setenv("MODELYARD_BACKUP_PASSPHRASE", "wrong horse battery")
    with pytest.raises(IntegrityError, match="another key"):
        backup.verify(str(tmp_path / "backup"))
    monkeypatch.setenv("MODELYARD_BACKUP_PASSPHRASE", "short")
    with pytest.raises(ConfigError, match="has 5 characters"):
        backup.verify(str(tmp_path / "backup"))


@pytest.mark.parametrize("harm", ["flip", "cut", "remove", "swap"])
def test_damage_is_found_and_the_file_is_named(full_home: Path, tmp_path: Path, harm: str) -> None:
    backup.create(str(tmp_path / "backup"))
    pieces = sorted((tmp_path / "backup" / "pieces").rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    largest, other = pieces[-1], pieces[-2]
    content = largest.read_bytes()
    if harm == "flip":
        largest.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif harm == "cut":
        largest.write_bytes(content[:-40])
    elif harm == "remove":
        largest.unlink()
    else:
        largest.write_bytes(other.read_bytes())
    with pytest.raises(IntegrityError, match=r"1 of \d+ files .* cannot be restored:\n  \S+: piece"):
        backup.verify(str(tmp_path / "backup"))
    with pytest.raises(IntegrityError):
        backup.restore(str(tmp_path / "backup"), tmp_path / "restored")


def test_a_damaged_piece_is_sent_again_only_when_it_is_gone(full_home: Path, tmp_path: Path) -> None:
    backup.create(str(tmp_path / "backup"))
    for piece in (tmp_path / "backup" / "pieces").rglob("*"):
        if piece.is_file():
            piece.unlink()
    assert backup.create(str(tmp_path / "backup")).moved_bytes > 0
    backup.verify(str(tmp_path / "backup"))


def test_a_backup_that_was_cut_short_is_no_snapshot_and_is_used_by_the_next(
    full_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("modelyard.backup.repository.Repository.write", fail)
        with pytest.raises(KeyboardInterrupt):
            backup.create(str(tmp_path / "backup"))
    with pytest.raises(NotFoundError, match="no snapshot"):
        backup.verify(str(tmp_path / "backup"))
    assert backup.create(str(tmp_path / "backup")).moved_bytes == 0


def test_a_database_that_is_written_meanwhile_is_copied_whole(full_home: Path, tmp_path: Path) -> None:
    path, ended = settings().home / "scheduler.db", threading.Event()

    def write() -> None:
        with sqlite3.connect(path, timeout=30) as database:
            database.execute("create table noise (n integer)")
        while not ended.is_set():
            with sqlite3.connect(path, timeout=30) as database:
                database.execute("insert into noise values (1)")

    writer = threading.Thread(target=write)
    writer.start()
    try:
        backup.create(str(tmp_path / "backup"))
    finally:
        ended.set()
        writer.join(20)
    backup.restore(str(tmp_path / "backup"), tmp_path / "restored")
    with sqlite3.connect(tmp_path / "restored" / "scheduler.db") as database:
        assert database.execute("pragma integrity_check").fetchone() == ("ok",)


def test_nothing_is_ever_overwritten(full_home: Path, tmp_path: Path) -> None:
    backup.create(str(tmp_path / "backup"))
    with pytest.raises(ConfigError, match="is not empty"):
        backup.restore(str(tmp_path / "backup"), full_home)


def test_a_registry_on_a_server_is_named_as_not_included(
    full_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODELYARD_TRACKING_URI", "postgresql://me:pa55word@db/mlflow")
    notes = backup.create(str(tmp_path / "backup")).notes
    assert "postgresql://db/mlflow" in notes[0]
    assert "pa55word" not in notes[0]


def test_it_works_on_an_object_store(full_home: Path, tmp_path: Path, s3_store_uri: str) -> None:
    backup.create(f"{s3_store_uri}/backup")
    assert backup.create(f"{s3_store_uri}/backup").moved_bytes == 0
    backup.verify(f"{s3_store_uri}/backup")
    backup.restore(f"{s3_store_uri}/backup", tmp_path / "restored", store=f"{s3_store_uri}/store")
    digest = Registry.from_settings().resolve("datasets:/rows").digest
    Store(f"{s3_store_uri}/store", tmp_path / "cache").verify("dataset", digest)


def test_the_commands_say_what_they_did(full_home: Path, tmp_path: Path) -> None:
    runner, at = CliRunner(), ["--at", str(tmp_path / "backup")]
    made = runner.invoke(modelyard, ["backup", "create", *at], catch_exceptions=False)
    assert "keep a copy elsewhere" in made.output
    assert "is good: 5 files" in runner.invoke(modelyard, ["backup", "verify", *at], catch_exceptions=False).output
    listed = runner.invoke(modelyard, ["backup", "list", *at], catch_exceptions=False).output
    assert len(listed.splitlines()) == 2
    words = ["backup", "restore", *at, "--into", str(tmp_path / "new")]
    assert f"export MODELYARD_HOME={tmp_path / 'new'}" in runner.invoke(modelyard, words, catch_exceptions=False).output
