"""When a waiting job is expected to start."""

from __future__ import annotations

import dataclasses

import pytest
from tests.scheduling.builders import job, node, snapshot

from modelyard.scheduling.model import LinearSpeed
from modelyard.scheduling.outlook import expected_starts
from modelyard.scheduling.policies import policy


def test_jobs_start_one_after_the_other_as_those_before_them_end() -> None:
    runs = job("runs", 4, work=400.0, allocation={"n": 4}, done=200.0, changed_s=-100.0, restart_s=0.0)
    second = job("second", 4, at=1, work=80.0, restart_s=10.0)
    third = job("third", 4, at=2, work=40.0)
    seen = snapshot([node("n", 4)], [runs, second, third])
    found = expected_starts(seen, policy("fifo"))
    assert found == {"second": pytest.approx(50.0), "third": pytest.approx(50.0 + 10.0 + 20.0)}


def test_behind_a_job_of_unknown_length_nobody_knows() -> None:
    seen = snapshot([node("n", 4)], [job("endless", 4, allocation={"n": 4}), job("next", 4, at=1, work=1.0)])
    assert expected_starts(seen, policy("fifo")) == {}


def test_the_policy_decides_who_is_next() -> None:
    runs = job("runs", 4, work=40.0, allocation={"n": 4}, changed_s=-100.0, is_preemptible=False)
    early, urgent = job("early", 4, at=1, work=20.0), job("urgent", 4, at=2, work=20.0, priority=9)
    seen = snapshot([node("n", 4)], [runs, early, urgent])
    first = {
        name: min(expected_starts(seen, policy(name)).items(), key=lambda each: each[1])[0]
        for name in ("fifo", "priority")
    }
    assert first == {"fifo": "early", "priority": "urgent"}


def test_the_forecast_comes_true_when_nothing_else_happens() -> None:
    jobs = [job(f"j{n}", 2, at=n, work=30.0 + 7 * n, restart_s=5.0) for n in range(8)]
    seen = snapshot([node("n", 4)], jobs)
    foretold = expected_starts(seen, policy("fifo"))
    now, ends = 0.0, {}
    running: dict[str, float] = {}
    for one in jobs:  # first come, first served on two slots of two GPUs
        now = max(now, min(running.values())) if len(running) == 2 else now
        running = {name: end for name, end in running.items() if end > now + 1e-9}
        assert foretold[one.job_id] == pytest.approx(now)
        assert one.request.work is not None
        running[one.job_id] = ends[one.job_id] = now + 5.0 + one.request.work / 2


def test_no_time_to_compute_leaves_jobs_out_instead_of_guessing() -> None:
    slow = LinearSpeed(default=0.001)
    jobs = [dataclasses.replace(job(f"j{n}", 4, at=n, work=1.0), speed=slow) for n in range(5)]
    found = expected_starts(snapshot([node("n", 4)], jobs), policy("fifo"), budget_s=0.0)
    assert found == {"j0": 0.0}
