"""Rubick's workloads (MLSys'25, AlibabaPAI/reconfigurable-dl-scheduler): jobs that may change their execution plan.

A job runs, on the GPUs it has, the fastest plan (ZeRO, offload, accumulation, DP x TP x PP) that was measured there;
the global batch stays the same. A policy sees those measured rates and, unless asked, not the number of steps.
Rubick itself predicts the rates from a few profiled points, so here a policy knows more of them than Rubick does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from modelyard.errors import NotFoundError
from modelyard.scheduling.model import Request
from modelyard.scheduling.traces.base import SteadyRun, Trace, TraceJob, cluster_of, in_order, read_table

RECONFIGURE_S = 260.0
"""What Rubick's simulator charges for any change of a job's GPUs or plan."""
CLUSTER = {"a800": (8, 8)}
ACCELERATOR = "a800"
FIELDS = ("name", "submission_time", "application", "num_gpus", "exec_plan", "steps")


@dataclass(frozen=True)
class PlanSpeed:
    """The best measured plan per number of GPUs and nodes; a `Speed`."""

    best: Mapping[tuple[int, int], tuple[float, str]]
    """(GPUs, nodes) to steps per second and the plan's name."""

    def goodput(self, accelerator: str, workers: int, nodes: int) -> float:
        """Steps per second; 0 where no plan was measured."""
        return self.best.get((workers, nodes), (0.0, ""))[0] if accelerator == ACCELERATOR else 0.0

    def plan(self, workers: int, nodes: int) -> str:
        """The plan to run there, or nothing."""
        return self.best.get((workers, nodes), (0.0, ""))[1]

    @property
    def sizes(self) -> list[int]:
        """Numbers of GPUs it can run on."""
        return sorted({workers for workers, _ in self.best})


def read_plans(folder: Path) -> dict[str, PlanSpeed]:
    """Every application under `traces/`; a zero time in the table means that the plan does not fit in memory."""
    found = {}
    for path in sorted(folder.glob("*/placements.csv")):
        best: dict[tuple[int, int], tuple[float, str]] = {}
        for row in read_table(path, ("exec_plan", "placement", "iter_time")):
            digits = row.text("placement")
            if not digits.isdigit() or "0" in digits:
                raise row.error("placement", f"is {digits!r}, not one digit of GPUs per node")
            seconds = row.number("iter_time", least=0)
            counts = [int(digit) for digit in digits]
            key = (sum(counts), len(counts))
            if seconds > 0 and 1 / seconds > best.get(key, (0.0, ""))[0]:
                best[key] = (1 / seconds, row.text("exec_plan"))
        found[path.parent.name] = PlanSpeed(best)
    if not found:
        raise NotFoundError(f"{folder} holds no <application>/placements.csv", "give Rubick's traces folder")
    return found


def read(path: Path, plans: Mapping[str, PlanSpeed], *, is_work_known: bool = False) -> Trace:
    """A Rubick workload on 64 A800 GPUs."""
    jobs = []
    for row in read_table(path, FIELDS):
        application = row.text("application")
        if application not in plans:
            raise row.error("application", f"is {application!r}; known: {', '.join(sorted(plans))}")
        speed, steps = plans[application], float(row.whole("steps", least=1))
        sizes = _packed(speed.sizes, speed)
        request = Request(
            job_id=row.text("name"),
            min_workers=min(sizes),
            max_workers=max(sizes),
            restart_s=RECONFIGURE_S,
            work=steps if is_work_known else None,
        )
        run = SteadyRun(steps, speed)
        jobs.append(TraceJob(request=request, submitted_s=row.number("submission_time", least=0), begin=run.begin))
    return Trace(name=path.stem, jobs=in_order(jobs, path), nodes=cluster_of(CLUSTER))


def _packed(sizes: Sequence[int], speed: PlanSpeed) -> list[int]:
    """Sizes that were measured on the fewest nodes that hold them."""
    per_node = CLUSTER[ACCELERATOR][1]
    return [size for size in sizes if speed.goodput(ACCELERATOR, size, -(-size // per_node)) > 0]
