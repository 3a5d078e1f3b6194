"""When waiting jobs are expected to start: the policy itself, played forward over what is known to end."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping

from modelyard.scheduling.forecast import expected_end, goodput
from modelyard.scheduling.model import Allocation, Job, Policy, Snapshot


def expected_starts(snapshot: Snapshot, policy: Policy, *, budget_s: float = 1.0) -> dict[str, float]:
    """Waiting job to the time at which `policy` would start it, on the snapshot's clock.

    Every job is taken to run at its known speed until its `work` is done, and nothing else to happen. Jobs behind one
    that does not say its work, and those that are not reached within `budget_s` seconds of computing, are left out.
    """
    stop_at = time.monotonic() + budget_s
    starts: dict[str, float] = {}
    waiting = {job.job_id for job in snapshot.jobs if not job.is_running and not job.is_held}
    while waiting - starts.keys():
        decision = policy.decide(snapshot)
        starts |= {job_id: snapshot.now_s for job_id in waiting & decision.run.keys() - starts.keys()}
        snapshot = _carried_out(snapshot, decision.run)
        ends = {job.job_id: end for job in snapshot.jobs if (end := _end(snapshot, job)) is not None}
        if not ends or time.monotonic() > stop_at:
            break
        snapshot = _advanced(snapshot, min(ends.values()))
        over = {job_id for job_id, end in ends.items() if end <= snapshot.now_s}
        snapshot = dataclasses.replace(snapshot, jobs=tuple(j for j in snapshot.jobs if j.job_id not in over))
    return starts


def _end(snapshot: Snapshot, job: Job) -> float | None:
    return expected_end(snapshot, job, job.allocation) if job.is_running else None


def _carried_out(snapshot: Snapshot, run: Mapping[str, Allocation]) -> Snapshot:
    jobs = []
    for job in snapshot.jobs:
        allocation = run.get(job.job_id, {})
        if allocation != job.allocation:
            job = dataclasses.replace(
                job, allocation=allocation, changed_s=snapshot.now_s, restarts=job.restarts + bool(allocation)
            )
        jobs.append(job)
    return dataclasses.replace(snapshot, jobs=tuple(jobs))


def _advanced(snapshot: Snapshot, now_s: float) -> Snapshot:
    jobs = []
    for job in snapshot.jobs:
        if job.is_running:
            begin = snapshot.now_s
            if job.changed_s is not None:
                begin = max(begin, job.changed_s + job.request.restart_s)
            gained = goodput(snapshot, job, job.allocation) * max(now_s - begin, 0.0)
            held_s = (now_s - snapshot.now_s) * job.workers * job.request.gpus_per_worker
            job = dataclasses.replace(job, done=job.done + gained, attained_gpu_s=job.attained_gpu_s + held_s)
        jobs.append(job)
    return dataclasses.replace(snapshot, now_s=now_s, jobs=tuple(jobs))
