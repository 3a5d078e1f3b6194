"""Checkpoints: whole or invisible, whatever happens while they are written."""

from __future__ import annotations

import importlib.util
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from modelyard.errors import IntegrityError, StorageError, UnreachableError, WaitTimeoutError
from modelyard.training import checkpoints
from modelyard.training.checkpoints import (
    MANIFEST,
    STAGING,
    TAG,
    Checkpoint,
    CheckpointStore,
    CheckpointWriter,
    TrainState,
)
from modelyard.training.run_folder import RunFolder

KILLED_WRITER = Path(__file__).with_name("killed_writer.py")


def state(step: int, **fields: Any) -> TrainState:
    plain: dict[str, Any] = {"seed": 0, "epoch": 0, "position": 8 * step, "num_workers": 1, "zero_stage": 1, **fields}
    return TrainState(step=step, **plain)


def write_file(content: bytes, rank: int = 0) -> Callable[[Path, str], None]:
    """A `save_local` that writes one file, named as DeepSpeed names that of a rank."""

    def save(folder: Path, tag: str) -> None:
        (folder / tag).mkdir(parents=True, exist_ok=True)
        (folder / tag / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").write_bytes(content)

    return save


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(str(tmp_path / "run" / "checkpoints"))


@pytest.fixture
def store(folder: RunFolder) -> CheckpointStore:
    return CheckpointStore(folder)


@pytest.fixture
def make_writer(folder: RunFolder, tmp_path: Path) -> Iterator[Callable[..., CheckpointWriter]]:
    made: list[CheckpointWriter] = []

    def make(rank: int = 0, num_workers: int = 1, timeout_s: float = 20) -> CheckpointWriter:
        writer = CheckpointWriter(
            folder,
            rank=rank,
            num_workers=num_workers,
            attempt="0a1b2c3d",
            staging=tmp_path / "run" / "staging",
            commit_timeout_s=timeout_s,
        )
        made.append(writer)
        return writer

    yield make
    for writer in made:
        writer._thread.shutdown()


def write(writer: CheckpointWriter, *steps: int) -> None:
    for step in steps:
        writer.save(state(step), write_file(f"weights of step {step}".encode() * 100), b"history")
        writer.wait()


def steps_of(store: CheckpointStore) -> list[int]:
    return [checkpoint.state.step for checkpoint in store.committed()]


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_a_checkpoint_comes_back_with_its_state_and_files(
    store: CheckpointStore, make_writer: Callable[..., CheckpointWriter], tmp_path: Path
) -> None:
    write(make_writer(), 3)
    newest = store.newest_usable(tmp_path / "scratch")
    assert newest is not None
    assert newest.state == state(3)
    found = store.fetch(newest, tmp_path / "scratch")
    assert (found / TAG / "zero_pp_rank_0_mp_rank_00_optim_states.pt").read_bytes().startswith(b"weights of step 3")
    assert (found / "history.parquet").read_bytes() == b"history"


def test_nothing_is_visible_before_the_manifest(
    store: CheckpointStore, make_writer: Callable[..., CheckpointWriter], folder: RunFolder, tmp_path: Path
) -> None:
    writer = make_writer(num_workers=2)
    name = writer.save(state(1, num_workers=2), write_file(b"x"), b"history")
    while folder.read(f"{name}/part-00000.json") is None:
        pass  # until worker 0 has uploaded everything and waits for worker 1
    assert store.committed() == []
    assert store.newest_usable(tmp_path) is None
    other = make_writer(rank=1, num_workers=2)
    other.save(state(1, num_workers=2), write_file(b"y", rank=1), None)
    writer.wait()
    assert steps_of(store) == [1]


def test_workers_of_one_node_share_a_folder_and_each_uploads_its_own_files(
    store: CheckpointStore, make_writer: Callable[..., CheckpointWriter], tmp_path: Path
) -> None:
    writers = [make_writer(rank, num_workers=4) for rank in range(4)]
    for step in (1, 2):
        together = threading.Barrier(4)

        def save(rank: int, step: int = step, together: threading.Barrier = together) -> None:
            content = f"{step}/{rank}".encode()
            together.wait(20)
            writers[rank].save(state(step, num_workers=4), write_file(content, rank), b"history")
            writers[rank].wait()

        threads = [threading.Thread(target=save, args=(rank,)) for rank in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    newest = store.newest_usable(tmp_path)
    assert newest is not None
    assert len(newest.manifest.files) == 5, "a file of each worker, and one history"
    found = store.fetch(newest, tmp_path) / TAG
    assert sorted(path.read_bytes() for path in found.iterdir()) == [b"2/0", b"2/1", b"2/2", b"2/3"]


def test_a_worker_that_never_uploads_is_named_with_the_setting(make_writer: Callable[..., CheckpointWriter]) -> None:
    writer = make_writer(num_workers=2, timeout_s=0.1)
    writer.save(state(1), write_file(b"x"), b"history")
    with pytest.raises(WaitTimeoutError) as caught:
        writer.wait()
    assert "waited 0.1 s for worker 1 to upload its part of checkpoint step-00000001" in str(caught.value)
    assert "checkpoint.commit_timeout_s" in str(caught.value)


def test_a_failed_upload_is_raised_by_the_next_save(make_writer: Callable[..., CheckpointWriter]) -> None:
    writer = make_writer(num_workers=2, timeout_s=0.1)
    writer.save(state(1), write_file(b"x"), b"history")
    with pytest.raises(WaitTimeoutError):
        writer.save(state(2), write_file(b"x"), b"history")


def away(monkeypatch: pytest.MonkeyPatch, times: int) -> list[str]:
    """Let the store not answer so many times; the list fills with the files that were asked for."""
    asked: list[str] = []
    put = RunFolder.put

    def refuse(folder: RunFolder, source: Path, name: str) -> Any:
        asked.append(name)
        if len(asked) <= times:
            raise UnreachableError("cannot reach the store", "wait")
        return put(folder, source, name)

    monkeypatch.setattr(RunFolder, "put", refuse)
    monkeypatch.setattr(checkpoints, "RETRY_S", 0.05)
    return asked


def test_a_store_that_was_away_has_the_checkpoint_afterwards(
    store: CheckpointStore, make_writer: Callable[..., CheckpointWriter], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = away(monkeypatch, times=3)
    write(make_writer(), 1)
    assert len(asked) == 5, "two files, the first of them four times"
    assert steps_of(store) == [1]


def test_a_store_that_stays_away_is_given_up_after_the_limit(
    store: CheckpointStore, make_writer: Callable[..., CheckpointWriter], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = away(monkeypatch, times=1_000_000)
    with pytest.raises(UnreachableError, match="cannot reach"):
        write(make_writer(timeout_s=0.5), 1)
    assert len(asked) > 1
    assert steps_of(store) == []


@pytest.mark.parametrize("seed", range(12))
def test_one_flipped_byte_in_the_newest_checkpoint_falls_back_to_the_one_before(
    store: CheckpointStore, make_writer: Callable[..., CheckpointWriter], tmp_path: Path, seed: int
) -> None:
    write(make_writer(), 1, 2)
    assert store.folder.local is not None
    newest = store.folder.local / store.committed()[-1].name
    files = [path for path in sorted(newest.rglob("*")) if path.is_file() and not path.name.startswith("part-")]
    chosen = random.Random(seed).choice(files)
    flip(chosen, random.Random(seed).randrange(chosen.stat().st_size))
    usable = store.newest_usable(tmp_path)
    assert usable is not None
    assert usable.state == state(1), chosen


def test_a_changed_number_in_the_manifest_is_not_believed(
    store: CheckpointStore, make_writer: Callable[..., CheckpointWriter]
) -> None:
    write(make_writer(), 1, 2)
    assert store.folder.local is not None
    manifest = store.folder.local / store.committed()[-1].name / MANIFEST
    manifest.write_text(manifest.read_text().replace('"position": 16', '"position": 17'))
    assert steps_of(store) == [1]


@pytest.mark.parametrize("damage", ["changed", "truncated", "deleted"])
def test_a_damaged_file_is_named(
    store: CheckpointStore, make_writer: Callable[..., CheckpointWriter], tmp_path: Path, damage: str
) -> None:
    write(make_writer(), 1)
    (checkpoint,) = store.committed()
    path = store.fetch(checkpoint, tmp_path) / "history.parquet"
    if damage == "changed":
        flip(path, 0)
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.unlink()
    with pytest.raises(IntegrityError, match=r"step-00000001-0a1b2c3d/history\.parquet is not what was written"):
        store.fetch(checkpoint, tmp_path)


def test_with_every_checkpoint_damaged_there_is_none(
    store: CheckpointStore, make_writer: Callable[..., CheckpointWriter], tmp_path: Path
) -> None:
    write(make_writer(), 1, 2)
    for checkpoint in store.committed():
        flip(store.fetch(checkpoint, tmp_path) / "history.parquet", 0)
    assert store.newest_usable(tmp_path) is None


def test_pruning_keeps_what_it_is_told_and_what_is_still_being_written(
    store: CheckpointStore, make_writer: Callable[..., CheckpointWriter], folder: RunFolder
) -> None:
    write(make_writer(), 1, 2, 3, 4)
    folder.write("step-00000002-ffffffff/part-00000.json", b"{}")  # left over by a killed attempt
    folder.write("step-00000005-ffffffff/part-00000.json", b"{}")  # being written
    committed = {checkpoint.state.step: checkpoint.name for checkpoint in store.committed()}
    store.prune([committed[1], committed[4]])
    assert steps_of(store) == [1, 4]
    assert folder.folders() == [committed[1], committed[4], "step-00000005-ffffffff"]


def test_pruning_deletes_the_manifest_before_any_other_file(
    store: CheckpointStore,
    make_writer: Callable[..., CheckpointWriter],
    folder: RunFolder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write(make_writer(), 1, 2)
    seen: list[list[int]] = []

    class Watched:
        """The file system, that notes what is committed when a whole folder goes."""

        def __getattr__(self, name: str) -> Any:
            if name == "delete_dir":
                seen.append(steps_of(CheckpointStore(RunFolder(folder.uri))))
            return getattr(real, name)

    real = folder._fs
    monkeypatch.setattr(folder, "_fs", Watched())
    store.prune([store.committed()[-1].name])
    assert seen == [[2]]


def test_a_checkpoint_of_the_same_step_by_a_later_attempt_does_not_touch_the_first(
    store: CheckpointStore, make_writer: Callable[..., CheckpointWriter], folder: RunFolder
) -> None:
    write(make_writer(), 1)
    again = make_writer()
    again._attempt = "99999999"
    write(again, 1)
    assert folder.folders() == ["step-00000001-0a1b2c3d", "step-00000001-99999999"]
    assert steps_of(store) == [1, 1]


def test_what_a_killed_attempt_was_writing_is_deleted_by_the_next(store: CheckpointStore) -> None:
    assert store.folder.local is not None
    store.clear_staging("0a1b2c3d")  # nothing there yet
    for name in ("ffffffff-node", "0a1b2c3d-node"):
        (store.folder.local / STAGING / name / "step-00000001").mkdir(parents=True)
    store.clear_staging("0a1b2c3d")
    assert [left.name for left in (store.folder.local / STAGING).iterdir()] == ["0a1b2c3d-node"]
    assert store.committed() == []


# Killed at any moment


def killer(uri: str, staging: Path) -> Callable[[float], None]:
    process = subprocess.Popen(
        [sys.executable, str(KILLED_WRITER), uri, str(staging)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def write_and_kill(after_s: float) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{after_s}\n")
        process.stdin.flush()
        assert process.stdout.readline() == "killed\n"

    return write_and_kill


def expected(step: int, rank: int) -> bytes:
    spec = importlib.util.spec_from_file_location("killed_writer", KILLED_WRITER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    content: bytes = module.content(step, rank)
    return content


def check_after_kill(store: CheckpointStore, scratch: Path, at_least: int) -> Checkpoint | None:
    """Everything visible is whole, and nothing that was visible before is lost."""
    for checkpoint in store.committed():
        store.fetch(checkpoint, scratch)
    newest = store.newest_usable(scratch)
    assert at_least == 0 or newest is not None
    if newest is not None:
        assert newest.state.step >= at_least
        assert len(newest.manifest.files) == 3, "a file of each worker, and the history"
        for rank in range(2):
            file = store.fetch(newest, scratch) / TAG / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
            assert file.read_bytes() == expected(newest.state.step, rank)
    return newest


def kill_many_times(uri: str, tmp_path: Path, times: int, longest_s: float) -> int:
    """The step of the newest checkpoint after that many kills at random moments."""
    dice, step, store = random.Random(11), 0, CheckpointStore(RunFolder(uri))
    write_and_kill = killer(uri, tmp_path / "staging")
    write_and_kill(longest_s * 3)
    for _ in range(times):
        write_and_kill(dice.uniform(0.02, longest_s))
        newest = check_after_kill(store, tmp_path / "scratch", at_least=step)
        step = newest.state.step if newest is not None else 0
    return step


def test_a_kill_at_any_moment_leaves_the_newest_checkpoint_whole(tmp_path: Path) -> None:
    assert kill_many_times(str(tmp_path / "run"), tmp_path, times=40, longest_s=0.15) > 5


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_the_newest_checkpoint_on_s3_whole(s3_store_uri: str, tmp_path: Path) -> None:
    assert kill_many_times(s3_store_uri, tmp_path, times=12, longest_s=0.8) > 2


@pytest.mark.slow
def test_a_flipped_byte_on_s3_falls_back_to_the_checkpoint_before(s3_store_uri: str, tmp_path: Path) -> None:
    folder = RunFolder(s3_store_uri)
    staging = tmp_path / "staging"
    writer = CheckpointWriter(folder, rank=0, num_workers=1, attempt="0a1b2c3d", staging=staging, commit_timeout_s=20)
    write(writer, 1, 2, 3)
    writer.close()
    store = CheckpointStore(folder)
    folder.write(f"{store.committed()[-1].name}/history.parquet", b"histori")
    usable = store.newest_usable(tmp_path / "scratch")
    assert usable is not None
    assert usable.state.step == 2
    store.prune([usable.name])
    store.prune([usable.name])  # a store may go on listing folders that have gone
    assert steps_of(store) == [2]
    assert list(staging.rglob("*.pt")) == [], "uploaded files leave the staging folder"


# A full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    mounted = tmp_path / "small"
    mounted.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", mounted], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"cannot mount a small disk here: {done.stderr.strip()}")
    yield mounted
    subprocess.run(["umount", "-l", mounted], check=True)


def torch_file(folder: Path, tag: str) -> None:
    """As DeepSpeed writes: torch hides the disk's own error in a RuntimeError."""
    import torch

    (folder / tag).mkdir(parents=True)
    torch.save(torch.ones(1_500_000), folder / tag / "mp_rank_00_model_states.pt")


@pytest.mark.parametrize("save_local", [write_file(bytes(6_000_000)), torch_file])
def test_a_full_disk_is_a_storage_error_and_leaves_the_checkpoint_before(small_disk: Path, save_local: Any) -> None:
    store = CheckpointStore(RunFolder(str(small_disk / "run")))
    writer = CheckpointWriter(
        store.folder,
        rank=0,
        num_workers=1,
        attempt="0a1b2c3d",
        staging=small_disk / "staging",
        commit_timeout_s=20,
    )
    write(writer, 1)
    with pytest.raises(StorageError, match="disk is full"):
        writer.save(state(2), save_local, b"history")
    writer.close()
    assert steps_of(store) == [1]
