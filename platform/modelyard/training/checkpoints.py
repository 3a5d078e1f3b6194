"""Checkpoints of a run: written in the background, committed by their manifest, read by any number of workers.

    <store>/runs/<run>/checkpoints/step-00000120-3f2a9c1d/   one folder per checkpoint and attempt
        state/...                  DeepSpeed's files, each written by the worker that owns it
        history.parquet            the run's logged steps so far
        part-00000.json ...        what each worker has uploaded, with SHA-256
        checkpoint.json            the manifest: written last, in one atomic step. Without it there is no checkpoint

A kill at any moment leaves the previous checkpoint whole and the unfinished one invisible.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field

from modelyard.artifacts import filesystem
from modelyard.artifacts.manifest import FileEntry
from modelyard.config import Config
from modelyard.errors import IntegrityError, NotFoundError, UnreachableError, WaitTimeoutError
from modelyard.training.parallel import Parallel
from modelyard.training.run_folder import RunFolder

logger = logging.getLogger(__name__)
Found = TypeVar("Found")

TAG = "state"
MANIFEST = "checkpoint.json"
STAGING = ".staging"
"""Folder beside the checkpoints of a local run, where workers write before they commit: `<attempt>-<node>`."""
RETRY_S = 2.0
"""Pause before a store that does not answer is asked again."""
_NEARLY_FULL_BYTES = 1 << 20
_NAME = re.compile(r"step-(\d{8})-[0-9a-f]{8}")


class TrainState(Config):
    """Where a run stands after a number of optimizer steps."""

    step: int
    """Optimizer steps done."""
    seed: int
    epoch: int
    position: int
    """With `seed` and `epoch`: the loader's whole state, the next row to read."""
    num_workers: int
    """Workers that wrote the checkpoint; another number reads it in the universal format."""
    zero_stage: int
    parallel: Parallel = Field(default=Parallel(), exclude_if=lambda parallel: parallel == Parallel())
    """How workers shared the model."""
    elapsed_s: float = 0.0
    """Seconds of training so far, over all attempts."""
    best_metric: float | None = None
    best_step: int | None = None
    stale_validations: int = 0
    """Validations since the best one."""
    initial_metrics: dict[str, float] = {}
    """Metrics of the final split before the first step."""


class CheckpointManifest(Config):
    """The commit record of one checkpoint."""

    format_version: int = 1
    state: TrainState
    files: dict[str, FileEntry]
    seal: str = ""
    """SHA-256 of all the above, so that a damaged record is not believed."""

    def sealed(self) -> CheckpointManifest:
        """A copy with its seal."""
        bare = self.model_copy(update={"seal": ""})
        return self.model_copy(update={"seal": bare.digest()})


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint."""

    name: str
    manifest: CheckpointManifest

    @property
    def state(self) -> TrainState:
        """Where the run stood."""
        return self.manifest.state


class CheckpointStore:
    """The checkpoints of one run, in `folder`."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder

    def committed(self) -> list[Checkpoint]:
        """All whole checkpoints, oldest first. A damaged manifest is left out with a warning."""
        found = []
        for name in self._names():
            data = self.folder.read(f"{name}/{MANIFEST}")
            if data is None:
                continue
            try:
                manifest = CheckpointManifest.model_validate_json(data)
            except ValueError:
                manifest = None
            if manifest is None or manifest != manifest.sealed():
                logger.warning("checkpoint %s/%s has a damaged manifest and is ignored", self.folder.uri, name)
            else:
                found.append(Checkpoint(name, manifest))
        return sorted(found, key=lambda checkpoint: checkpoint.state.step)

    def fetch(self, checkpoint: Checkpoint, scratch: Path) -> Path:
        """A verified local folder with the checkpoint's files: in place on a local disk, else below `scratch`.

        Raises:
            IntegrityError: a file is missing or is not what was written; it is named.
        """
        for name, entry in checkpoint.manifest.files.items():
            relative = f"{checkpoint.name}/{name}"
            try:
                _, found = self.folder.fetch(relative, scratch)
                sha256 = found.sha256
            except NotFoundError:
                sha256 = "missing"
            if sha256 != entry.sha256:
                raise IntegrityError(
                    f"checkpoint file {self.folder.uri}/{relative} is not what was written "
                    f"(SHA-256 {sha256[:12]}, expected {entry.sha256[:12]})"
                )
        return self.fetched(checkpoint, scratch)

    def fetched(self, checkpoint: Checkpoint, scratch: Path) -> Path:
        """Where `fetch` puts a checkpoint."""
        return (self.folder.local or scratch) / checkpoint.name

    def newest_usable(self, scratch: Path) -> Checkpoint | None:
        """The newest checkpoint whose files all verify; older ones stand in for damaged ones."""
        for checkpoint in reversed(self.committed()):
            try:
                self.fetch(checkpoint, scratch)
            except IntegrityError as error:
                logger.warning("%s; falling back to the checkpoint before it", error)
            else:
                return checkpoint
        return None

    def prune(self, keep: Sequence[str]) -> None:
        """Delete committed checkpoints not in `keep`, and unfinished ones older than the newest."""
        committed = {checkpoint.name: checkpoint.state.step for checkpoint in self.committed()}
        newest = max(committed.values(), default=0)
        for name in self._names():
            is_left_over = name not in committed and _step_of(name) < newest
            if name not in keep and (name in committed or is_left_over):
                self.folder.delete(name, first=MANIFEST)

    def clear_staging(self, attempt: str) -> None:
        """Delete what workers of other attempts were writing when they were killed (on a local disk)."""
        staging = self.folder.local / STAGING if self.folder.local is not None else None
        if staging is not None and staging.is_dir():
            for left in staging.iterdir():
                if not left.name.startswith(attempt):
                    shutil.rmtree(left, ignore_errors=True)

    def _names(self) -> list[str]:
        return [name for name in self.folder.folders() if _NAME.fullmatch(name)]


class CheckpointWriter:
    """One worker's side of writing: the state goes to a local staging folder, the upload runs in the background.

    Worker 0 commits once every worker has written its `part-*.json`; nothing collective happens off the main
    thread. A store that does not answer is asked again for `commit_timeout_s`, while the workers train on.
    """

    def __init__(
        self,
        folder: RunFolder,
        *,
        rank: int,
        num_workers: int,
        attempt: str,
        staging: Path,
        commit_timeout_s: float,
        on_commit: Callable[[Checkpoint], None] | None = None,
        tensor: int = 1,
        owns_staging: bool = False,
    ) -> None:
        """`tensor`: workers of each tensor-parallel group. `owns_staging`: no other worker writes to `staging`."""
        self._folder = folder
        self._rank = rank
        self._num_workers = num_workers
        self._attempt = attempt
        self._staging = staging
        self._commit_timeout_s = commit_timeout_s
        self._on_commit = on_commit
        self._tensor, self._owns_staging = tensor, owns_staging
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, state: TrainState, save_local: Callable[[Path, str], Any], history: bytes | None) -> str:
        """Write this worker's part of a checkpoint; returns its name once the local copy is complete.

        Waits first for the previous upload, so that at most one staging copy exists. Collective, because
        `save_local(folder, tag)` is.

        Raises:
            StorageError, WaitTimeoutError: the previous upload failed.
        """
        self.wait()
        name = f"step-{state.step:08d}-{self._attempt}"
        folder = self._staging / name
        folder.mkdir(parents=True, exist_ok=True)
        with filesystem.translate_errors(str(folder)), _full_disks_told(folder):
            save_local(folder, TAG)
            if history is not None and self._rank == 0:
                (folder / "history.parquet").write_bytes(history)
        self._pending = self._thread.submit(self._upload, name, folder, state)
        return name

    def wait(self) -> None:
        """Until the last checkpoint is committed (worker 0) or uploaded (the others); re-raises its error."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def close(self) -> None:
        """Finish the last upload and stop the thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def _upload(self, name: str, folder: Path, state: TrainState) -> None:
        target = self._folder.sub(name)
        entries = {}
        for path in self._own_files(folder):
            relative = path.relative_to(folder).as_posix()
            entries[relative] = self._patiently(partial(target.put, path, relative))
        part = CheckpointManifest(state=state, files=entries)
        self._patiently(partial(target.write, f"part-{self._rank:05d}.json", part.model_dump_json().encode()))
        if self._rank == 0:
            self._commit(name, state)

    def _own_files(self, folder: Path) -> list[Path]:
        """DeepSpeed names files by place: `pp` among the groups of workers, `mp` in a tensor-parallel group.

        Those of no place are worker 0's. Other workers may share the folder. A pipeline's layers are named otherwise.
        """
        if self._owns_staging:
            kinds = ("*",) if self._rank == 0 else ("*.pt",)
            return sorted(path for kind in kinds for path in folder.rglob(kind) if path.is_file())
        mine = []
        for path in sorted(folder.rglob("*")):
            data, part = (re.search(rf"{kind}_rank_(\d+)_", path.name) for kind in ("pp", "mp"))
            owner = (int(data[1]) if data else 0) * self._tensor + (int(part[1]) if part else 0)
            if worker := re.fullmatch(r"worker-(\d+)\.pt", path.name):  # of a strategy that is not DeepSpeed's
                owner = int(worker[1])
            if path.is_file() and owner == self._rank:
                mine.append(path)
        return mine

    def _commit(self, name: str, state: TrainState) -> None:
        target = self._folder.sub(name)
        deadline = time.monotonic() + self._commit_timeout_s
        files: dict[str, FileEntry] = {}
        for rank in range(self._num_workers):
            while (data := self._patiently(partial(target.read, f"part-{rank:05d}.json"))) is None:
                if time.monotonic() > deadline:
                    raise WaitTimeoutError(
                        f"worker {rank} to upload its part of checkpoint {name}",
                        self._commit_timeout_s,
                        "checkpoint.commit_timeout_s",
                    )
                time.sleep(0.05)
            files |= CheckpointManifest.model_validate_json(data).files
        manifest = CheckpointManifest(state=state, files=dict(sorted(files.items()))).sealed()
        self._patiently(partial(target.write, MANIFEST, manifest.model_dump_json(indent=1).encode()))
        logger.info("checkpoint %s committed", name)
        if self._on_commit is not None:
            self._patiently(partial(self._on_commit, Checkpoint(name, manifest)))

    def _patiently(self, action: Callable[[], Found]) -> Found:
        deadline = time.monotonic() + self._commit_timeout_s
        while True:
            try:
                return action()
            except UnreachableError as error:
                if time.monotonic() + RETRY_S > deadline:
                    raise
                logger.warning("%s; tried again in %g s", error, RETRY_S)
                time.sleep(RETRY_S)


@contextlib.contextmanager
def _full_disks_told(folder: Path) -> Iterator[None]:
    """Torch hides the disk's error in a RuntimeError about its own file positions; make an `OSError` of it."""
    try:
        yield
    except RuntimeError as error:
        if shutil.disk_usage(folder).free > _NEARLY_FULL_BYTES:
            raise
        raise OSError(errno.ENOSPC, "no space left for the checkpoint") from error


def _step_of(name: str) -> int:
    return int(name.split("-")[1])


def to_universal(folder: Path, target: Path) -> None:
    """Convert the DeepSpeed checkpoint `folder/TAG` to the universal format in `target/TAG`, for any worker count.

    Runs DeepSpeed's converter in this process (about 1.5 s for 10 M parameters).
    """
    import io
    from types import SimpleNamespace

    from modelyard.training.engine import import_deepspeed

    import_deepspeed()
    from deepspeed.checkpoint.ds_to_universal import main as convert

    said = io.StringIO()
    options = SimpleNamespace(
        input_folder=str(folder / TAG),
        output_folder=str(target / TAG),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with contextlib.redirect_stdout(said):
        convert(options)
    logger.debug("universal conversion: %s", said.getvalue())
