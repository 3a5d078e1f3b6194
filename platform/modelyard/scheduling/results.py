"""What a simulation found: per job, over time, and in the figures that publications give."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from modelyard.scheduling.traces.base import Trace, TraceJob


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one job."""

    job_id: str
    submitted_s: float
    started_s: float
    finished_s: float
    gpu_s: float
    """GPU-seconds held while it worked or restarted; what stayed reserved after its end is not counted."""
    restart_gpu_s: float
    restarts: int
    """Beyond the first start."""
    mean_contention: float
    """Jobs in the cluster, averaged over the rounds of its life."""

    @property
    def jct_s(self) -> float:
        """Seconds from submission to completion."""
        return self.finished_s - self.submitted_s


@dataclass(frozen=True)
class Sample:
    """One round."""

    at_s: float
    length_s: float
    held: Mapping[str, float]
    """Pool to GPUs in use."""
    running: int
    waiting: int


@dataclass(frozen=True, kw_only=True)
class Result:
    """A finished simulation."""

    trace: str
    policy: str
    capacity: Mapping[str, float]
    """Pool to GPUs."""
    jobs: tuple[Outcome, ...]
    samples: tuple[Sample, ...]
    decisions_s: tuple[float, ...]
    """Wall time of each decision."""

    @property
    def avg_jct_h(self) -> float:
        """Mean job completion time in hours."""
        return statistics.fmean(job.jct_s for job in self.jobs) / 3600

    def jct_h(self, quantile: float) -> float:
        """A quantile of the job completion times in hours, interpolated linearly."""
        return _quantile([job.jct_s for job in self.jobs], quantile) / 3600

    @property
    def makespan_h(self) -> float:
        """Hours from the first submission to the last completion."""
        return (max(job.finished_s for job in self.jobs) - min(job.submitted_s for job in self.jobs)) / 3600

    @property
    def gpu_h_per_job(self) -> float:
        """GPU-hours of a job on average, restarts included."""
        return statistics.fmean(job.gpu_s for job in self.jobs) / 3600

    @property
    def restarts_per_job(self) -> float:
        """Restarts of a job on average."""
        return statistics.fmean(job.restarts for job in self.jobs)

    @property
    def utilization(self) -> float:
        """Share of all GPU time that was held, over the whole simulation."""
        total = sum(self.capacity.values()) * sum(sample.length_s for sample in self.samples)
        return sum(sum(sample.held.values()) * sample.length_s for sample in self.samples) / total if total else 0.0

    def decision_s(self, quantile: float = 0.5) -> float:
        """A quantile of the wall time of a decision."""
        return _quantile(self.decisions_s, quantile)

    def fairness(self, trace: Trace) -> dict[str, float]:
        """Finish-time fairness of each job: its time over that in an equal share of the cluster, alone.

        As in Themis (NSDI'20) and Sia (SOSP'23, section 5.1): the share is the number of GPUs over the jobs that were
        there on average; the time alone is the mean over accelerators, weighted by their GPUs and interpolated between
        whole GPUs. Above 1 the job would have been better off with its share.
        """
        entries = {job.request.job_id: job for job in trace.jobs}
        alone = _Alone(trace, self.capacity)
        total = sum(self.capacity.values())
        return {
            job.job_id: job.jct_s / alone.seconds(entries[job.job_id], total / job.mean_contention) for job in self.jobs
        }


class _Alone:
    """Times of jobs that have a share of the cluster to themselves."""

    def __init__(self, trace: Trace, capacity: Mapping[str, float]) -> None:
        self.trace = trace
        self.capacity = capacity
        self.per_node = {
            pool: max(int(node.total.get("GPU", 0)) for node in trace.nodes if _pool(node.labels) == pool)
            for pool in capacity
        }

    def seconds(self, entry: TraceJob, share: float) -> float:
        """Mean over the pools it can run in."""
        found = [
            (weight, seconds)
            for pool, weight in self.capacity.items()
            if math.isfinite(seconds := self._on(entry, pool, share))
        ]
        if not found:
            return math.inf
        return sum(weight * seconds for weight, seconds in found) / sum(weight for weight, _ in found)

    def _on(self, entry: TraceJob, pool: str, share: float) -> float:
        least = entry.request.min_workers * entry.request.gpus_per_worker
        if share < least:  # it waits its turn: the time of the least it takes, stretched
            return self._run(entry, pool, int(least)) * least / share
        most = min(entry.request.max_workers * entry.request.gpus_per_worker, self.capacity[pool], share)
        low = self._run(entry, pool, math.floor(most))
        high = self._run(entry, pool, math.ceil(most)) if most > math.floor(most) else low
        return low + (high - low) * (most - math.floor(most)) if math.isfinite(high) else low

    def _run(self, entry: TraceJob, pool: str, gpus: int) -> float:
        workers = int(gpus / entry.request.gpus_per_worker)
        run, fits = entry.begin(), max(int(self.per_node[pool] / entry.request.gpus_per_worker), 1)
        counts = [fits] * (workers // fits) + ([workers % fits] if workers % fits else [])
        run.place(self.trace.accelerators.get(pool, pool), counts)
        spent = entry.request.restart_s
        while not run.is_finished:
            took = run.advance(86_400.0)
            spent += took
            if spent > 10_000 * 86_400 or (took >= 86_400 and run.done <= 0):
                return math.inf
        return spent


def _pool(labels: Mapping[str, str]) -> str:
    from modelyard.scheduling.model import DEFAULT_POOL, POOL_LABEL

    return labels.get(POOL_LABEL, DEFAULT_POOL)


def _quantile(values: Sequence[float], quantile: float) -> float:
    ordered = sorted(values)
    if not ordered:
        return 0.0
    at = quantile * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)
