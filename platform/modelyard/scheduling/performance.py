"""How fast a job is where it has not run yet, learned from where it has.

Goodput (Pollux, OSDI'21) is throughput times statistical efficiency. Throughput comes from a model of the step time,
one per accelerator, fitted to the steps the job has really made (Sia, SOSP'23, section 3.2). Efficiency comes from the
gradient noise scale (McCandlish et al. 2018). From both follow the batch size and the worth of more workers. What has
not been measured is taken to be free of cost: the model is optimistic, so scaling up gets tried.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, minimize

from modelyard.errors import ConfigError

Numbers = NDArray[np.float64]
_TINY = 1e-8
_BATCHES = 50
"""Batch sizes that are tried, spaced geometrically."""
_MOST_ITERATIONS = 100
_SURPRISE = 0.01
"""Relative error of a prediction above which the model is fitted again."""


@dataclass(frozen=True)
class Observation:
    """Steps a job has made in one configuration."""

    nodes: int
    workers: int
    batch_per_worker: int
    step_s: float
    """Of one step with synchronization."""
    sync_s: float
    """The part of it that waits for the network."""

    def __post_init__(self) -> None:
        if not (1 <= self.nodes <= self.workers and self.batch_per_worker >= 1 and 0 <= self.sync_s < self.step_s):
            raise ConfigError(f"{self} is no step of a job", "1 <= nodes <= workers and 0 <= sync_s < step_s must hold")


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step: `(compute**overlap + network**overlap) ** (1 / overlap)` (Pollux, OSDI'21, section 3.2)."""

    compute_s: float
    compute_s_per_sample: float
    nodes_s: float
    """Network time across nodes with two workers, and what each further worker adds."""
    nodes_s_per_worker: float
    links_s: float
    """The same within a node."""
    links_s_per_worker: float
    overlap: float
    """1: network after compute; 10: nearly hidden by it."""

    def compute(self, batch_per_worker: Numbers | float) -> Numbers:
        """Seconds of forward and backward."""
        return np.asarray(self.compute_s + self.compute_s_per_sample * np.asarray(batch_per_worker, dtype=float))

    def network(self, nodes: int, workers: int) -> float:
        """Seconds of synchronization if nothing hid it."""
        if workers < 2:
            return _TINY
        alone, more = (self.nodes_s, self.nodes_s_per_worker) if nodes > 1 else (self.links_s, self.links_s_per_worker)
        return max(alone + more * (workers - 2), _TINY)

    def step(self, nodes: int, workers: int, batch_per_worker: Numbers | float) -> Numbers:
        """Seconds of a step with synchronization."""
        compute, network = self.compute(batch_per_worker), self.network(nodes, workers)
        high, low = np.maximum(compute, network), np.minimum(compute, network)
        return np.asarray(high * (1 + (low / high) ** self.overlap) ** (1 / self.overlap))


def fit(observations: Sequence[Observation]) -> StepTime:
    """The model that explains the observations: least log error of compute and of step time, lightly regularized.

    Parameters without evidence stay at their lower bound: what was never measured costs nothing (Sia's prior). Before
    a job has crossed nodes, that is taken to cost a tenth more than crossing links.
    """
    if not observations:
        raise ConfigError("a throughput model needs at least one observation", "run the job somewhere first")
    data = _Data.of(observations)
    start, lower, upper = _bounds(data)
    found = minimize(  # over logarithms: the parameters differ by orders of magnitude
        _log_loss,
        np.log(start),
        args=(data,),
        jac=True,
        method="L-BFGS-B",
        bounds=Bounds(np.log(lower), np.log(upper)),
        options={"ftol": 1e-6, "maxiter": _MOST_ITERATIONS},
    )
    best = np.clip(np.exp(found.x), lower, upper)
    if not data.across.any():
        best[2] = max(best[2], 1.1 * best[4])
        best[3] = max(best[3], 1.1 * best[5])
    return StepTime(*(float(value) for value in best))


@dataclass(frozen=True)
class _Data:
    workers: Numbers
    batch: Numbers
    log_compute: Numbers
    log_step: Numbers
    across: NDArray[np.bool_]
    within: NDArray[np.bool_]

    @classmethod
    def of(cls, observations: Sequence[Observation]) -> _Data:
        nodes = np.array([o.nodes for o in observations])
        workers = np.array([o.workers for o in observations], dtype=float)
        step = np.array([o.step_s for o in observations])
        sync = np.array([o.sync_s for o in observations])
        return cls(
            workers=workers,
            batch=np.array([o.batch_per_worker for o in observations], dtype=float),
            log_compute=np.log(step - sync),
            log_step=np.log(step),
            across=nodes > 1,
            within=(nodes == 1) & (workers > 1),
        )


def _bounds(data: _Data) -> tuple[Numbers, Numbers, Numbers]:
    compute, spare = np.exp(data.log_compute), np.maximum(np.exp(data.log_step) - np.exp(data.log_compute), 1e-4)
    network = float(spare.mean())
    slope = float((compute / data.batch).mean()) / 2
    start = np.array([float(compute.min()) / 2, slope, network, network / 10, network, network / 10, 1.2])
    lower = np.array([_TINY] * 6 + [1.0])
    upper = np.array([1e6] * 6 + [10.0])
    pinned: list[tuple[int, float]] = []
    if len(np.unique(data.batch)) == 1:  # half of it fixed cost, half per sample
        pinned.append((0, float(np.exp(data.log_compute).mean()) / 2))
    if not data.across.any():
        pinned += [(2, _TINY), (3, _TINY)]
    if not data.within.any():
        pinned += [(4, _TINY), (5, _TINY)]
    if not (data.workers > 2).any():
        pinned += [(3, _TINY), (5, _TINY)]
    for index, value in pinned:
        start[index] = lower[index] = upper[index] = value
    return start, lower, upper


def _log_loss(logs: Numbers, data: _Data) -> tuple[float, Numbers]:
    params = np.exp(logs)
    value, gradient = _loss(params, data)
    return value, gradient * params


def _loss(params: Numbers, data: _Data) -> tuple[float, Numbers]:
    """Log error of compute and step time with its gradient."""
    fixed, slope, nodes, nodes_more, links, links_more, power = params
    more = np.maximum(data.workers - 2, _TINY)
    compute = fixed + slope * data.batch
    network = np.full_like(compute, 2 * _TINY)
    network = np.where(data.within, links + links_more * more, network)
    network = np.where(data.across, nodes + nodes_more * more, network)
    log_c, log_n = np.log(compute), np.log(network)
    both = np.logaddexp(power * log_c, power * log_n)
    share = np.exp(power * log_c - both)
    miss_c, miss_s = log_c - data.log_compute, both / power - data.log_step
    err_c, err_s = np.sqrt((miss_c**2).mean() + 1e-12), np.sqrt((miss_s**2).mean() + 1e-12)
    count = len(compute)
    by_step = miss_s / (count * err_s)
    by_compute = miss_c / (count * err_c) / compute + by_step * share / compute
    by_network = by_step * (1 - share) / network
    by_power = by_step * ((share * log_c + (1 - share) * log_n) / power - both / power**2)
    ratio_n, ratio_l = nodes_more / nodes, links_more / links
    gradient = np.array(
        [
            by_compute.sum(),
            (by_compute * data.batch).sum(),
            by_network[data.across].sum() - 2e-2 * ratio_n**2 / nodes,
            (by_network * more)[data.across].sum() + 2e-2 * ratio_n / nodes,
            by_network[data.within].sum() - 2e-2 * ratio_l**2 / links,
            (by_network * more)[data.within].sum() + 2e-2 * ratio_l / links,
            by_power.sum() + 2e-3 * (power - 1),
        ]
    )
    return float(err_c + err_s + 1e-3 * (power - 1) ** 2 + 1e-2 * (ratio_n**2 + ratio_l**2)), gradient


@dataclass(frozen=True)
class GradientNoise:
    """Statistics of the gradient at the base batch size: squared norm of its mean, and its variance."""

    sqr: float
    var: float

    def gain(self, scale: Numbers | float) -> Numbers:
        """Progress of one step with `scale` times the base batch, in steps of the base batch (AdaScale, ICML'20)."""
        scale = np.asarray(scale, dtype=float)
        below = self.var / scale + self.sqr
        return np.where(below > 0, (self.var + self.sqr) / np.maximum(below, 1e-300), 1.0)


@dataclass(frozen=True, kw_only=True)
class BatchLimits:
    """Batch sizes a job may use."""

    base: int
    """The total batch its hyperparameters were made for; progress is counted in its steps."""
    most: int
    least_per_worker: int
    most_per_worker: int

    def __post_init__(self) -> None:
        if not (1 <= self.base <= self.most and 1 <= self.least_per_worker <= self.most_per_worker):
            raise ConfigError(f"{self} is empty", "1 <= base <= most and least_per_worker <= most_per_worker must hold")


@dataclass(frozen=True)
class BatchChoice:
    """A batch size and what it is expected to give."""

    goodput: float
    """Steps of the base batch per second."""
    per_worker: int
    """Of one forward and backward."""
    accumulation: int
    """Further forwards and backwards before the workers synchronize."""

    def total(self, workers: int) -> int:
        """Samples of one optimizer step."""
        return workers * self.per_worker * (self.accumulation + 1)


NO_BATCH = BatchChoice(0.0, 0, 0)


def best_batch(model: StepTime, noise: GradientNoise, limits: BatchLimits, workers: int, nodes: int) -> BatchChoice:
    """The batch size of most goodput, of 50 between the smallest and the largest allowed (Pollux, section 3)."""
    tried = _batches(limits, workers)
    if tried is None:
        return NO_BATCH
    per_worker, accumulation, scale = tried
    seconds = accumulation * model.compute(per_worker) + model.step(nodes, workers, per_worker)
    goodput = noise.gain(scale) / seconds
    best = int(np.argmax(goodput))
    return BatchChoice(float(goodput[best]), int(per_worker[best]), int(accumulation[best]))


@functools.lru_cache(maxsize=4096)
def _batches(limits: BatchLimits, workers: int) -> tuple[Numbers, Numbers, Numbers] | None:
    """Batch of a worker, accumulation, and total over the base batch of what is tried; None when nothing is allowed."""
    least = max(limits.base, limits.least_per_worker * workers)
    if least > limits.most:
        return None
    each = np.geomspace(least, limits.most, _BATCHES) / workers
    accumulation = np.ceil(each / limits.most_per_worker - 1e-8) - 1
    if workers == 1:  # one batch alone shows no variance, so a larger one is split in two
        accumulation = np.where(each > limits.base + 1e-8, np.maximum(accumulation, 1), accumulation)
    per_worker = np.ceil(each / (accumulation + 1) - 1e-8)
    allowed = (per_worker >= limits.least_per_worker) & (per_worker <= limits.most_per_worker)
    if not allowed.any():
        return None
    per_worker, accumulation = per_worker[allowed], accumulation[allowed]
    return per_worker, accumulation, workers * per_worker * (accumulation + 1) / limits.base


@dataclass(frozen=True)
class LearnedSpeed:
    """What a job's measurements say of its speed; a `Speed`. Immutable: new measurements make a new one."""

    limits: Mapping[str, BatchLimits]
    """Per accelerator."""
    single: Mapping[str, float]
    """Samples per second of one worker per accelerator: only their ratios are used once something was measured."""
    models: Mapping[str, StepTime] = field(default_factory=dict)
    noise: GradientNoise | None = None
    most_workers: int = 1
    """Not tried beyond this: a multiple of what was measured."""
    _known: dict[tuple[str, int, int], float] = field(default_factory=dict, repr=False, compare=False)

    def goodput(self, accelerator: str, workers: int, nodes: int) -> float:
        """Steps of the base batch per second; 0 where it may not or cannot run."""
        key = (accelerator, workers, nodes)
        if key not in self._known:
            self._known[key] = self._goodput(*key)
        return self._known[key]

    def batch(self, accelerator: str, workers: int, nodes: int) -> BatchChoice | None:
        """The batch size to use there; None while nothing was measured on this accelerator."""
        if self.noise is None or accelerator not in self.models:
            return None
        return best_batch(self.models[accelerator], self.noise, self.limits[accelerator], workers, nodes)

    def _goodput(self, accelerator: str, workers: int, nodes: int) -> float:
        limits = self.limits.get(accelerator)
        if limits is None or not 1 <= workers <= self.most_workers:
            return 0.0
        if limits.least_per_worker * workers > limits.most:
            return 0.0
        if self.noise is None or not self.models:
            return workers * self.single.get(accelerator, 0.0) / limits.base
        if accelerator in self.models:
            return best_batch(self.models[accelerator], self.noise, limits, workers, nodes).goodput
        known = min(self.models)
        there = best_batch(self.models[known], self.noise, self.limits[known], workers, nodes).goodput
        return there * self.single.get(accelerator, 0.0) / self.single[known]


class Learner:
    """Collects what a job measures and keeps its `LearnedSpeed` up to date. One per job."""

    def __init__(
        self,
        limits: Mapping[str, BatchLimits],
        single: Mapping[str, float],
        *,
        scale_up: float = 4.0,
        most_workers: int = 64,
    ) -> None:
        """Nothing is measured yet.

        Args:
            single: samples per second of one worker per accelerator, profiled or taken from a planner.
            scale_up: how many times the largest number of workers measured is tried next. Sia and Pollux double. Each
                step costs a restart, so that a job of minutes spends much of its life on the way up; a step of four
                halves their number, and the model is wrong by little more.
        """
        if missing := set(limits) - set(single):
            raise ConfigError(
                f"no speed of one worker on {', '.join(sorted(missing))}", "profile it or give an estimate"
            )
        self._limits, self._single = limits, single
        self._scale_up, self._most = scale_up, most_workers
        self._seen: dict[str, dict[tuple[int, int, int], Observation]] = {}
        self._models: dict[str, StepTime] = {}
        self._stale: set[str] = set()
        self._noise: GradientNoise | None = None
        self._speed: LearnedSpeed | None = None

    def observe(self, accelerator: str, observation: Observation, noise: GradientNoise) -> None:
        """Takes in a measurement; one that says what the model already predicts does not cause another fit."""
        if noise != self._noise:
            self._noise, self._speed = noise, None
        seen = self._seen.setdefault(accelerator, {})
        key = (observation.nodes, observation.workers, observation.batch_per_worker)
        if key in seen:
            return
        seen[key] = observation
        self._speed = None
        if accelerator not in self._models or self._is_surprising(self._models[accelerator], observation):
            self._stale.add(accelerator)

    @property
    def speed(self) -> LearnedSpeed:
        """What is known now."""
        for accelerator in sorted(self._stale):
            self._models[accelerator] = _fit(tuple(self._seen[accelerator].values()))
        self._stale.clear()
        if self._speed is None:
            largest = max((key[1] for seen in self._seen.values() for key in seen), default=0)
            most = min(max(int(self._scale_up * largest), 1), self._most)
            self._speed = LearnedSpeed(self._limits, self._single, dict(self._models), self._noise, most)
        return self._speed

    @staticmethod
    def _is_surprising(model: StepTime, observation: Observation) -> bool:
        step = float(model.step(observation.nodes, observation.workers, observation.batch_per_worker))
        compute = float(model.compute(observation.batch_per_worker))
        real = observation.step_s - observation.sync_s
        return abs(step / observation.step_s - 1) > _SURPRISE or abs(compute / real - 1) > _SURPRISE


@functools.lru_cache(maxsize=65536)
def _fit(observations: tuple[Observation, ...]) -> StepTime:
    return fit(observations)
