"""Microsoft's Philly trace (ATC'19, msr-fiddle/philly-traces): `cluster_job_log`, a JSON list of jobs.

A job of the log says when it was submitted, and per attempt which GPUs it held from when to when. It becomes a rigid
job of the largest number of GPUs it held; its work is the seconds it ran, all attempts together. The log knows one kind
of GPU, so all pools are equally fast unless `speeds` says otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from modelyard.cluster import Node
from modelyard.errors import DataError
from modelyard.scheduling.model import LinearSpeed, Request
from modelyard.scheduling.traces.base import SteadyRun, Trace, TraceJob, in_order, read_text

_TIME = "%Y-%m-%d %H:%M:%S"


def read(
    path: Path,
    *,
    nodes: tuple[Node, ...] = (),
    speeds: Mapping[str, float] | None = None,
    is_work_known: bool = True,
    restart_s: float = 30.0,
) -> Trace:
    """Jobs that ran. Those without an attempt, or without GPUs, never held anything and are left out."""
    text = read_text(path)
    try:
        entries = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: field 'jobs' is no JSON: {error.msg}", "repair it") from error
    if not isinstance(entries, list):
        raise DataError(f"{path}, line 1: field 'jobs' is no list", "give Philly's cluster_job_log")
    lines = _lines(text)
    found: list[tuple[float, dict[str, Any], int, float]] = []
    for index, entry in enumerate(entries):
        reader = _Entry(path, entry, lines.get(index, 1))
        seconds, gpus = reader.attempts()
        if seconds > 0 and gpus > 0:
            found.append((reader.time("submitted_time", entry), entry, gpus, seconds))
    first = min((at for at, *_ in found), default=0.0)
    jobs = []
    for at, entry, gpus, seconds in found:
        truth = LinearSpeed(per_worker={name: speed / gpus for name, speed in (speeds or {}).items()}, default=1 / gpus)
        request = Request(
            job_id=str(entry["jobid"]),
            tenant=str(entry.get("vc") or "default"),
            min_workers=gpus,
            max_workers=gpus,
            work=seconds if is_work_known else None,
            restart_s=restart_s,
        )
        jobs.append(TraceJob(request=request, submitted_s=at - first, begin=SteadyRun(seconds, truth).begin))
    return Trace(name=path.stem, jobs=in_order(jobs, path), nodes=nodes)


def _lines(text: str) -> dict[int, int]:
    """Entry to the line at which its `jobid` stands."""
    at = [number for number, line in enumerate(text.splitlines(), start=1) if '"jobid"' in line]
    return dict(enumerate(at))


class _Entry:
    """One job of the log."""

    def __init__(self, path: Path, entry: object, line: int) -> None:
        self.path, self.line = path, line
        if not isinstance(entry, dict):
            raise self.error("job", "is no object")
        self.entry: dict[str, Any] = entry
        if not entry.get("jobid"):
            raise self.error("jobid", "is missing")

    def attempts(self) -> tuple[float, int]:
        """Seconds of all attempts and the most GPUs of one."""
        attempts = self.entry.get("attempts")
        if not isinstance(attempts, list):
            raise self.error("attempts", "is no list")
        seconds, gpus = 0.0, 0
        for attempt in attempts:
            if not attempt.get("start_time") or not attempt.get("end_time"):
                continue  # killed before it started, or still running when the log was cut
            seconds += max(self.time("end_time", attempt) - self.time("start_time", attempt), 0.0)
            detail = attempt.get("detail")
            if not isinstance(detail, list):
                raise self.error("detail", "is no list")
            gpus = max(gpus, sum(len(part.get("gpus") or ()) for part in detail))
        return seconds, gpus

    def time(self, name: str, values: Mapping[str, Any]) -> float:
        """A moment in seconds."""
        try:
            return datetime.strptime(str(values.get(name)), _TIME).replace(tzinfo=UTC).timestamp()
        except ValueError:
            raise self.error(name, f"is {values.get(name)!r}, not a time like 2017-10-09 07:01:55") from None

    def error(self, name: str, problem: str) -> DataError:
        return DataError(f"{self.path}, line {self.line}: field {name!r} {problem}", "repair or remove the job")
