"""A study's trials as rows of text. Pure."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from modelyard.tuning.config import Objective
from modelyard.tuning.study import Trial, TrialStatus, best


def columns(trials: Sequence[Trial], objectives: Sequence[Objective]) -> list[str]:
    """Heads: number, status, steps, the objectives, every parameter."""
    return ["trial", "status", "steps", *(each.metric for each in objectives), *map(short, _names(trials))]


def rows(trials: Sequence[Trial], objectives: Sequence[Objective]) -> list[list[str]]:
    """One row per trial; the best (or the Pareto front) are marked with `*`."""
    marked = {trial.trial_id for trial in best([t for t in trials if t.is_over], objectives)}
    names = _names(trials)
    return [
        [
            f"{trial.number}{'*' if trial.trial_id in marked else ''}",
            trial.status.value,
            str(trial.steps),
            *(figure(trial.value(each)) for each in objectives),
            *(shown(trial.params[name]) if name in trial.params else "-" for name in names),
        ]
        for trial in trials
    ]


def failures(trials: Sequence[Trial]) -> list[str]:
    """`trial 3: why`, for each that failed."""
    return [f"trial {trial.number}: {trial.reason}" for trial in trials if trial.status is TrialStatus.FAILED]


def short(name: str) -> str:
    """The last part of a dotted field, with the one before where that says more."""
    return ".".join(name.split(".")[-2:]) if name.endswith((".kind", ".min", ".max")) else name.split(".")[-1]


def figure(value: float | None) -> str:
    """A measured value in four digits."""
    return "-" if value is None or not math.isfinite(value) else f"{value:.4g}"


def shown(value: Any) -> str:
    """A parameter's value in little room."""
    if isinstance(value, float):
        return f"{value:.3g}"
    return value if isinstance(value, str) else json.dumps(value)


def line(trial: Trial, objectives: Sequence[Objective]) -> str:
    """`trial 3 done at step 300: accuracy 0.9813 (learning_rate 0.0041, hidden 64)`."""
    params = settings_of(trial)
    if trial.status is TrialStatus.FAILED:
        return f"trial {trial.number} failed: {trial.reason} ({params})"
    measured = ", ".join(f"{each.metric} {figure(trial.value(each))}" for each in objectives)
    return f"trial {trial.number} {trial.status.value} at step {trial.steps}: {measured} ({params})"


def settings_of(trial: Trial) -> str:
    """`learning_rate 0.0041, hidden 64`."""
    return ", ".join(f"{short(name)} {shown(value)}" for name, value in trial.params.items())


def _names(trials: Sequence[Trial]) -> list[str]:
    return list(dict.fromkeys(name for trial in trials for name in trial.params))
