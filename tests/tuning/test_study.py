"""Real studies on a cluster: a failure stays alone, a killed driver repeats nothing, weak runs take over weights."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from modelyard.artifacts import Registry
from modelyard.config import parse
from modelyard.training.checkpoints import CheckpointStore
from modelyard.training.history import History
from modelyard.training.run_folder import RunFolder
from modelyard.tuning import StudyConfig, resume, tune
from modelyard.tuning.study import StudyFolder, Trial, TrialStatus

pytestmark = [pytest.mark.ray, pytest.mark.slow]

PBT = {"kind": "pbt", "interval_steps": 4, "quantile": 0.5, "resample_probability": 0.0}


@pytest.fixture
def study(token_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, ray_cluster: str) -> Callable[..., Any]:
    """Builds a study of one-process trials on the token dataset."""
    monkeypatch.setenv("RAY_ADDRESS", ray_cluster)

    def build(space: dict[str, Any], max_steps: int = 8, every_steps: int = 4, **settings: Any) -> StudyConfig:
        config = token_config(
            workers=1,
            training={"max_steps": max_steps, "zero_stage": 0, "record_samples": False, "noise_every_steps": 0},
            validation={"every_steps": every_steps},
        )
        train = config.model_dump(mode="json", exclude_unset=True)
        return parse(StudyConfig, {"name": "counting", "train": train, "space": space, "parallel": 1, **settings})

    return build


def folder_of(trial: Trial) -> RunFolder:
    return RunFolder(f"{os.environ['MODELYARD_STORE']}/runs/{trial.run_id}")


def history_of(trial: Trial) -> History:
    checkpoints = CheckpointStore(folder_of(trial).sub("checkpoints"))
    data = checkpoints.folder.read(f"{checkpoints.committed()[-1].name}/history.parquet")
    assert data is not None
    return History.from_parquet(data)


def test_a_failing_trial_fails_alone_and_says_why_and_the_best_model_is_registered(study: Callable[..., Any]) -> None:
    rates = [0.01, 1e30, 1e-5]
    done = tune(study({"optimizer.learning_rate": rates}, search={"kind": "grid"}), progress=False)

    told = [(trial.params, trial.reason) for trial in done.trials]
    assert [trial.status for trial in done.trials] == [TrialStatus.DONE, TrialStatus.FAILED, TrialStatus.DONE], told
    assert "the loss of step" in done.trials[1].reason
    assert "lower optimizer.learning_rate" in done.trials[1].reason
    assert [trial.number for trial in done.best] == [1]
    assert [rung.step for rung in done.trials[0].rungs] == [4, 8]

    version, _ = Registry.from_settings().open(done.model or "", kind="model")
    manifest = Registry.from_settings().store.manifest("model", version.digest)
    assert manifest.config["optimizer"]["learning_rate"] == 0.01
    assert manifest.parents
    assert done.pictures.parallel is not None
    assert tune(done.config, progress=False).model == done.model  # over is over


def test_a_killed_driver_repeats_no_finished_trial(study: Callable[..., Any], tmp_path: Path) -> None:
    config = study({"optimizer.learning_rate": {"low": 0.001, "high": 0.02, "log": True}}, 40, 4, trials=3)
    config = config.with_changes(search={"kind": "random"})
    file = tmp_path / "study.yaml"
    file.write_text(config.to_yaml())
    command = [sys.executable, "-c", "from modelyard.cli.main import main; main()", "tune", str(file)]
    with (tmp_path / "driver.log").open("wb") as log:
        driver = subprocess.Popen(command, stdout=log, stderr=log)
    folder = StudyFolder("counting")

    def second_is_on_its_way() -> bool:
        trials = folder.trials()
        return len(trials) > 1 and trials[0].is_over and bool(trials[1].rungs)

    deadline = time.monotonic() + 240
    while not second_is_on_its_way():
        assert driver.poll() is None, (tmp_path / "driver.log").read_text()[-3000:]
        assert time.monotonic() < deadline, folder.trials()
        time.sleep(0.1)
    driver.send_signal(signal.SIGKILL)
    driver.wait(20)
    first, second = folder.trials()[:2]
    model_written = folder_of(first).read("result.json")

    done = resume("counting", progress=False)

    assert [trial.status for trial in done.trials] == [TrialStatus.DONE] * 3
    assert done.trials[0] == first.with_changes(tracking_run_id=done.trials[0].tracking_run_id)
    assert folder_of(first).read("result.json") == model_written
    assert done.trials[1].trial_id == second.trial_id
    assert done.trials[1].params == second.params
    assert [rung.step for rung in done.trials[1].rungs] == list(range(4, 41, 4))


def test_pbt_goes_on_from_the_checkpoint_of_a_better_trial(study: Callable[..., Any]) -> None:
    space = {"optimizer.learning_rate": {"low": 1e-6, "high": 0.03, "log": True}}
    done = tune(study(space, 60, 4, trials=2, scheduler=PBT, search={"kind": "random"}, seed=3), progress=False)

    assert {trial.status for trial in done.trials} == {TrialStatus.DONE}
    exploited = [trial for trial in done.trials if trial.parent is not None]
    assert exploited
    weak = max(exploited, key=lambda trial: trial.parent_step)  # nothing was taken over after that
    (strong,) = [trial for trial in done.trials if trial.trial_id == weak.parent]
    assert weak.parent_step % 4 == 0
    losses, donors = (dict(history_of(trial).series("loss")) for trial in (weak, strong))
    assert sorted(losses) == list(range(1, 61))
    shared = range(1, weak.parent_step + 1)
    assert [losses[step] for step in shared] == [donors[step] for step in shared]
    rates, others = (dict(history_of(trial).series("learning_rate")) for trial in (weak, strong))
    after = weak.parent_step + 1
    assert (rates[after] != others[after]) == (weak.params != strong.params)


@pytest.fixture
def scheduler(ray_cluster: str, tmp_path: Path) -> Iterator[Any]:
    """The scheduler of the session's cluster."""
    from modelyard.scheduling import service

    yield service.start("priority", journal=f"sqlite:///{tmp_path / 'journal.db'}")
    service.stop()
    deadline = time.monotonic() + 60
    while service.connect() is not None:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_trials_of_one_and_two_workers_share_the_cluster_by_leases(study: Callable[..., Any], scheduler: Any) -> None:
    from modelyard.scheduling import service

    config = study({"workers": [1, 2]}, 6, 3, search={"kind": "grid"}).with_changes(parallel=2)
    config = config.with_changes(train={**config.train, "lease": {"tenant": "research"}})
    done = tune(config, progress=False)

    assert [(trial.status, trial.reason) for trial in done.trials] == [(TrialStatus.DONE, "")] * 2
    assert sorted(trial.params["workers"] for trial in done.trials) == [1, 2]
    entries = service.call(scheduler.look)[1]
    leases = {job: (str(entry.status), entry.request.tenant) for job, entry in entries.items()}
    assert leases == {trial.run_id: ("done", "research") for trial in done.trials}


def test_weak_trials_that_asha_stops_free_their_leases_for_the_next(study: Callable[..., Any], scheduler: Any) -> None:
    """A trial takes three of the cluster's four CPUs, so that each can only start when the one before has left."""
    from modelyard.scheduling import service

    rates = [0.01, 1e-6, 1e-7]
    space = {"optimizer.learning_rate": rates}
    config = study(space, 120, 20, search={"kind": "grid"}, scheduler={"kind": "asha", "reduction_factor": 2})
    config = config.with_changes(
        train={**config.train, "workers": {"min": 1, "max": 1, "cpus": 3}, "lease": {"tenant": "research"}}
    )
    done = tune(config, progress=False)

    assert [trial.status for trial in done.trials] == [TrialStatus.DONE, TrialStatus.STOPPED, TrialStatus.STOPPED]
    assert [trial.steps for trial in done.trials[1:]] == [20, 20]
    entries = service.call(scheduler.look)[1]
    assert {job: str(entry.status) for job, entry in entries.items()} == {trial.run_id: "done" for trial in done.trials}
    assert all(folder_of(trial).read("result.json") is None for trial in done.trials[1:])


def test_trials_below_the_median_of_the_others_are_stopped(study: Callable[..., Any]) -> None:
    rates = [0.02, 0.01, 1e-7, 0.015]
    settings = {"search": {"kind": "grid"}, "scheduler": {"kind": "median", "grace_steps": 8, "min_trials": 2}}
    done = tune(study({"optimizer.learning_rate": rates}, 40, 4, **settings), progress=False)

    assert done.trials[2].status is TrialStatus.STOPPED
    assert done.trials[2].steps == 8
    assert {done.trials[index].status for index in (0, 1)} == {TrialStatus.DONE}
    assert done.best[0].params["optimizer.learning_rate"] != 1e-7


def test_two_objectives_make_a_front_of_quality_against_size(study: Callable[..., Any]) -> None:
    objectives = [{"metric": "perplexity", "mode": "min"}, {"metric": "parameters", "mode": "min"}]
    space = {"task.model.layers": [1, 2], "optimizer.learning_rate": [0.01, 1e-6]}
    done = tune(study(space, 12, 4, trials=6, objectives=objectives, search={"kind": "tpe"}), progress=False)

    assert [trial.status for trial in done.trials] == [TrialStatus.DONE] * 6
    figures = [tuple(trial.value(objective) for objective in done.config.objectives) for trial in done.trials]
    front = {figure for figure in figures if not any(b[0] < figure[0] and b[1] <= figure[1] for b in figures)}
    assert {tuple(trial.value(objective) for objective in done.config.objectives) for trial in done.best} <= front
    smallest = min(parameters for _, parameters in figures)
    assert smallest in {trial.value(done.config.objectives[1]) for trial in done.best}
