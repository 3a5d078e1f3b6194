"""What a running job's own step times say of its speed elsewhere: the live service's source of `Speed`.

A run reports the seconds of its steps. Each configuration it has run in is one observation of the step-time model
of `performance.py` (Pollux's), fitted per accelerator. Its global batch is constant, so progress is counted in steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from modelyard.scheduling.model import Speed
from modelyard.scheduling.performance import GradientNoise, Observation, StepTime, fit

_NEWS = 0.1
"""Relative change of a configuration's step time that is worth a new fit."""
_WEIGHT = 0.3
"""Of the newest report in the running mean of a configuration."""


@dataclass(frozen=True)
class Report:
    """What a driver reports with its sign of life."""

    done: float
    """Steps finished."""
    step_s: float | None = None
    """Seconds of a recent step."""
    sync_s: float = 0.0
    """The part of it that waited for other workers."""
    global_batch: int = 1
    """Samples of a step over all workers."""
    noise: GradientNoise | None = None
    """Of the gradient at that batch, when the training code measures it."""


@dataclass(frozen=True)
class MeasuredSpeed:
    """Steps per second by the fitted models. An accelerator never tried is taken to be as fast as the slowest tried."""

    models: Mapping[str, StepTime]
    global_batch: int

    def goodput(self, accelerator: str, workers: int, nodes: int) -> float:
        """Steps per second; 0 for more workers than a batch has samples."""
        if not 1 <= workers <= self.global_batch:
            return 0.0
        models = [self.models[accelerator]] if accelerator in self.models else list(self.models.values())
        return min(1.0 / float(model.step(nodes, workers, self.global_batch / workers)) for model in models)


@dataclass
class Gauge:
    """Collects one job's reports; `speed` is None until the first with a step time."""

    speed: Speed | None = None
    noise: GradientNoise | None = None
    _steps: dict[tuple[str, int, int], Observation] = field(default_factory=dict)
    _fitted: dict[tuple[str, int, int], float] = field(default_factory=dict)

    def take(self, accelerator: str, workers: int, nodes: int, report: Report) -> Observation | None:
        """Take in a report made on `workers` workers of one accelerator; what it says, if that is news."""
        self.noise = report.noise or self.noise
        if report.step_s is None or report.step_s <= 0:
            return None
        where = (accelerator, workers, nodes)
        step_s, before = report.step_s, self._steps.get(where)
        if before is not None:
            step_s = (1 - _WEIGHT) * before.step_s + _WEIGHT * step_s
        share = max(report.global_batch // workers, 1)
        sync_s = min(max(report.sync_s, 0.0), 0.99 * step_s) if workers > 1 else 0.0
        self._steps[where] = Observation(nodes, workers, share, step_s, sync_s)
        known = self._fitted.get(where)
        if known is not None and abs(step_s - known) <= _NEWS * known:
            return None
        self._fit(report.global_batch)
        return self._steps[where]

    def restore(self, accelerator: str, observation: Observation, global_batch: int) -> None:
        """Take in what `take` returned to an earlier scheduler."""
        self._steps[accelerator, observation.workers, observation.nodes] = observation
        self._fit(global_batch)

    def _fit(self, global_batch: int) -> None:
        self._fitted = {key: each.step_s for key, each in self._steps.items()}
        kinds = {key[0] for key in self._steps}
        models = {k: fit([each for key, each in sorted(self._steps.items()) if key[0] == k]) for k in sorted(kinds)}
        self.speed = MeasuredSpeed(models, global_batch)
