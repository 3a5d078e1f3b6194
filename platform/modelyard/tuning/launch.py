"""From a study's config to its best model: what the driver does.

Everything that can be refused is refused here, before the cluster is asked for anything.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelyard.artifacts import Registry, Store, filesystem
from modelyard.cluster import RayCluster, connect
from modelyard.config import load, parse, settings
from modelyard.errors import CapacityError, ConfigError, TrainingError
from modelyard.observability.mlflow_client import connect as open_tracking
from modelyard.training import runs
from modelyard.training.config import TrainConfig
from modelyard.training.interrupts import terminated_as_interrupted
from modelyard.training.launch import Launch
from modelyard.tuning.config import StudyConfig, resolve
from modelyard.tuning.live import Live
from modelyard.tuning.report import Pictures, pictures
from modelyard.tuning.space import Space, known_space
from modelyard.tuning.study import Outcome, StudyFolder, StudyRecord, Trial, TrialStatus, best

logger = logging.getLogger(__name__)

TUNE_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_GLOBAL_CHECKPOINT_S": "2",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "TUNE_MAX_PENDING_TRIALS_PG": "4",
    "RAY_AIR_NEW_OUTPUT": "0",
}
"""Ray Tune's own settings; whatever the user's environment says stays."""
RUNNER_CPUS = 0.001
"""What a trial's runner books: it only waits, but Tune wants a reservation."""


@dataclass(frozen=True)
class Study:
    """A finished study."""

    name: str
    config: StudyConfig
    trials: tuple[Trial, ...]
    best: tuple[Trial, ...]
    """The best trial, or the Pareto front; empty when every trial failed."""
    model: str | None
    """Reference of the registered model of the first of `best`."""
    elapsed_s: float
    pictures: Pictures


def tune(config: StudyConfig | str | Path, *overrides: str, progress: bool = True) -> Study:
    """Run the study that `config` describes and register its best model; goes on when it was cut off before.

    Args:
        config: a `StudyConfig` or the path of its YAML file.
        overrides: dotted settings, e.g. `"trials=8"`; only with a path.
        progress: show a live table on stderr.

    Raises:
        InputError: something in the config, the data or the cluster cannot work; nothing was started.
        TrainingError: every trial failed.
        StorageError: the store refused.

    Example:
        >>> from modelyard.tuning import tune
        >>> study = tune("jobs/configs/tune_digits.yaml", "trials=8")
        >>> study.best[0].params
        {'optimizer.learning_rate': 0.0041}
    """
    if not isinstance(config, StudyConfig):
        config = load(StudyConfig, config, overrides)
    elif overrides:
        raise ConfigError("overrides go with the path of a config file", "use config.with_changes(...)")
    resolved, space = resolve(config)
    folder = StudyFolder(config.name)
    with runs.exclusive(settings().home, f"study-{config.name}"):
        if folder.exists():
            _require_same(folder, resolved)
            return _run(folder, folder.record(), space, progress)
        record = StudyRecord(config=resolved, dataset=_dataset(resolved), started_s=time.time())
        Store.from_settings().check_writable()
        return _run(folder, record, space, progress)


def resume(name: str, *, failed: bool = False, progress: bool = True) -> Study:
    """Go on with a study by its name; trials that are over stay as they are.

    Args:
        failed: run failed trials again, from their newest checkpoints.

    Raises:
        NotFoundError: there is no such study.
    """
    folder = StudyFolder(name)
    record = folder.record()
    space = known_space(record.config.train, record.config.space)
    with runs.exclusive(settings().home, f"study-{name}"):
        return _run(folder, record, space, progress, failed=failed)


def _require_same(folder: StudyFolder, config: StudyConfig) -> None:
    old = folder.record().config
    free = {"parallel", "time_budget_s", "register_best"}
    before, now = (each.model_dump(mode="json", exclude=free) for each in (old, config))
    if before != now:
        raise ConfigError(
            f"study {folder.name!r} exists with other settings: {runs.differences(before, now)}",
            f"give another name with --name=NAME, or go on with it: modelyard tune resume {folder.name}",
        )


def _dataset(config: StudyConfig) -> tuple[str, str] | None:
    """The trials' dataset, found and checked against the task once; None when they differ in it."""
    if any(name == "dataset" for name in config.space):
        return None
    return Launch(parse(TrainConfig, {**config.train, "run": None}, source="train")).dataset


def _run(folder: StudyFolder, record: StudyRecord, space: Space, progress: bool, *, failed: bool = False) -> Study:
    from modelyard.tuning.recorder import Recorder, StudyCallback
    from modelyard.tuning.searching import num_trials
    from modelyard.tuning.tracking import Tracking

    config, began = record.config, time.time()
    before = folder.outcome()
    if before is not None and not failed:
        return _study(folder, record, before)
    total = num_trials(config, space)
    show = Live(folder.name, total, config.objectives) if progress else None
    tracking = Tracking(config)
    recorder = Recorder(folder, space, tuple(sink for sink in (show, tracking.on_trial) if sink is not None))
    tracking.writes_to(recorder)
    StudyCallback.attach(folder.name, recorder)
    for name, value in TUNE_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    open_tracking(settings().tracking_uri)  # makes its database now, not on a thread beside the trials
    connect()
    with _quiet():
        if not folder.exists():
            tuner = _new_tuner(folder, record, space)  # refuses what cannot work before the study exists
            folder.write_record(record)
        else:
            tuner = _restored(folder, failed) or _new_tuner(folder, record, space)
        with show or nullcontext(), tracking, terminated_as_interrupted():
            tuner.fit()
    trials = recorder.trials()
    if any(not trial.is_over for trial in trials) or (len(trials) < total and config.time_budget_s is None):
        logger.warning("interrupted: `modelyard tune resume %s` goes on", folder.name)
        raise KeyboardInterrupt
    return _finish(folder, record, trials, began)


def _new_tuner(folder: StudyFolder, record: StudyRecord, space: Space) -> Any:
    from ray import tune as ray_tune

    from modelyard.tuning import searching
    from modelyard.tuning.recorder import StudyCallback
    from modelyard.tuning.runner import ENVIRONMENT, STUDY

    config = record.config
    base = parse(TrainConfig, config.train)
    environment = {name: value for name, value in os.environ.items() if name.startswith("MODELYARD_")}
    storage_filesystem, storage_path = filesystem.resolve(folder.uri)
    every = base.validation.every_steps or base.training.max_steps
    return ray_tune.Tuner(
        _trainable(),
        param_space={
            STUDY: folder.name,
            ENVIRONMENT: environment,
            **searching.param_space(config, space),
        },
        tune_config=ray_tune.TuneConfig(
            num_samples=1 if config.search.kind == "grid" else config.trials,
            search_alg=searching.searcher(config, _parallel(config, base, searching.num_trials(config, space))),
            scheduler=searching.scheduler(config, space, every_steps=every, max_steps=_most_steps(base, space)),
            time_budget_s=config.time_budget_s,
            reuse_actors=True,
            trial_dirname_creator=_trial_folder,
        ),
        run_config=ray_tune.RunConfig(
            name="tune",
            storage_path=storage_path,
            storage_filesystem=storage_filesystem,
            callbacks=[StudyCallback(folder.name)],
            verbose=0,
        ),
    )


def _restored(folder: StudyFolder, failed: bool) -> Any:
    """The tuner as Tune last saved it; None when it was killed before that."""
    from ray import tune as ray_tune

    storage_filesystem, root = filesystem.resolve(folder.uri)
    path = f"{root}/tune"
    if not folder.trials():
        return None
    if not ray_tune.Tuner.can_restore(path, storage_filesystem=storage_filesystem):
        return None
    return ray_tune.Tuner.restore(
        path, trainable=_trainable(), resume_errored=failed, storage_filesystem=storage_filesystem
    )


def _trainable() -> Any:
    from ray import tune as ray_tune

    from modelyard.tuning.runner import TrialRunner

    return ray_tune.with_resources(TrialRunner, {"CPU": RUNNER_CPUS})


def _trial_folder(trial: Any) -> str:
    return str(trial.trial_id)


def _most_steps(base: TrainConfig, space: Space) -> int:
    ends: list[int] = [end for each in space.dimensions if each.name == "training.max_steps" for end in each.ends()]
    return max([base.training.max_steps, *ends])


def _parallel(config: StudyConfig, base: TrainConfig, num_trials: int) -> int:
    """How many trials run at once: as many as the study says, or as the cluster holds when idle, at least one.

    Raises:
        CapacityError: the population of PBT does not fit at once.
    """
    workers = base.workers
    nodes = [node for node in RayCluster().nodes() if node.alive and node.matches(workers.selector)]
    fitting = sum(node.fits(workers.per_worker, among=node.total) for node in nodes) // workers.max
    if config.scheduler.kind != "pbt":
        return config.parallel or max(1, min(fitting, num_trials))
    if fitting < num_trials:
        raise CapacityError(
            f"scheduler pbt trains its whole population at once: {num_trials} trials, but {fitting} fit",
            f"set trials to at most {fitting}" if fitting > 1 else "ask for less per worker, or add nodes",
        )
    return num_trials


@contextmanager
def _quiet() -> Iterator[None]:
    """Tune's own messages off: the live table says it better."""
    loggers = [logging.getLogger(name) for name in ("ray.tune", "ray.train", "ray.air")]
    before = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for each, level in zip(loggers, before, strict=True):
            each.setLevel(level)


def _finish(folder: StudyFolder, record: StudyRecord, trials: list[Trial], began: float) -> Study:
    config = record.config
    if trials and all(trial.status is TrialStatus.FAILED for trial in trials):
        reasons = {trial.reason for trial in trials}
        first = trials[0].reason
        problem = f"all {len(trials)} trials of study {folder.name!r} failed; the first: {first}"
        raise TrainingError(problem, "see `modelyard tune show`" if len(reasons) > 1 else "")
    chosen = best(trials, config.objectives)
    model = _register(chosen[0]) if chosen and config.register_best else None
    before = folder.outcome()
    elapsed = time.time() - began + (before.elapsed_s if before is not None else 0.0)
    outcome = Outcome(
        best=tuple(trial.trial_id for trial in chosen), model=model, ended_s=time.time(), elapsed_s=elapsed
    )
    folder.write_outcome(outcome)
    return _study(folder, record, outcome)


def _register(trial: Trial) -> str | None:
    """Register the model that a trial left, under the name in its config; it names its dataset and its settings."""
    if trial.model_digest is None:
        logger.warning("the best trial was stopped before it made a model; nothing was registered")
        return None
    registry = Registry.from_settings()
    manifest = registry.store.manifest("model", trial.model_digest)
    return registry.register(manifest, run_id=trial.tracking_run_id).reference


def _study(folder: StudyFolder, record: StudyRecord, outcome: Outcome) -> Study:
    trials = folder.trials()
    by_id = {trial.trial_id: trial for trial in trials}
    return Study(
        name=folder.name,
        config=record.config,
        trials=tuple(trials),
        best=tuple(by_id[trial_id] for trial_id in outcome.best if trial_id in by_id),
        model=outcome.model,
        elapsed_s=outcome.elapsed_s,
        pictures=pictures(folder.name, record.config, trials),
    )
