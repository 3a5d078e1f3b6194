"""Run tracking on MLflow: parameters, metrics and files of one run, in batches and off the caller's thread.

Only `MlflowClient` is used, never MLflow's fluent API, so there is no global "active run". MLflow is imported on
first use (about three seconds).
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
import urllib.parse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from modelyard.config import settings
from modelyard.errors import ModelyardError, NotFoundError, StorageError
from modelyard.observability.mlflow_client import connect, sqlite_path, translate_mlflow_errors

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

Status = Literal["FINISHED", "FAILED", "KILLED"]
_BATCH = 500
_FLUSH_EVERY_S = 2.0
_MAX_WAITING = 100_000
_MAX_PARAM_CHARS = 6000


class Tracker:
    """One run. `log` never blocks and never fails; what cannot be written is kept and tried again.

    One background thread writes. Use it as a context manager, or call `finish`.
    """

    def __init__(self, client: MlflowClient, tracking_uri: str, run_id: str) -> None:
        """Take over an existing run; use `start` or `resume` instead."""
        self.run_id = run_id
        self.tracking_uri = tracking_uri
        self._client = client
        self._waiting: list[Any] = []
        self._dropped = 0
        self._finished = False
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"tracker-{run_id[:8]}", daemon=True)
        self._thread.start()

    @classmethod
    def start(
        cls,
        experiment: str,
        run_name: str,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
        tracking_uri: str | None = None,
    ) -> Tracker:
        """Begin a run.

        Args:
            experiment: group of comparable runs; made when it is new.
            run_name: a name for people; need not be unique.
            params: may be nested; `{"optimizer": {"lr": 1}}` becomes `optimizer.lr`.
            tags: free labels.
            tracking_uri: any MLflow URI; that of the settings by default.

        Raises:
            StorageError: the tracking server or database cannot be used.
        """
        from mlflow.entities import Param

        uri = tracking_uri or settings().tracking_uri
        client = connect(uri)
        with translate_mlflow_errors(uri):
            run = client.create_run(_experiment_id(client, uri, experiment), run_name=run_name, tags=dict(tags or {}))
            flat = [Param(key, text[:_MAX_PARAM_CHARS]) for key, text in _flatten(params or {})]
            for start in range(0, len(flat), 100):
                client.log_batch(run.info.run_id, params=flat[start : start + 100])
        return cls(client, uri, run.info.run_id)

    @classmethod
    def resume(cls, run_id: str, tracking_uri: str | None = None) -> Tracker:
        """Go on with a run, e.g. after its driver was killed; it counts as running again.

        Raises:
            NotFoundError: there is no such run.
            StorageError: the tracking server or database cannot be used.
        """
        uri = tracking_uri or settings().tracking_uri
        client = connect(uri)
        with translate_mlflow_errors(uri):
            client.get_run(run_id)
            client.update_run(run_id, status="RUNNING")
        return cls(client, uri, run_id)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record figures of one step. They reach MLflow within some seconds."""
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        points = [Metric(key, float(value), now_ms, step) for key, value in metrics.items()]
        with self._lock:
            if self._stop.is_set():
                raise RuntimeError(f"run {self.run_id} is finished")
            self._waiting.extend(points)
            excess = len(self._waiting) - _MAX_WAITING
            if excess > 0:  # the server is away for long: keep the newest, and say so at the end
                del self._waiting[:excess]
                self._dropped += excess

    def log_file(self, path: Path, folder: str | None = None) -> None:
        """Attach a file to the run, below `folder` when given.

        Raises:
            NotFoundError: there is no such file.
            StorageError: it cannot be written.
        """
        if not path.is_file():
            raise NotFoundError(f"there is no file {str(path)!r} to attach to the run")
        with translate_mlflow_errors(self.tracking_uri):
            self._client.log_artifact(self.run_id, str(path), folder)

    def flush(self) -> None:
        """Write everything logged so far.

        Raises:
            StorageError: the tracking server or database cannot be used; nothing is lost, call again.
        """
        with self._writing:
            while True:
                with self._lock:
                    batch = self._waiting[:_BATCH]
                    del self._waiting[: len(batch)]
                if not batch:
                    return
                try:
                    with translate_mlflow_errors(self.tracking_uri):
                        self._client.log_batch(self.run_id, metrics=batch, synchronous=True)
                except StorageError:
                    with self._lock:
                        self._waiting[:0] = batch
                    raise

    def finish(self, status: Status = "FINISHED") -> None:
        """Write what is left and close the run. A second call does nothing.

        Raises:
            StorageError: the tracking server or database cannot be used; call again to retry.
        """
        self._stop.set()
        if self._finished:
            return
        self._thread.join()
        self.flush()
        with translate_mlflow_errors(self.tracking_uri):
            self._client.set_terminated(self.run_id, status)
        self._finished = True
        if self._dropped:
            log.warning(
                "run %s: %d figures were lost while %s was away",
                self.run_id,
                self._dropped,
                self.tracking_uri,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.finish()
        else:
            with contextlib.suppress(StorageError):  # the first error is the one to show
                self.finish("KILLED" if issubclass(kind, KeyboardInterrupt | SystemExit) else "FAILED")

    def _run(self) -> None:
        warned = False
        while not self._stop.wait(_FLUSH_EVERY_S):
            try:
                self.flush()
                warned = False
            except ModelyardError as error:
                if not warned:
                    log.warning("run %s: metrics are kept until tracking works again: %s", self.run_id, error)
                warned = True


def _experiment_id(client: MlflowClient, uri: str, name: str) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, artifact_location=_files_location(uri, name)))
        except MlflowException as error:
            found = client.get_experiment_by_name(name)  # another process made it meanwhile
            if found is None:
                raise error
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return str(found.experiment_id)


def _files_location(uri: str, experiment: str) -> str | None:
    """Where a new experiment keeps files: a server decides itself; otherwise beside the database."""
    if urllib.parse.urlsplit(uri).scheme in ("http", "https"):
        return None
    path = sqlite_path(uri)
    base = path.parent if path is not None else settings().home
    return (base / "runs" / urllib.parse.quote(experiment, safe="")).as_uri()


def _flatten(params: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in params.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            plain = value if isinstance(value, str) else json.dumps(value, default=str)
            yield f"{prefix}{key}", plain
