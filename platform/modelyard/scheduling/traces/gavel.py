"""Gavel's traces and throughput tables (OSDI'20, stanford-futuredata/gavel).

A policy sees the measured steps/s of the requested workers and batch on each accelerator (Gavel's oracle) and the
total steps (as Gavel's `min_total_duration` and `finish_time_fairness` do).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from modelyard.cluster import Node
from modelyard.errors import DataError, nearest
from modelyard.scheduling.model import Request
from modelyard.scheduling.traces.base import (
    SteadyRun,
    TableSpeed,
    Trace,
    TraceJob,
    cluster_of,
    in_order,
    read_table,
    read_text,
)

FIELDS = (
    "job_type",
    "command",
    "working_dir",
    "num_steps_arg",
    "needs_data_dir",
    "total_steps",
    "scale_factor",
    "priority_weight",
    "SLO",
    "arrival_s",
)
PHYSICAL = {"v100": (8, 1), "p100": (16, 1), "k80": (24, 1)}
"""Gavel's physical cluster as its simulator has it: 8 V100, 16 P100, 24 K80, one GPU a server."""
_KEY = re.compile(r"^\('(?P<type>.+)', (?P<workers>\d+)\)$")

Throughputs = Mapping[tuple[str, int], TableSpeed]


def cluster(pools: Mapping[str, tuple[int, int]] = PHYSICAL) -> tuple[Node, ...]:
    """The cluster of the published figures."""
    return cluster_of(pools)


def read_throughputs(path: Path) -> Throughputs:
    """(job type, workers) to the speed of one job that has its GPUs to itself.

    Gavel's simulator uses the consolidated figure wherever the workers are, so `spread` stays empty.
    """
    try:
        tables = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}, line {error.lineno}: field 'throughputs' is no JSON: {error.msg}", "repair the file"
        ) from error
    if not isinstance(tables, dict) or not all(isinstance(table, dict) for table in tables.values()):
        raise DataError(
            f"{path}, line 1: field 'throughputs' is no object of objects", "give Gavel's simulation_throughputs.json"
        )
    rates: dict[tuple[str, int], dict[tuple[str, int], float]] = {}
    for accelerator, table in tables.items():
        if accelerator.endswith("_unconsolidated"):
            continue
        for key, partners in table.items():
            matched = _KEY.match(key)
            if matched is None:
                raise DataError(f"{path}, line 1: field {key!r} is not ('type', workers)", "repair the file")
            alone = partners.get("null")
            if isinstance(alone, int | float) and alone > 0:
                workers = int(matched["workers"])
                rates.setdefault((matched["type"], workers), {})[accelerator, workers] = float(alone)
    return {key: TableSpeed(found) for key, found in rates.items()}


def read(path: Path, throughputs: Path) -> Trace:
    """A Gavel trace (tab-separated, no header) with the truth of its throughput table."""
    speeds = read_throughputs(throughputs)
    jobs = []
    for number, row in enumerate(read_table(path, FIELDS, separator="\t", header=False)):
        workers = row.whole("scale_factor", least=1)
        kind = (row.text("job_type"), workers)
        if kind not in speeds:
            raise row.error(
                "job_type",
                f"is {kind[0]!r} on {workers} GPUs: not in {throughputs}; {nearest(kind[0], _kinds(speeds))}",
            )
        steps = float(row.whole("total_steps", least=1))
        request = Request(job_id=f"job-{number}", min_workers=workers, max_workers=workers, work=steps, restart_s=0.0)
        run = SteadyRun(steps, speeds[kind])
        jobs.append(TraceJob(request=request, submitted_s=row.number("arrival_s", least=0), begin=run.begin))
    return Trace(name=path.stem, jobs=in_order(jobs, path), nodes=cluster())


def _kinds(speeds: Throughputs) -> set[str]:
    return {name for name, _ in speeds}
