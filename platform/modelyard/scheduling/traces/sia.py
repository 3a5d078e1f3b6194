"""Sia's workloads and its measured models (SOSP'23, siasosp23/artifacts): elastic jobs that may change their batch.

The truth is interpolated from measured step times and gradient statistics, by the rules of Sia's simulator. A policy
sees what Sia's does: ratios of 1-GPU throughput, a throughput model fitted to the points the job has really run, the
gradient statistics of now. It does not see how much work a job has left (`work` is None), nor the tables.

A job begins on one GPU. Sia's policy then at most doubles what was measured: a rule it is given with each job, of which
the simulated jobs and that simulator's other policies know nothing. Here it grows by the `scale_up` of
`performance.Learner`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import LinearNDInterpolator, NearestNDInterpolator

from modelyard.errors import DataError, NotFoundError
from modelyard.scheduling.model import Request
from modelyard.scheduling.performance import BatchLimits, GradientNoise, LearnedSpeed, Learner, Observation
from modelyard.scheduling.traces.base import Row, Run, Trace, TraceJob, cluster_of, in_order, read_table

HETEROGENEOUS = {"aws": (6, 4), "rtx": (3, 8), "dgx-ext": (2, 8)}
"""Sia's default cluster: 24 T4, 24 RTX 2080Ti, 16 A100."""
MAX_EPOCHS = {"cifar10": 100, "bert": 2, "ncf": 10, "imagenet": 90, "deepspeech2": 80, "yolov3": 50}
RESTART_S = {"cifar10": 50.0, "deepspeech2": 25.0, "bert": 120.0, "yolov3": 80.0, "imagenet": 250.0, "ncf": 15.0}
SLOWDOWN = {"cifar10": 1.8, "ncf": 1.5}
"""By how much a real run is slower than its profile; 1.2 for those not named."""
_MOST_PER_GPU = {("deepspeech2", "rtx"): 57}

Numbers = NDArray[np.float64]


class Profile:
    """Measured step times of one model on one GPU type."""

    def __init__(self, folder: Path, gpu: str) -> None:
        placements = list(read_table(folder / f"placements-{gpu}.csv", ("placement", *_TIMES)))
        scaling = list(read_table(folder / f"scalability-{gpu}.csv", ("num_nodes", "num_replicas", *_TIMES)))
        self.exact: dict[tuple[int, ...], Numbers] = {}
        """Placement to rows of local batch, step and sync seconds, by batch."""
        grouped: dict[tuple[int, ...], list[list[float]]] = {}
        for row in placements:
            grouped.setdefault(_placement(row), []).append(_times(row))
        self.exact = {key: np.array(sorted(rows)) for key, rows in grouped.items()}
        self.points = _points(self.exact, scaling)
        self.least = int(min(rows[:, 0].min() for rows in self.exact.values()))
        most = int(max(rows[:, 0].max() for rows in self.exact.values()))
        self.most = _MOST_PER_GPU.get((folder.name, gpu), most)
        self.scaling = np.array([row[:3] for row in self.points[1]])
        alone = self.exact.get((1,))
        if alone is None:
            raise DataError(f"{folder / f'placements-{gpu}.csv'}: field 'placement' is never 1", "profile one GPU")
        self.single = float(alone[:, 0].max() / alone[:, 1].max())

    @functools.cached_property
    def _surface(self) -> tuple[LinearNDInterpolator, NearestNDInterpolator]:
        table = np.array([*self.points[0], *self.points[1]])
        return (
            LinearNDInterpolator(table[:, :3], table[:, 3:]),
            NearestNDInterpolator(table[:, :3], table[:, 3:], rescale=True),
        )

    def most_local(self, counts: tuple[int, ...]) -> int:
        """Largest local batch that was measured for a placement, or one at least as large."""
        if counts in self.exact:
            return int(self.exact[counts][:, 0].max())
        enough = (self.scaling[:, 0] >= len(counts)) & (self.scaling[:, 1] >= sum(counts))
        return int(self.scaling[enough, 2].max()) if enough.any() else self.most

    @functools.lru_cache(maxsize=65536)  # noqa: B019 - one profile per file, kept for the whole program anyway
    def times(self, counts: tuple[int, ...], local: int) -> tuple[float, float]:
        """Step and sync seconds."""
        rows = self.exact.get(counts)
        if rows is not None:
            return float(np.interp(local, rows[:, 0], rows[:, 1])), float(np.interp(local, rows[:, 0], rows[:, 2]))
        at = [min(len(counts), 16), sum(counts), local]
        found = self._surface[0]([at])[0]
        if np.isnan(found).any():  # outside what was measured; Sia's simulator stops here
            found = self._surface[1]([at])[0]
        return float(found[0]), float(found[1])


_TIMES = ("local_bsz", "step_time", "sync_time")


def _times(row: Row) -> list[float]:
    return [row.number("local_bsz", least=1), row.number("step_time", least=0), row.number("sync_time", least=0)]


def _placement(row: Row) -> tuple[int, ...]:
    digits = row.text("placement")
    if not digits.isdigit() or "0" in digits:
        raise row.error("placement", f"is {digits!r}, not one digit of GPUs per node")
    return rotated([int(digit) for digit in digits])


def rotated(counts: Sequence[int]) -> tuple[int, ...]:
    """The smallest rotation: how placements are stored."""
    return min(tuple(counts[at:]) + tuple(counts[:at]) for at in range(len(counts)))


def _points(
    exact: Mapping[tuple[int, ...], Numbers], scaling: Sequence[Row]
) -> tuple[list[list[float]], list[list[float]]]:
    """(nodes, GPUs, local batch, step, sync): means over placements alike, and the scaling profile."""
    alike: dict[tuple[float, ...], list[Numbers]] = {}
    for counts, rows in exact.items():
        for local, *times in rows:
            alike.setdefault((len(counts), sum(counts), float(local)), []).append(np.array(times))
    means = [[*key, *np.mean(values, axis=0)] for key, values in sorted(alike.items())]
    profile = [[row.number("num_nodes", least=1), row.number("num_replicas", least=1), *_times(row)] for row in scaling]
    return means, profile


class Model:
    """One application: its profiles, its gradient statistics by epoch and batch size, its work."""

    def __init__(self, folder: Path, gpus: Sequence[str]) -> None:
        if not folder.is_dir():
            raise NotFoundError(f"there is no model {folder}", "give the folder that holds traces/<application>")
        self.name = folder.name
        self.profiles = {gpu: Profile(folder, gpu) for gpu in gpus}
        found: dict[int, dict[str, Numbers]] = {}
        for path in folder.glob("validation-*.csv"):
            rows = list(read_table(path, ("progress", "grad_sqr", "grad_var")))
            found[int(path.stem.split("-")[1])] = {
                name: np.array([row.number(name) for row in rows]) for name in ("progress", "grad_sqr", "grad_var")
            }
        if not found:
            raise DataError(f"{folder}: holds no validation-<batch>.csv", "give the folder of one application")
        self.batches = sorted(found)
        self.statistics = found
        self.epochs = MAX_EPOCHS.get(self.name, min(len(table["progress"]) for table in found.values()))
        self.progress = np.min([table["progress"][: self.epochs] for table in found.values()], axis=0)
        """Progress at the end of each epoch."""
        self.limits = {
            gpu: BatchLimits(
                base=self.batches[0],
                most=self.batches[-1],
                least_per_worker=profile.least,
                most_per_worker=profile.most,
            )
            for gpu, profile in self.profiles.items()
        }
        self.single = {gpu: profile.single for gpu, profile in self.profiles.items()}
        self.restart_s = RESTART_S.get(self.name, 30.0)
        self.slowdown = SLOWDOWN.get(self.name, 1.2)

    def noise(self, batch: int, epoch: int) -> GradientNoise:
        """Gradient statistics with a batch size in an epoch, between the measured ones."""
        at = min(max(batch, self.batches[0]), self.batches[-1])
        sqr, var = (
            float(np.interp(at, self.batches, [self.statistics[size][name][epoch] for size in self.batches]))
            for name in ("grad_sqr", "grad_var")
        )
        return GradientNoise(sqr, var)


@dataclass(frozen=True)
class ElasticRun:
    """Recipe of a job of one model."""

    model: Model
    most_workers: int = 64
    scale_up: float | None = None
    """That of `Learner` unless given."""

    def begin(self) -> Run:
        """A fresh run of the job."""
        return _Elastic(self)


class _Elastic:
    """A run by the rules of Sia's simulator: batch and accumulation are chosen anew at each epoch and placement."""

    def __init__(self, recipe: ElasticRun) -> None:
        self.model = recipe.model
        limits, single = self.model.limits, self.model.single
        if recipe.scale_up is None:
            self.learner = Learner(limits, single, most_workers=recipe.most_workers)
        else:
            self.learner = Learner(limits, single, most_workers=recipe.most_workers, scale_up=recipe.scale_up)
        self.done = 0.0
        self.epoch = 0
        self.gpu = ""
        self.counts: tuple[int, ...] = ()
        self.local, self.accumulation = 0, 0

    @property
    def speed(self) -> LearnedSpeed:
        return self.learner.speed

    @property
    def is_finished(self) -> bool:
        return self.epoch >= self.model.epochs

    def place(self, accelerator: str, counts: Sequence[int]) -> None:
        self.gpu, self.counts = accelerator, rotated(counts)
        self._choose_batch()

    def advance(self, seconds: float) -> float:
        left = seconds
        while left > 0 and not self.is_finished:
            goodput = self._work()
            end = float(self.model.progress[self.epoch])
            if self.done + goodput * left < end:
                self.done += goodput * left
                left = 0.0
            else:
                left = max(left - round((end - self.done) / goodput), 0.0)
                self.done = end
                self.epoch += 1
            if not self.is_finished:
                self._choose_batch()
        return seconds - left

    def _work(self) -> float:
        """True progress per second in the present configuration, which the learner gets to see the parts of."""
        workers = sum(self.counts)
        batch = workers * self.local * (self.accumulation + 1)
        noise = self.model.noise(batch, self.epoch)
        step, sync = self.model.profiles[self.gpu].times(self.counts, self.local)
        sync = min(sync, step * 0.999)
        self.learner.observe(self.gpu, Observation(len(self.counts), workers, self.local, step, sync), noise)
        seconds = step + self.accumulation * (step - sync)
        return float(noise.gain(batch / self.model.batches[0])) / seconds / self.model.slowdown

    def _choose_batch(self) -> None:
        workers, limits = sum(self.counts), self.model.limits[self.gpu]
        profile = self.model.profiles[self.gpu]
        most = profile.most_local(self.counts)
        choice = self.learner.speed.batch(self.gpu, workers, len(self.counts))
        if choice is None or choice.per_worker == 0:
            each = math.ceil(max(limits.base, limits.least_per_worker * workers) / workers - 1e-8)
            self.accumulation = math.ceil(each / most - 1e-8) - 1
            self.local = math.ceil(each / (self.accumulation + 1) - 1e-8)
        else:
            self.local, self.accumulation = choice.per_worker, choice.accumulation
        self.local = min(self.local, most, limits.most // (workers * (self.accumulation + 1)))


def read_models(folder: Path, gpus: Sequence[str]) -> dict[str, Model]:
    """All applications under `traces/` that have profiles for these GPU types."""
    found = {
        path.name: Model(path, gpus)
        for path in sorted(folder.iterdir())
        if path.is_dir() and all((path / f"placements-{gpu}.csv").exists() for gpu in gpus) and "pmp" not in path.name
    }
    if not found:
        raise NotFoundError(f"{folder} holds no profiles for {', '.join(gpus)}", "give sia-simulator/traces")
    return found


def read(
    path: Path,
    models: Mapping[str, Model],
    pools: Mapping[str, tuple[int, int]] = HETEROGENEOUS,
    *,
    scale_up: float | None = None,
) -> Trace:
    """A Sia workload on Sia's cluster. `num_replicas` and `batch_size` are for rigid schedulers and not used.

    Args:
        scale_up: 2 for the limit of Sia's own policy; that of `Learner` unless given.
    """
    jobs = []
    for row in read_table(path, ("name", "time", "application")):
        name = row.text("application")
        if name not in models:
            raise row.error("application", f"is {name!r}; known: {', '.join(sorted(models))}")
        model = models[name]
        most = max(min(64, model.batches[-1] // limits.least_per_worker) for limits in model.limits.values())
        request = Request(job_id=row.text("name"), max_workers=1 if name == "ncf" else most, restart_s=model.restart_s)
        run = ElasticRun(model, most, scale_up)
        jobs.append(TraceJob(request=request, submitted_s=row.number("time", least=0), begin=run.begin))
    return Trace(
        name=f"{path.parent.name}-{path.stem.split('-')[-1]}", jobs=in_order(jobs, path), nodes=cluster_of(pools)
    )
