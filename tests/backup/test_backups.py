"""Backups: what comes back is what was there, nothing is readable without the key, and damage is found and named."""

from __future__ import annotations

import os
import shutil
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from modelyard import backup
from modelyard.artifacts import Registry, Store
from modelyard.artifacts.filesystem import list_files, resolve, write_bytes
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
    folder.chmod(0o700)
    return settings().home


@pytest.fixture
def small_home() -> Path:
    """A home with a model's file of its store and a key, without a registry."""
    model = settings().home / "store" / "models" / "abc"
    model.mkdir(parents=True)
    (model / "weights.bin").write_bytes(SECRET * 1000)
    model.chmod(0o750)
    (settings().home / "cluster").mkdir(mode=0o700)
    (settings().home / "cluster" / "ca.key").write_text("a key")
    (settings().home / "cluster" / "ca.key").chmod(0o600)
    return settings().home


@pytest.fixture
def at(small_home: Path, tmp_path: Path) -> Path:
    """A backup of it."""
    backup.create(str(tmp_path / "backup"))
    return tmp_path / "backup"


def largest_piece(at: Path) -> Path:
    return max((path for path in (at / "pieces").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


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


def test_a_piece_of_another_size_is_sent_again(at: Path) -> None:
    piece = largest_piece(at)
    piece.write_bytes(piece.read_bytes()[:-40])
    assert backup.create(str(at)).moved_bytes > 10_000
    backup.verify(str(at))


def test_what_verify_finds_damaged_the_next_create_sends_again(at: Path) -> None:
    first = backup.snapshots(str(at))[0].name
    flip(largest_piece(at))
    with pytest.raises(IntegrityError, match="put aside") as caught:
        backup.verify(str(at))
    assert "backup create sends again" in caught.value.todo
    assert len(list((at / "damaged").iterdir())) == 1
    assert backup.create(str(at)).moved_bytes > 10_000
    backup.verify(str(at), first)
    backup.verify(str(at))


def test_damage_on_an_object_store_is_sent_again_too(small_home: Path, s3_store_uri: str) -> None:
    at = f"{s3_store_uri}/backup"
    backup.create(at)
    fs, root = resolve(at)
    piece, size = max(list_files(fs, f"{root}/pieces").items(), key=lambda each: each[1])
    write_bytes(fs, f"{root}/pieces/{piece}", b"?" * size)
    with pytest.raises(IntegrityError, match="put aside"):
        backup.verify(at)
    assert backup.create(at).moved_bytes == size
    backup.verify(at)


def test_a_damaged_piece_that_cannot_be_put_aside_is_to_be_removed_by_hand(
    at: Path,
) -> None:
    (at / "damaged").write_text("in the way")
    piece = largest_piece(at)
    flip(piece)
    with pytest.raises(IntegrityError, match=rf"remove by hand .*{piece.name}"):
        backup.verify(str(at))
    piece.unlink()
    backup.create(str(at))
    backup.verify(str(at))


def test_a_damaged_newest_snapshot_stops_neither_create_nor_list(at: Path, tmp_path: Path) -> None:
    runner, words = CliRunner(), ["--at", str(at)]
    newest = backup.create(str(at)).snapshot
    flip(at / "snapshots" / newest)
    listed = runner.invoke(modelyard, ["backup", "list", *words], catch_exceptions=False).output
    assert [line.split()[1] for line in listed.splitlines()[1:]] == ["2", "damaged"]
    with pytest.raises(IntegrityError, match=rf"snapshot {newest} is damaged\n  -> modelyard backup list"):
        backup.verify(str(at))
    report = backup.create(str(at))
    assert newest in report.warnings[0]
    assert report.moved_bytes == 0
    backup.verify(str(at))


def test_restored_folders_have_their_modes_and_no_secret_is_ever_readable(
    at: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync, seen = os.fsync, []

    def watched(descriptor: int) -> None:
        seen.append(stat.S_IMODE(os.fstat(descriptor).st_mode))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    backup.restore(str(at), tmp_path / "restored")
    assert set(seen) == {0o600}
    modes = {
        name: stat.S_IMODE((tmp_path / "restored" / name).stat().st_mode) for name in ("cluster", "store/models/abc")
    }
    assert modes == {"cluster": 0o700, "store/models/abc": 0o750}
    assert stat.S_IMODE((tmp_path / "restored" / "store/models/abc/weights.bin").stat().st_mode) & 0o400


def test_a_missing_backup_names_the_option_that_makes_one(at: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="create --at URI"):
        backup.verify(str(tmp_path / "nothing"))


def test_unfinished_files_of_a_writer_that_was_killed_are_removed_after_a_day(at: Path) -> None:
    old, new = largest_piece(at).with_name(".old.tmp"), at / "snapshots" / ".new.tmp"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 90_000,) * 2)
    backup.create(str(at))
    assert not old.exists()
    assert new.exists()
    assert len(backup.snapshots(str(at))) == 2


def test_a_restore_that_was_stopped_can_be_repeated(at: Path, tmp_path: Path) -> None:
    into, left = tmp_path / "restored", tmp_path / ".restored.part"
    flip(largest_piece(at))
    with pytest.raises(IntegrityError, match=r"is in \S+\.restored\.part"):
        backup.restore(str(at), into)
    assert left.exists()
    assert not into.exists()
    with pytest.raises(IntegrityError):
        backup.verify(str(at))
    backup.create(str(at))
    backup.restore(str(at), into)
    assert not left.exists()
    assert (into / "store/models/abc/weights.bin").read_bytes() == SECRET * 1000


def test_an_ambiguous_or_empty_name_of_a_snapshot_is_refused(at: Path) -> None:
    second = backup.create(str(at)).snapshot
    with pytest.raises(ConfigError, match=f"2 snapshots begin with 2\n  -> name one of: .*{second}"):
        backup.verify(str(at), "2")
    with pytest.raises(ConfigError, match="--snapshot is empty"):
        backup.verify(str(at), "")
    assert backup.verify(str(at), second[:-1]).snapshot == second


def test_a_key_file_that_is_a_folder_is_named(at: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder"):
        backup.verify(str(at), key_file=tmp_path)


@pytest.mark.parametrize("command", ["create", "verify", "restore"])
def test_a_file_uri_with_one_slash_is_refused_before_anything_is_made(
    command: str, at: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    calls = {
        "create": lambda: backup.create(f"file:{at}"),
        "verify": lambda: backup.verify(f"file:{at}"),
        "restore": lambda: backup.restore(str(at), tmp_path / "new", store=f"file:{tmp_path}/artifacts"),
    }
    with pytest.raises(ConfigError, match=f"write file://{tmp_path}"):
        calls[command]()
    assert sorted(tmp_path.iterdir()) == before


def test_restore_prints_variables_that_hold_in_every_folder(
    at: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["backup", "restore", "--at", str(at), "--into", "new home", "--store", "artifacts"]
    output = CliRunner().invoke(modelyard, words, catch_exceptions=False).output
    assert f"export MODELYARD_HOME='{tmp_path}/new home' MODELYARD_STORE={tmp_path}/artifacts\n" in output


def test_no_key_is_made_for_a_backup_that_has_one_elsewhere(at: Path) -> None:
    key = settings().home / "backup.key"
    key.unlink()
    with pytest.raises(NotFoundError, match=r"no key file .*\n  -> bring it from where the backup was made"):
        backup.create(str(at))
    assert not key.exists()


def test_files_of_others_among_the_snapshots_are_passed_over(at: Path, tmp_path: Path) -> None:
    [made] = backup.snapshots(str(at))
    for name in ("zz-notes.txt", f"{made.name} (copy)", f"{made.name}.partial"):
        (at / "snapshots" / name).write_text("stray")
    assert [each.name for each in backup.snapshots(str(at))] == [made.name]
    assert backup.verify(str(at)).snapshot == made.name
    assert backup.restore(str(at), tmp_path / "new").snapshot == made.name
    assert backup.create(str(at)).warnings == ()


def test_a_restore_into_a_file_is_refused(at: Path, tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(ConfigError, match="is a file"):
        backup.restore(str(at), tmp_path / "notes")
    assert (tmp_path / "notes").read_text() == "mine"


def test_a_restore_into_a_link_to_an_empty_folder_fills_that_folder(at: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    backup.restore(str(at), tmp_path / "link")
    assert (tmp_path / "real/store/models/abc/weights.bin").read_bytes() == SECRET * 1000


@pytest.mark.parametrize("text", ["[]", "{}", "null", '{"format": 1, "salt": 12}', '{"format": 1, "salt": "x"}', "{"])
def test_a_backup_json_that_says_nothing_is_damaged(at: Path, text: str) -> None:
    (at / "backup.json").write_text(text)
    for call in (backup.create, backup.verify):
        with pytest.raises(IntegrityError, match=r"backup\.json is damaged"):
            call(str(at))


def test_snapshots_without_their_backup_json_are_not_begun_anew(at: Path) -> None:
    (at / "backup.json").unlink()
    for call in (backup.create, backup.verify):
        with pytest.raises(IntegrityError, match=r"backup\.json is missing\n  -> bring it back .*name an empty folder"):
            call(str(at))
    assert not (at / "backup.json").exists()


@pytest.mark.parametrize("place", ["home", "home/cluster/backup", "artifacts/deep/backup", "link/backup"])
def test_a_backup_within_what_it_keeps_is_refused(
    place: str, small_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODELYARD_STORE", f"file://{tmp_path}/artifacts")
    (tmp_path / "link").symlink_to(small_home)
    before = sorted(small_home.rglob("*"))
    with pytest.raises(ConfigError, match=r"is in MODELYARD_(HOME|STORE) .* lost with the other"):
        backup.create(str(tmp_path / place))
    assert sorted(small_home.rglob("*")) == before


@pytest.mark.parametrize(("command", "step"), [("create", "put"), ("restore", "get")])
def test_sigterm_ends_a_command_as_ctrl_c_does(at: Path, tmp_path: Path, command: str, step: str) -> None:
    code = (
        "import os, signal, sys\n"
        "from modelyard.backup.repository import Repository\n"
        "from modelyard.cli.main import main\n"
        "step, calls = getattr(Repository, sys.argv[1]), []\n"
        "def stopped(self, content):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 2: os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return step(self, content)\n"
        "setattr(Repository, sys.argv[1], stopped)\n"
        "sys.argv[1:] = sys.argv[2:]\n"
        "main()\n"
    )
    target = [str(tmp_path / "other")] if command == "create" else [str(at), "--into", str(tmp_path / "restored")]
    words = [sys.executable, "-c", code, step, "backup", command, "--at", *target]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stderr.split()) == (130, ["interrupted"])
    assert not (tmp_path / "restored").exists()
    assert not (tmp_path / ".restored.part").exists()
    assert not (tmp_path / "other" / "snapshots").exists()
