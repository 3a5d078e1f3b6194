"""Modelyard's own format: one JSON object a line, a job each, optionally the cluster in the first.

    {"pools": {"a100": {"nodes": 2, "gpus": 8}, "t4": {"nodes": 6, "gpus": 4}}}
    {"job": "a", "submit_s": 0, "work": 3600, "speed": {"a100": 4, "t4": 1}, "min": 1, "max": 8}

`speed` is progress per second of one worker per pool, `efficiency` the share of it that each doubling of the workers
keeps, `tenant`, `priority`, `restart_s`, `deadline_s` are those of a `Request`; `is_work_known: false` hides `work`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modelyard.cluster import Node
from modelyard.errors import ConfigError, DataError, nearest
from modelyard.scheduling.model import LinearSpeed, Request
from modelyard.scheduling.traces.base import Row, SteadyRun, Trace, TraceJob, cluster_of, in_order, read_text

_FIELDS = frozenset(
    [
        "job",
        "submit_s",
        "work",
        "speed",
        "efficiency",
        "min",
        "max",
        "tenant",
        "priority",
        "restart_s",
        "deadline_s",
        "is_work_known",
    ]
)


def read(path: Path) -> Trace:
    """Jobs and, where it says so, the cluster."""
    jobs: list[TraceJob] = []
    nodes: tuple[Node, ...] = ()
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        values = _parsed(path, number, line)
        if "pools" in values:
            nodes = _cluster(Row(path, number, {}), values["pools"])
        else:
            jobs.append(_job(path, number, values))
    return Trace(name=path.stem, jobs=in_order(jobs, path), nodes=nodes)


def write(path: Path, jobs: list[Mapping[str, Any]], pools: Mapping[str, tuple[int, int]] | None = None) -> None:
    """Jobs as dictionaries of the fields above, and the cluster."""
    lines: list[Mapping[str, Any]] = []
    if pools:
        lines.append({"pools": {name: {"nodes": count, "gpus": gpus} for name, (count, gpus) in pools.items()}})
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, *jobs]), encoding="utf-8")


def _parsed(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}, line {number}: field 'job' is no JSON: {error.msg}", "repair or remove the line"
        ) from error
    if not isinstance(values, dict):
        raise DataError(f"{path}, line {number}: field 'job' is no object", "write one JSON object a line")
    return values


def _cluster(row: Row, pools: object) -> tuple[Node, ...]:
    if not isinstance(pools, dict) or not pools:
        raise row.error("pools", "is no object of pools")
    found = {}
    for name, shape in pools.items():
        values = {key: str(value) for key, value in shape.items()} if isinstance(shape, dict) else {}
        reader = Row(row.path, row.line, values)
        found[str(name)] = (reader.whole("nodes", least=1), reader.whole("gpus", least=1))
    return cluster_of(found)


def _job(path: Path, number: int, values: Mapping[str, Any]) -> TraceJob:
    row = Row(path, number, {key: str(value) for key, value in values.items() if value is not None})
    for name in values:
        if name not in _FIELDS:
            raise row.error(name, f"is unknown; {nearest(name, _FIELDS)}")
    rates = values.get("speed", {})
    if not isinstance(rates, dict) or not all(isinstance(rate, int | float) and rate >= 0 for rate in rates.values()):
        raise row.error("speed", f"is {rates!r}, not an object of pool to progress per second")
    truth = LinearSpeed(
        per_worker={str(pool): float(rate) for pool, rate in rates.items()},
        default=0.0 if rates else 1.0,
        efficiency=_optional(row, "efficiency", 1.0),
    )
    least = row.whole("min", least=1) if "min" in values else 1
    work = row.number("work", least=0)
    try:
        request = Request(
            job_id=row.text("job"),
            tenant=str(values.get("tenant", "default")),
            priority=int(_optional(row, "priority", 0.0)),
            min_workers=least,
            max_workers=row.whole("max", least=1) if "max" in values else least,
            deadline_s=row.number("deadline_s") if values.get("deadline_s") is not None else None,
            restart_s=_optional(row, "restart_s", 30.0),
            work=work if values.get("is_work_known", True) else None,
        )
    except ConfigError as error:
        raise row.error("job", f"cannot be: {error.problem}") from error
    return TraceJob(request=request, submitted_s=row.number("submit_s", least=0), begin=SteadyRun(work, truth).begin)


def _optional(row: Row, name: str, default: float) -> float:
    return row.number(name) if name in row.values else default
