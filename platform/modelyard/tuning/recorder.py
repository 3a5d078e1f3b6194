"""Ray Tune's events, written into the study's records and shown; runs in the driver."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ray
import ray.tune
from ray import cloudpickle

from modelyard.training.interrupts import original_error
from modelyard.tuning.space import Space
from modelyard.tuning.study import Rung, StudyFolder, Trial, TrialStatus

logger = logging.getLogger(__name__)

WRITE_EVERY_S = 2.0
"""Seconds between writes of a running trial's figures; its end is written at once."""
OnTrial = Callable[[Trial], None]


class Recorder:
    """The study's trials as they stand, in memory and in the store."""

    def __init__(self, folder: StudyFolder, space: Space, sinks: tuple[OnTrial, ...] = ()) -> None:
        self._folder, self._space, self._sinks = folder, space, sinks
        self._lock = threading.Lock()
        self._trials = {trial.trial_id: trial for trial in folder.trials()}
        self._written: dict[str, float] = {}

    def trials(self) -> list[Trial]:
        """All that have started, by number."""
        with self._lock:
            return sorted(self._trials.values(), key=lambda trial: trial.number)

    def knows(self, trial_id: str) -> bool:
        """Whether the trial has started."""
        return trial_id in self._trials

    def started(self, trial_id: str, raw: Mapping[str, Any]) -> None:
        """A trial runs, for the first time or again.

        One that is done stays so: after a kill, Tune may know less than the record, and only hears its results again.
        """
        params = self._space.decode(raw)
        known = self._trials.get(trial_id)
        if known is not None and known.status is TrialStatus.DONE and known.params == params:
            return
        if known is None:
            known = Trial(trial_id=trial_id, number=len(self._trials) + 1, params=params, started_s=time.time())
        self._set(known.with_changes(params=params, status=TrialStatus.RUNNING, reason="", ended_s=None))

    def reported(self, trial_id: str, raw: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """A trial was measured."""
        trial = self._trials[trial_id]
        changes: dict[str, Any] = {"params": self._space.decode(raw), "run_id": result["run_id"]}
        rungs = {rung.step: rung for rung in trial.rungs}
        if result.get("parent") and (result["parent"], result["parent_step"]) != (trial.parent, trial.parent_step):
            donor = self._trials[result["parent"]]
            changes |= {"parent": result["parent"], "parent_step": result["parent_step"]}
            rungs = {rung.step: rung for rung in donor.rungs if rung.step <= result["parent_step"]}
        rungs[result["step"]] = Rung(step=result["step"], metrics=result["figures"])
        changes["rungs"] = tuple(rungs[step] for step in sorted(rungs))
        if "model_digest" in result:
            changes["model_digest"] = result["model_digest"]
        now = time.monotonic()
        self._set(trial.with_changes(**changes), write=now - self._written.get(trial_id, 0.0) > WRITE_EVERY_S)

    def ended(self, trial_id: str, reason: str | None = None) -> None:
        """A trial is over: at its end, before it, or (with a reason) failed."""
        trial = self._trials[trial_id]
        if trial.status is TrialStatus.DONE and reason is None:
            return
        status = TrialStatus.DONE if trial.model_digest is not None else TrialStatus.STOPPED
        if reason is not None:
            status = TrialStatus.FAILED
        self._set(trial.with_changes(status=status, reason=reason or "", ended_s=time.time()))

    def lost(self, known: set[str]) -> None:
        """End the trials that ran when a driver was killed before Tune had noted them: Tune has started others."""
        for trial in self.trials():
            if not trial.is_over and trial.trial_id not in known:
                self._set(
                    trial.with_changes(
                        status=TrialStatus.STOPPED, reason="lost with its driver", ended_s=trial.started_s
                    )
                )

    def tracked(self, trial_id: str, tracking_run_id: str) -> None:
        """A trial has its MLflow run."""
        with self._lock:
            trial = self._trials[trial_id].with_changes(tracking_run_id=tracking_run_id)
            self._trials[trial_id] = trial
            self._folder.write_trial(trial)

    def _set(self, trial: Trial, *, write: bool = True) -> None:
        with self._lock:
            self._trials[trial.trial_id] = trial
            if write:
                self._folder.write_trial(trial)
                self._written[trial.trial_id] = time.monotonic()
        for sink in self._sinks:
            sink(trial)


_RECORDERS: dict[str, Recorder] = {}


class StudyCallback(ray.tune.Callback):  # type: ignore[misc]
    """Hands Tune's events to the recorder of this process. Tune pickles it with its state, so it holds a name."""

    def __init__(self, study: str) -> None:
        self._study = study

    @staticmethod
    def attach(study: str, recorder: Recorder) -> None:
        """From now on, events of `study` go to `recorder`."""
        _RECORDERS[study] = recorder

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """See `Recorder.started`."""
        self._recorder.started(trial.trial_id, trial.config)

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        """See `Recorder.reported`. A trial that goes no further frees its workers and its lease now."""
        self._recorder.reported(trial.trial_id, trial.config, result)
        actor = trial.temporary_state.ray_actor
        if result.get("done") and "model_digest" not in result and actor is not None:
            actor.leave.remote()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """See `Recorder.ended`."""
        if self._recorder.knows(trial.trial_id):  # else it was stopped before it started
            self._recorder.ended(trial.trial_id)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """See `Recorder.ended`."""
        if not self._recorder.knows(trial.trial_id):
            self._recorder.started(trial.trial_id, trial.config)
        self._recorder.ended(trial.trial_id, _reason(trial))

    def on_experiment_end(self, trials: list[Any], **_: Any) -> None:
        """See `Recorder.lost`."""
        self._recorder.lost({trial.trial_id for trial in trials})

    @property
    def _recorder(self) -> Recorder:
        return _RECORDERS[self._study]


def _reason(trial: Any) -> str:
    """Why a trial failed, without Ray's wrappers and its remote traceback."""
    path = Path(trial.pickled_error_file or "")  # written by this process just now
    if not path.is_file():
        return "no reason was given"
    cause = original_error(cloudpickle.loads(path.read_bytes()))
    text = str(cause).strip()
    if isinstance(cause, ray.exceptions.RayError):
        return f"{type(cause).__name__}: {text.splitlines()[-1]}"
    return text if hasattr(cause, "problem") else f"{type(cause).__name__}: {text}"
