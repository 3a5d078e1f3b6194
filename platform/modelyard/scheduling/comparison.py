"""Several policies on one trace: the figures side by side, and a picture of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modelyard.scheduling.results import Result


def figures(result: Result) -> dict[str, Any]:
    """The figures of one simulation, flat."""
    return {
        "policy": result.policy,
        "jobs": len(result.jobs),
        "avg_jct_h": result.avg_jct_h,
        "p50_jct_h": result.jct_h(0.5),
        "p99_jct_h": result.jct_h(0.99),
        "makespan_h": result.makespan_h,
        "gpu_h_per_job": result.gpu_h_per_job,
        "restarts_per_job": result.restarts_per_job,
        "utilization": result.utilization,
        "decision_s_p50": result.decision_s(),
    }


def picture(results: Sequence[Result], path: Path) -> None:
    """A PNG: share of GPUs held over time, and the distribution of job completion times."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    over_time, completion = figure.subplots(1, 2)
    for result in results:
        begin, total = result.samples[0].at_s, sum(result.capacity.values())
        hours = [(sample.at_s - begin) / 3600 for sample in result.samples]
        over_time.step(
            hours, [sum(sample.held.values()) / total for sample in result.samples], where="post", label=result.policy
        )
        times = sorted(job.jct_s / 3600 for job in result.jobs)
        completion.step(times, [(index + 1) / len(times) for index in range(len(times))], where="post")
    over_time.set(title="GPUs held", xlabel="hours", ylabel="share", ylim=(0, 1.05))
    completion.set(title="job completion times", xlabel="hours", ylabel="share of jobs", xscale="log", ylim=(0, 1.02))
    over_time.legend(fontsize="small")
    for axes in (over_time, completion):
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
