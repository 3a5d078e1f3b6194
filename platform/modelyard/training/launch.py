"""From a config to a registered model: what the driver does.

Everything that can be refused is refused here, before the cluster is asked for anything.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelyard.artifacts.registry import Registry
from modelyard.artifacts.store import Store
from modelyard.cluster import RayCluster, connect
from modelyard.config import load, parse, settings
from modelyard.data.dataset import Dataset
from modelyard.errors import CapacityError, ConfigError, TrainingError, WaitTimeoutError
from modelyard.observability.tracking import Tracker
from modelyard.scheduling.client import Lease, lease
from modelyard.scheduling.measured import Report
from modelyard.scheduling.performance import GradientNoise
from modelyard.training import runs
from modelyard.training.checkpoints import CheckpointStore
from modelyard.training.config import TrainConfig
from modelyard.training.deepspeed_config import check_passthrough
from modelyard.training.history import History
from modelyard.training.interrupts import Interrupted, grouped, interruptible, original_error
from modelyard.training.leased import Selectors, check_lease, request_of, train_on
from modelyard.training.monitor import Record, is_closing, stop_request
from modelyard.training.parallel import check_model
from modelyard.training.progress import Progress
from modelyard.training.run_folder import RunFolder
from modelyard.training.summary import loss_curve
from modelyard.training.worker import Job, Trained, train_worker

logger = logging.getLogger(__name__)

RAY_TRAIN_ENVIRONMENT = {
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15",  # a placement group on a node that just died
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}
"""Ray Train's own settings, tightened; whatever the user's environment says stays."""

OnRecord = Callable[[Record], None]


@dataclass(frozen=True)
class Run:
    """A finished run."""

    run_id: str
    model: str
    """Reference of the registered model, e.g. `models:/tiny-gpt/1`."""
    digest: str
    """SHA-256 of the model's manifest."""
    steps: int
    initial_metrics: Mapping[str, float]
    """On the final split, before the first step."""
    metrics: Mapping[str, float]
    """On the final split, of the model."""
    stopped_because: str
    loss_curve: Path | None
    """PNG of the losses, in the run's local folder."""
    tracking_run_id: str
    history: History


def train(
    config: TrainConfig | str | Path, *overrides: str, on_record: OnRecord | None = None, progress: bool = True
) -> Run:
    """Train what `config` says and register the model; continues the run when it was cut off before.

    Args:
        config: a `TrainConfig` or the path of its YAML file.
        overrides: dotted settings, e.g. `"training.zero_stage=3"`; only with a path.
        on_record: called on a thread with each record of the run (steps, validations, checkpoints).
        progress: show a progress bar on stderr.

    Raises:
        InputError: something in the config, the data or the cluster cannot work; nothing was started.
        TrainingError: the workers failed more often than `failures.max_failures`.
        StorageError: the store refused.

    Example:
        >>> import modelyard
        >>> run = modelyard.train("jobs/configs/tiny_gpt.yaml", "training.max_steps=50")
        >>> run.model
        'models:/tiny-gpt/1'
    """
    if not isinstance(config, TrainConfig):
        config = load(TrainConfig, config, overrides)
    elif overrides:
        raise ConfigError("overrides go with the path of a config file", "use config.with_changes(...)")
    with ExitStack() as stack:
        launch = Launch(config)
        stack.enter_context(runs.exclusive(settings().home, launch.run_id))
        if (done := launch.finished()) is not None:
            return done
        show = stack.enter_context(Progress(config, launch.run_id)) if progress else None
        return launch.run([sink for sink in (show, on_record) if sink is not None])


class Launch:
    """One attempt to bring a run to its end. Made by `train`, and by the trials of a study."""

    def __init__(self, config: TrainConfig, dataset: tuple[str, str] | None = None) -> None:
        """`dataset`: reference and digest of the dataset in the store, where they are known already."""
        check_passthrough(config.training.deepspeed)
        check_lease(config)
        self._config = config
        self._settings = settings()
        self._store = Store.from_settings()
        self._registry = Registry.from_settings()
        self.dataset = dataset or self._find_dataset()
        self._check_data(Dataset.open(self._store.open("dataset", self.dataset[1])))
        self._bases = {name: self._registry.resolve(name, kind="model").digest for name in config.task.bases()}
        files = self._store.manifest("dataset", self.dataset[1]).files
        self._identity = runs.identity(config, files, self._bases)
        all_runs = RunFolder(f"{self._store.uri}/runs")
        self.run_id = runs.choose_run(all_runs, config, self._identity)
        self.folder = all_runs.sub(self.run_id)

    def finished(self) -> Run | None:
        """The run as it ended, when it has ended before."""
        if self.folder.read(runs.FINISHED) is None:
            return None
        logger.warning("run %s has finished before; nothing to do", self.run_id)
        record, trained = self._record(), self.result()
        assert record is not None
        assert trained is not None
        return self._registered(trained, record.tracking_run_id or "")

    def run(self, sinks: list[OnRecord]) -> Run:
        """Train (unless only the registration is missing), register, mark as finished."""
        trained = self.result()
        with self.admitted() if trained is None else nullcontext() as monitor:
            return self._tracked(trained, monitor, sinks)

    def _tracked(self, trained: Trained | None, monitor: Any, sinks: list[OnRecord]) -> Run:
        tracker = self._tracker()
        try:
            trained = trained or self.train(monitor, [*sinks, _to(tracker)])
            done = self._registered(trained, tracker.run_id)
            if done.loss_curve is not None:
                tracker.log_file(done.loss_curve)
        except KeyboardInterrupt:
            tracker.finish("KILLED")
            raise
        except BaseException:
            tracker.finish("FAILED")
            raise
        tracker.finish("FINISHED")
        self.folder.write(runs.FINISHED, b'{"model": "%s"}' % done.model.encode())
        return done

    def _find_dataset(self) -> tuple[str, str]:
        """Reference and digest of the dataset; a plain folder is stored first."""
        name = self._config.dataset
        if name.startswith("datasets:/"):
            version = self._registry.resolve(name, kind="dataset")
            return version.reference, version.digest
        folder = Path(name).expanduser()
        if not folder.is_dir():
            raise ConfigError(
                f"dataset: {name!r} is neither a reference nor a folder",
                "write datasets:/NAME (see `modelyard models list --kind dataset`) or the folder of a prepared dataset",
            )
        Dataset.open(folder)
        manifest = self._store.put(folder, kind="dataset", name=self._config.name)
        return str(folder), manifest.digest()

    def _check_data(self, dataset: Dataset) -> None:
        config = self._config
        config.task.check(dataset.info)
        check_model(config, dataset.info)
        needed = {"train"}
        if config.validation.every_steps:
            needed.add(config.validation.split)
        for split in needed:
            dataset.split(split)

    def _record(self) -> runs.RunRecord | None:
        return runs.read_record(self.folder)

    def result(self) -> Trained | None:
        """What the workers left, once they have finished."""
        data = self.folder.read(runs.RESULT)
        return None if data is None else Trained.model_validate_json(data)

    def _tracker(self) -> Tracker:
        """The MLflow run of this run: a new one, or the one it was started with."""
        record = self._record()
        if record is not None and record.tracking_run_id is not None:
            return Tracker.resume(record.tracking_run_id)
        plain = self._config.model_dump(mode="json")
        tracker = Tracker.start(self._config.name, self.run_id, plain, {"modelyard.dataset": self.dataset[1]})
        self.write_record(tracker.run_id)
        return tracker

    def write_record(self, tracking_run_id: str | None = None) -> None:
        """Write who the run is; the workers look for it."""
        record = runs.RunRecord(
            run_id=self.run_id,
            identity=self._identity,
            config=self._config.model_dump(mode="json"),
            tracking_run_id=tracking_run_id,
        )
        self.folder.write(runs.RUN_RECORD, record.model_dump_json(indent=1).encode())

    def job(self) -> Job:
        """What the run's workers must know."""
        reference, digest = self.dataset
        return Job(
            config=self._config,
            run_id=self.run_id,
            run_uri=self.folder.uri,
            store=self._store.uri,
            dataset_digest=digest,
            bases=self._bases,
            dataset_reference=reference,
        )

    @contextmanager
    def admitted(self) -> Iterator[Any]:
        """The run's monitor, on a cluster that can hold the workers. A run refused here leaves no record."""
        self._store.check_writable()
        for name, value in RAY_TRAIN_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        interval = str(self._config.failures.health_check_interval_s)
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", interval)
        connect()
        import ray

        from modelyard.training.elastic import check_capacity
        from modelyard.training.monitor import start_monitor

        check_capacity(RayCluster(), self._config.workers)
        try:
            monitor = start_monitor(self.run_id)
        except ValueError:
            raise runs.in_use(self.run_id) from None
        try:
            yield monitor
        finally:
            ray.kill(monitor)

    def train(self, monitor: Any, sinks: list[OnRecord]) -> Trained:
        """Run the gang under Ray Train; shows its records while it goes."""
        job = self.job()
        if self._config.lease is None:
            with _Follower(monitor, sinks):
                return self._attempt(monitor, job, None)
        request = request_of(self._config, self.run_id, time.time())
        with (
            lease(request, timeout_s=self._config.lease.timeout_s) as held,
            _Follower(monitor, [*sinks, _to_lease(held, self._config.training.global_batch_size)]),
        ):
            try:
                return train_on(held, lambda selectors: self._leased(monitor, job, selectors), stop_request(monitor))
            except Interrupted as error:
                ended = error  # as it was asked to: no failure of the leased job
        raise ended

    def _leased(self, monitor: Any, job: Job, selectors: Selectors | None) -> Trained | None:
        """One attempt on a lease; None when it made way for another, or the lease's nodes are gone."""
        try:
            return self._attempt(monitor, job, selectors)
        except (Interrupted, WaitTimeoutError):
            if selectors is None or is_closing(monitor):
                raise  # there is no scheduler that could give another, or nobody who would use it
            return None

    def _attempt(self, monitor: Any, job: Job, selectors: Selectors | None) -> Trained:
        import ray.train

        from modelyard.training.trainer import trainer

        fit = trainer(
            train_worker,
            {"job": job.model_dump(mode="json"), "monitor": monitor},
            job.config,
            monitor=monitor,
            storage_uri=f"{self.folder.uri}/ray",
            selectors=selectors,
        )
        try:
            result = interruptible(fit.fit, lambda: ray.get(monitor.close.remote("interrupted"), timeout=10))
        except ray.train.WorkerGroupError as error:
            logger.debug("workers failed: %s", error)
            for cause in map(original_error, error.worker_failures.values()):
                if isinstance(cause, Interrupted):
                    raise cause from error
            raise grouped(error.worker_failures) from error
        except ray.train.ControllerError as error:
            cause = error.controller_failure
            if isinstance(cause, TrainingError | CapacityError):
                raise cause from error
            raise TrainingError(f"Ray Train could not run the gang: {cause}") from error
        except ray.exceptions.RayActorError as error:
            *_, last = str(error).strip().splitlines()
            raise TrainingError(
                f"Ray Train's controller ended: {last}",
                "is the store reachable from the cluster's nodes? AWS_* must be set on every one of them",
            ) from error
        return parse(Trained, result.return_value)

    def _registered(self, trained: Trained, tracking_run_id: str) -> Run:
        manifest = self._store.manifest("model", trained.model_digest)
        version = self._registry.register(manifest, run_id=tracking_run_id or None)
        history = self._history()
        picture = self._settings.home / "runs" / self.run_id / "loss.png"
        curve = loss_curve(history, picture, title=f"{self.run_id} -> {version.reference}")
        return Run(
            run_id=self.run_id,
            model=version.reference,
            digest=version.digest,
            steps=trained.steps,
            initial_metrics=trained.initial_metrics,
            metrics=trained.final_metrics,
            stopped_because=trained.stopped_because,
            loss_curve=curve,
            tracking_run_id=tracking_run_id,
            history=history,
        )

    def _history(self) -> History:
        folder = self.folder.sub("checkpoints")
        committed = CheckpointStore(folder).committed()
        data = folder.read(f"{committed[-1].name}/history.parquet") if committed else None
        return History() if data is None else History.from_parquet(data)


class _Follower:
    """A thread of the driver that carries records from the run's monitor to whoever shows or stores them."""

    def __init__(self, monitor: Any, sinks: list[OnRecord], interval_s: float = 0.5) -> None:
        self._monitor = monitor
        self._sinks = sinks
        self._interval_s = interval_s
        self._seen = 0
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="follower", daemon=True)

    def __enter__(self) -> _Follower:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._thread.join(timeout=10)

    def _run(self) -> None:
        import ray

        while True:
            closing = self._closing.wait(self._interval_s)
            try:
                records = ray.get(self._monitor.pull.remote(self._seen), timeout=10)
            except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError):
                records = []
            self._seen += len(records)
            for record in records:
                for sink in self._sinks:
                    sink(record)
            if closing:
                return


def _to_lease(held: Lease, batch: int) -> OnRecord:
    def report(record: Record) -> None:
        if record["kind"] == "step":
            step_s = batch / record["rows_per_s"] if record.get("rows_per_s") else None
            signal, variance = record.get("gradient_signal"), record.get("gradient_variance")
            noise = None if signal is None or variance is None else GradientNoise(sqr=signal, var=variance / batch)
            held.report(Report(float(record["step"]), step_s, record.get("optimizer_s", 0.0), batch, noise))

    return report


def _to(tracker: Tracker) -> OnRecord:
    def log(record: Record) -> None:
        metrics = {k: float(v) for k, v in record.items() if isinstance(v, int | float) and k not in ("step", "time_s")}
        if record["kind"] in ("step", "validation", "initial"):
            tracker.log(int(record["step"]), metrics)

    return log


__all__ = ["Run", "train"]
