"""What Ray Tune calls a trainable: it drives one trial after another and reports each validation.

It holds no resources itself: those belong to the trial's workers, with or without a lease.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

import ray.tune

from modelyard.artifacts import Store
from modelyard.errors import ConfigError, nearest
from modelyard.training.config import Checkpoints, TrainConfig
from modelyard.training.launch import Launch
from modelyard.training.monitor import Record
from modelyard.training.run_folder import RunFolder
from modelyard.training.worker import Trained
from modelyard.tuning.attempts import Attempt, GangAttempt, SoloAttempt, WarmWorker, is_solo
from modelyard.tuning.config import COSTS, StudyConfig
from modelyard.tuning.exploit import Pointer, seed
from modelyard.tuning.space import known_space
from modelyard.tuning.study import StudyFolder, Trial

POINTER = "pointer.json"
STUDY, ENVIRONMENT = "study", "environment"
"""Keys of a trial's Tune config beside its parameters."""
PBT_KEEP_CHECKPOINTS = 4


def trial_config(config: StudyConfig, params: dict[str, Any], run_id: str) -> TrainConfig:
    """The training config of one trial: the study's, these values, and the looks that the study needs.

    Raises:
        ConfigError: the values do not go together.
    """
    made = known_space(config.train, config.space).config(params, run=run_id)
    every = made.validation.every_steps
    if every == 0:
        every = made.training.max_steps
        made = made.with_changes(validation=made.validation.with_changes(every_steps=every))
    if config.scheduler.kind == "pbt":
        kept: Checkpoints = made.checkpoint.with_changes(
            every_steps=every, keep_last=max(PBT_KEEP_CHECKPOINTS, made.checkpoint.keep_last)
        )
        made = made.with_changes(checkpoint=kept)
    return made


class TrialRunner(ray.tune.Trainable):  # type: ignore[misc]
    """One trial at a time; Tune resets it for the next, so that its worker stays warm."""

    _pointer: Pointer | None
    """What Tune has restored this trial from."""
    _run_id: str
    _replayed: list[dict[str, Any]]
    """Results of an earlier life, still to be reported."""
    _measured: dict[str, float]
    """The newest figures."""
    _deciding: float | None
    """The task's own deciding metric there."""

    def setup(self, config: dict[str, Any]) -> None:
        """Read the study; nothing that can fail for one trial alone happens here."""
        os.environ.update(config[ENVIRONMENT])
        self._warm = WarmWorker()
        self._attempt: Attempt | None = None
        self._study = StudyFolder(config[STUDY])
        self._record = self._study.record()
        self._space = known_space(self._record.config.train, self._record.config.space)
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Leave the last trial, take the next."""
        self.leave()
        self._begin(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Train to the next validation."""
        try:
            if self._attempt is None:
                self._replayed = self._start()
            if self._replayed:
                return self._replayed.pop(0)
            return self._advance()
        except Exception:
            self.leave()
            raise

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """A pointer to the run's own checkpoint of the last reported step."""
        pointer = Pointer(
            trial_id=self.trial_id, run_id=self._run_id, step=self._step, params=self._params, metric=self._deciding
        )
        Path(checkpoint_dir, POINTER).write_text(pointer.model_dump_json())

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Go on from there: this trial's own run, or another's whose weights it takes over."""
        self._pointer = Pointer.model_validate_json(Path(checkpoint, POINTER).read_text())

    def leave(self) -> None:
        """The trial is over: free what it holds now. Called by the driver as soon as Tune has decided so."""
        attempt, self._attempt = self._attempt, None
        if attempt is not None:
            attempt.leave()

    def cleanup(self) -> None:
        """No further trial comes."""
        self.leave()
        self._warm.close()

    def _begin(self, config: dict[str, Any]) -> None:
        self._params = self._space.decode(config)
        self._pointer, self._run_id = None, ""
        self._replayed = []
        self._step, self._deciding = 0, None
        self._measured = {}

    def _start(self) -> list[dict[str, Any]]:
        """Start training; what the trial has reported in an earlier life of the study comes first."""
        runs_folder = RunFolder(f"{Store.from_settings().uri}/runs")
        base = f"{self._record.config.name}-{self.trial_id}"
        pointer = self._pointer
        is_own = pointer is None or (pointer.trial_id == self.trial_id and pointer.params == self._params)
        if pointer is None:
            self._run_id = base
        elif is_own:
            self._run_id = pointer.run_id
        else:
            self._run_id = f"{base}-{_key(pointer, self._params)}"
            seed(runs_folder, self._run_id, pointer)
        self._config = trial_config(self._record.config, self._params, self._run_id)
        launch = Launch(self._config, self._record.dataset)
        trained = launch.result()
        if trained is None:
            waits = self._record.config.scheduler.kind == "pbt"
            if is_solo(self._config):
                self._attempt = SoloAttempt(launch, self._config, self._warm, waits_for_checkpoint=waits)
            else:
                self._attempt = GangAttempt(launch, waits_for_checkpoint=waits)
        else:
            self._attempt = _Over(trained)
        self._step = pointer.step if pointer is not None else 0
        known = self._study.trial(self.trial_id) if is_own else None
        return self._replay(known) if known is not None else []

    def _replay(self, known: Trial) -> list[dict[str, Any]]:
        replayed = [self._result(rung.step, rung.metrics) for rung in known.rungs if rung.step > self._step]
        if replayed:
            self._step = int(replayed[-1]["step"])
            self._measured = dict(known.rungs[-1].metrics)
        return replayed

    def _advance(self) -> dict[str, Any]:
        """The next validation that was not reported before; the last one comes with the model."""
        assert self._attempt is not None
        while True:
            records, trained = self._attempt.advance()
            fresh = self._take(records)
            if trained is not None:
                return self._finished(trained)
            is_last = self._step >= self._config.training.max_steps
            if fresh and not is_last:
                return self._result(self._step, self._measured)

    def _take(self, records: list[Record]) -> bool:
        """Read figures out of a run's records; whether a new validation is among them."""
        fresh = False
        for record in records:
            if record["kind"] == "start":
                self._measured["parameters"] = float(record["parameters"])
            elif record["kind"] == "step":
                self._measured["train_loss"] = record["loss"]
                self._measured |= {name: record[name] for name in COSTS if name in record}
            elif record["kind"] == "validation" and record["step"] > self._step:
                prefix = f"{self._config.validation.split}_"
                figures = {k.removeprefix(prefix): float(v) for k, v in record.items() if k.startswith(prefix)}
                self._measured |= figures
                self._step, fresh = int(record["step"]), True
                self._deciding = figures.get(self._config.task.objective[0])
                self._check_objectives()
        return fresh

    def _check_objectives(self) -> None:
        for objective in self._record.config.objectives:
            if objective.metric not in self._measured:
                raise ConfigError(
                    f"objectives: a trial has no figure {objective.metric!r}; "
                    f"{nearest(objective.metric, self._measured)}",
                    "name one of the figures in the config of the study",
                )

    def _finished(self, trained: Trained) -> dict[str, Any]:
        split = self._config.validation.final_split
        final = {f"{split}/{name}": value for name, value in trained.final_metrics.items()}
        self._attempt, attempt = None, self._attempt
        if attempt is not None:
            attempt.leave()
        step = max(self._step, trained.steps)
        return {**self._result(step, {**self._measured, **final}), "model_digest": trained.model_digest, "done": True}

    def _result(self, step: int, metrics: dict[str, float]) -> dict[str, Any]:
        parent = self._pointer
        origin = (
            {}
            if parent is None or parent.run_id == self._run_id
            else {"parent": parent.trial_id, "parent_step": parent.step}
        )
        figures = {name: value for name, value in metrics.items() if math.isfinite(value)}
        return {"step": step, "figures": figures, **metrics, "run_id": self._run_id, **origin}


class _Over:
    """The training of a trial that had ended before."""

    def __init__(self, trained: Trained) -> None:
        self._trained = trained

    def advance(self) -> tuple[list[Record], Trained]:
        return [], self._trained

    def leave(self) -> None:
        """Nothing to free."""


def _key(pointer: Pointer, params: dict[str, Any]) -> str:
    told = json.dumps([pointer.run_id, pointer.step, params], sort_keys=True, default=str)
    return hashlib.sha256(told.encode()).hexdigest()[:6]
