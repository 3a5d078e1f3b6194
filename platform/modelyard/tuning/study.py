"""What is known of a study: its config, and one record per trial, in the store. No Ray.

<store>/studies/<name>/
    study.json           the whole config, and which dataset it is about; written before the first trial
    trials/<id>.json     one record per trial, written by the driver at every change
    outcome.json         the best trial and its registered model
    tune/                Ray Tune's own state
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from enum import StrEnum
from typing import Any

from pydantic import ValidationError

from modelyard.artifacts import Store
from modelyard.config import Config
from modelyard.errors import IntegrityError, NotFoundError, nearest
from modelyard.training.run_folder import RunFolder
from modelyard.tuning.config import Objective, StudyConfig

STUDY, OUTCOME = "study.json", "outcome.json"


class TrialStatus(StrEnum):
    """How far a trial is."""

    RUNNING = "running"
    DONE = "done"
    """Trained to its end; it left a model."""
    STOPPED = "stopped"
    """Ended early by the scheduler or the time budget."""
    FAILED = "failed"


class Rung(Config):
    """What a trial measured after so many steps."""

    step: int
    metrics: dict[str, float]


class Trial(Config):
    """One trial: what was tried, and what came of it."""

    trial_id: str
    number: int
    """In the order of starting, from 1."""
    params: dict[str, Any]
    status: TrialStatus = TrialStatus.RUNNING
    reason: str = ""
    """Why it failed."""
    rungs: tuple[Rung, ...] = ()
    run_id: str = ""
    model_digest: str | None = None
    parent: str | None = None
    """PBT: the trial whose checkpoint it went on from last; the rungs before that are the other trial's."""
    parent_step: int = 0
    """PBT: the step of that checkpoint."""
    started_s: float = 0.0
    """Unix time."""
    ended_s: float | None = None
    tracking_run_id: str | None = None

    @property
    def steps(self) -> int:
        """Optimizer steps at the last measurement."""
        return self.rungs[-1].step if self.rungs else 0

    @property
    def is_over(self) -> bool:
        """Whether nothing more comes."""
        return self.status is not TrialStatus.RUNNING

    def value(self, objective: Objective) -> float | None:
        """The trial's figure: that of the model it made (the best validation), or the best so far.

        Costs (`elapsed_s`, `parameters`) are those at the end.
        """
        own = [rung.metrics for rung in self.rungs if rung.step >= self.parent_step]
        values = [metrics[objective.metric] for metrics in own if objective.metric in metrics]
        finite = [value for value in values if math.isfinite(value)]
        if not finite:
            return None
        if objective.metric in COSTS:
            return finite[-1]
        return max(finite) if objective.mode == "max" else min(finite)


COSTS = ("elapsed_s", "rows_per_s", "tokens_per_s", "parameters")
"""Figures that say what a trial costs, not how good its model is."""


class StudyRecord(Config):
    """What a study is."""

    format_version: int = 1
    config: StudyConfig
    dataset: tuple[str, str] | None
    """Reference and digest; None when the trials differ in their dataset."""
    started_s: float


class Outcome(Config):
    """How a study ended."""

    best: tuple[str, ...]
    """Ids of the best trial, or of the Pareto front."""
    model: str | None = None
    """Reference of the registered model."""
    ended_s: float
    elapsed_s: float
    """Seconds of all attempts."""


class StudyFolder:
    """The records of one study in the store."""

    def __init__(self, name: str, store: Store | None = None) -> None:
        self.name = name
        self._root = RunFolder(f"{(store or Store.from_settings()).uri}/studies")
        self.folder = self._root.sub(name)

    @property
    def uri(self) -> str:
        """Where they are."""
        return self.folder.uri

    def record(self) -> StudyRecord:
        """What the study is.

        Raises:
            NotFoundError: there is no such study; the nearest one is named.
            IntegrityError: its record is damaged.
        """
        data = self.folder.read(STUDY)
        if data is None:
            raise NotFoundError(
                f"there is no study {self.name!r}", f"{nearest(self.name, self._names())} (studies in {self._root.uri})"
            )
        with _damage_told(f"{self.uri}/{STUDY}"):
            return StudyRecord.model_validate_json(data)

    def exists(self) -> bool:
        """Whether the study was begun."""
        return self.folder.read(STUDY) is not None

    def write_record(self, record: StudyRecord) -> None:
        """Begin the study."""
        self.folder.write(STUDY, record.model_dump_json(indent=1).encode())

    def trials(self) -> list[Trial]:
        """All trials that have started, by number."""
        names = self.folder.sub("trials").files()
        found = [self.trial(name.removesuffix(".json")) for name in names if name.endswith(".json")]
        return sorted((trial for trial in found if trial is not None), key=lambda trial: trial.number)

    def trial(self, trial_id: str) -> Trial | None:
        """One trial; None when it has not started."""
        name = f"trials/{trial_id}.json"
        data = self.folder.read(name)
        if data is None:
            return None
        with _damage_told(f"{self.uri}/{name}"):
            return Trial.model_validate_json(data)

    def write_trial(self, trial: Trial) -> None:
        """Note a trial as it is now."""
        self.folder.write(f"trials/{trial.trial_id}.json", trial.model_dump_json().encode())

    def outcome(self) -> Outcome | None:
        """How the study ended; None while it has not."""
        data = self.folder.read(OUTCOME)
        with _damage_told(f"{self.uri}/{OUTCOME}"):
            return None if data is None else Outcome.model_validate_json(data)

    def write_outcome(self, outcome: Outcome) -> None:
        """End the study."""
        self.folder.write(OUTCOME, outcome.model_dump_json(indent=1).encode())

    def _names(self) -> list[str]:
        return [name for name in self._root.folders() if self._root.read(f"{name}/{STUDY}") is not None]


def best(trials: Sequence[Trial], objectives: Sequence[Objective]) -> list[Trial]:
    """The best trial, or the Pareto front of several objectives, among those that left a model.

    Where none did, among all. Trials without a figure never count. Best by the first objective first.
    """
    finished = [trial for trial in trials if trial.status is TrialStatus.DONE]
    pool = [trial for trial in finished or trials if None not in _values(trial, objectives)]
    front = [trial for trial in pool if not any(_dominates(other, trial, objectives) for other in pool)]
    ordered = sorted(front, key=lambda trial: (_signed(trial, objectives)[0], trial.number))
    return ordered if len(objectives) > 1 else ordered[:1]


def spent_steps(trials: Sequence[Trial]) -> int:
    """Optimizer steps of all trials together, up to their last measurements."""
    return sum(trial.steps for trial in trials)


def _values(trial: Trial, objectives: Sequence[Objective]) -> list[float | None]:
    return [trial.value(objective) for objective in objectives]


def _signed(trial: Trial, objectives: Sequence[Objective]) -> list[float]:
    """Values, lower better."""
    return [
        (value if value is not None else math.inf) * (1 if objective.mode == "min" else -1)
        for objective, value in zip(objectives, _values(trial, objectives), strict=True)
    ]


def _dominates(one: Trial, other: Trial, objectives: Sequence[Objective]) -> bool:
    ours, theirs = _signed(one, objectives), _signed(other, objectives)
    return ours != theirs and all(mine <= his for mine, his in zip(ours, theirs, strict=True))


@contextlib.contextmanager
def _damage_told(path: str) -> Iterator[None]:
    try:
        yield
    except (ValidationError, json.JSONDecodeError) as error:
        raise IntegrityError(f"{path} is damaged: {error}") from error
