"""What holds of every policy, over random clusters, jobs and events."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.scheduling.builders import (
    POWER,
    TENANTS,
    TIGHTER,
    advance,
    apply,
    cap_of,
    check,
    clusters,
    end_next,
    job,
    jobs,
    node,
    present_policies,
    renamed,
    snapshot,
)

from modelyard.cluster import Node
from modelyard.scheduling.forecast import expected_end, fits
from modelyard.scheduling.model import Action, Decision, Job, Snapshot, actions
from modelyard.scheduling.placement import Room
from modelyard.scheduling.policies import policy
from modelyard.scheduling.policies.fifo import FifoPolicy

LIGHT = ("deadline", "fair_share", "fifo", "priority", "random", "round_robin")
STATES = st.sampled_from(["up", "up", "up", "dead", "drains"])
MODEST = settings(
    derandomize=True, deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow], database=None
)
FEW = settings(MODEST, max_examples=8)


@pytest.mark.parametrize("name", present_policies())
def test_a_sequence_of_decisions_breaks_no_rule(name: str) -> None:
    @(MODEST if name in LIGHT else FEW)
    @given(clusters(), jobs(), jobs("late", at=50), st.data())
    def holds(nodes: tuple[Node, ...], first: tuple[Job, ...], late: tuple[Job, ...], data: st.DataObject) -> None:
        made = policy(name)
        seen = snapshot(nodes, first, TENANTS)
        for step in range(5):
            decision = made.decide(seen)
            check(seen, decision)
            seen = end_next(apply(seen, decision))
            if step == 1:
                seen = dataclasses.replace(seen, jobs=seen.jobs + late)
            if step == 2:
                states = data.draw(st.lists(STATES, min_size=len(nodes), max_size=len(nodes)))
                seen = dataclasses.replace(seen, nodes=renamed(nodes, states))

    holds()


@pytest.mark.parametrize("name", present_policies())
def test_power_caps_and_limits_hold_also_when_they_are_lowered_under_running_jobs(name: str) -> None:
    @(MODEST if name in LIGHT else FEW)
    @given(clusters(), jobs(), jobs("late", at=50), st.lists(st.sampled_from([0, 0.2, 0.4, 0.7, 1]), min_size=3))
    def holds(nodes: tuple[Node, ...], first: tuple[Job, ...], late: tuple[Job, ...], shares: list[float]) -> None:
        made = policy(name)
        seen = dataclasses.replace(snapshot(nodes, first, TENANTS), power=POWER)
        for step, share in enumerate(sorted(shares, reverse=True)[:4]):
            tenants = TIGHTER if step else TENANTS
            seen = dataclasses.replace(seen, power_cap_watts=cap_of(seen, share), tenants=tenants)
            decision = made.decide(seen)
            check(seen, decision)
            seen = dataclasses.replace(apply(seen, decision), now_s=seen.now_s + 50)
            seen = dataclasses.replace(seen, jobs=seen.jobs + (late if step == 0 else ()))

    holds()


@pytest.mark.parametrize("name", present_policies())
def test_a_decision_depends_on_nothing_but_what_is_there(name: str) -> None:
    @(MODEST if name in LIGHT else FEW)
    @given(clusters(), jobs(), st.randoms(use_true_random=False))
    def holds(nodes: tuple[Node, ...], waiting: tuple[Job, ...], chance: object) -> None:
        seen = snapshot(nodes, waiting, TENANTS)
        seen = end_next(apply(seen, policy(name).decide(seen)))
        turned = list(seen.nodes)
        chance.shuffle(turned)  # type: ignore[attr-defined]
        mixed = list(seen.jobs)
        chance.shuffle(mixed)  # type: ignore[attr-defined]
        first = policy(name).decide(seen)
        again = policy(name).decide(dataclasses.replace(seen))
        other = policy(name).decide(dataclasses.replace(seen, nodes=tuple(turned), jobs=tuple(mixed)))
        assert _plain(first) == _plain(again) == _plain(other)

    holds()


@pytest.mark.parametrize("name", LIGHT)
def test_what_was_decided_is_not_taken_back_a_second_later(name: str) -> None:
    @settings(MODEST, max_examples=15)
    @given(clusters(), jobs(), jobs("late", at=5))
    def holds(nodes: tuple[Node, ...], first: tuple[Job, ...], late: tuple[Job, ...]) -> None:
        made = policy(name)
        seen = snapshot(nodes, first, TENANTS)
        seen = apply(seen, made.decide(seen))
        seen = dataclasses.replace(seen, jobs=seen.jobs + late, now_s=10.0)
        seen = dataclasses.replace(apply(seen, made.decide(seen)), now_s=11.0)
        assert not {Action.PREEMPT, Action.MOVE} & set(actions(seen, made.decide(seen)).values())

    holds()


@MODEST
@given(clusters(), jobs(finite=True), jobs("late", at=50, finite=True))
def test_under_fair_share_every_job_that_can_ever_fit_starts_in_the_end(
    nodes: tuple[Node, ...], first: tuple[Job, ...], late: tuple[Job, ...]
) -> None:
    made = policy("fair_share")
    seen = snapshot(nodes, first + late, TENANTS)
    feasible = {job.job_id for job in seen.jobs if _can_run_alone(seen, job)}
    started: set[str] = set()
    for _ in range(4 * len(seen.jobs) + 1):
        decision = made.decide(seen)
        started |= decision.run.keys()
        seen = end_next(apply(seen, decision))
    assert feasible <= started


def test_under_fair_share_a_large_gang_does_not_starve_behind_a_stream_of_small_jobs() -> None:
    made = policy("fair_share")
    small = [job(f"s{n}", 1, at=n, tenant=f"t{n % 3}", work=100 + n % 7, restart_s=0) for n in range(4)]
    seen = snapshot([node("n", 4)], [*small, job("big", 4, at=3.5, tenant="t0", work=100)])
    for n in range(4, 80):
        decision = made.decide(seen)
        if "big" in decision.run:
            return
        seen = end_next(apply(seen, decision))
        fresh = job(f"s{n}", 1, at=seen.now_s, tenant=f"t{n % 3}", work=100 + n % 7, restart_s=0)
        seen = dataclasses.replace(seen, jobs=(*seen.jobs, fresh))
    pytest.fail("the gang of 4 still waits after 76 small jobs went by")


@settings(MODEST, max_examples=120)
@given(clusters(), jobs("a", finite=True), jobs("b", at=5), st.data())
def test_backfill_never_delays_the_head_of_the_queue(
    nodes: tuple[Node, ...], first: tuple[Job, ...], then: tuple[Job, ...], data: st.DataObject
) -> None:
    seen = snapshot(nodes, first)
    seen = apply(seen, FifoPolicy(backfill=False, moves=False).decide(seen))
    running = tuple(job for job in seen.jobs if job.is_running)
    unknown = data.draw(st.integers(0, 3)) == 0
    if unknown and running:
        hidden = dataclasses.replace(running[0], request=dataclasses.replace(running[0].request, work=None))
        running = (hidden, *running[1:])
    lengths = {job.job_id: data.draw(st.floats(1, 5000)) for job in (*running, *then) if job.request.work is None}
    seen = dataclasses.replace(seen, jobs=(*running, *then))
    plain = FifoPolicy(backfill=False, moves=False).decide(seen)
    head = next(
        (job for job in then if job.job_id in plain.wait and not job.is_held and _can_run_alone(seen, job)), None
    )
    if head is not None:
        without = _start_of(head, seen, FifoPolicy(backfill=False, moves=False), lengths)
        assert _start_of(head, seen, FifoPolicy(moves=False), lengths) <= without + 1e-6


def _start_of(head: Job, seen: Snapshot, made: FifoPolicy, lengths: dict[str, float]) -> float:
    """When the head starts if jobs last as long as expected, and those nobody knows of as long as `lengths` says."""
    for _ in range(80):
        decision = made.decide(seen)
        if head.job_id in decision.run:
            return seen.now_s
        seen = _end_first(apply(seen, decision), lengths)
    raise AssertionError("the head never starts")


def _end_first(seen: Snapshot, lengths: dict[str, float]) -> Snapshot:

    ends = {}
    for one in seen.jobs:
        if one.is_running:
            end = expected_end(seen, one, one.allocation)
            ends[one.job_id] = (one.changed_s or 0.0) + lengths[one.job_id] if end is None else end
    now, first = min((end, name) for name, end in ends.items())
    now = max(now, seen.now_s)
    left = tuple(advance(seen, job, now) for job in seen.jobs if job.job_id != first)
    return dataclasses.replace(seen, now_s=now, jobs=left)


def _can_run_alone(seen: Snapshot, job: Job) -> bool:
    decision = policy("fifo").decide(dataclasses.replace(seen, jobs=(dataclasses.replace(job, allocation={}),)))
    room = Room(seen.pools)
    pools = job.request.pools or tuple(seen.pools)
    known = tuple(pool for pool in pools if pool in seen.pools)
    assert (job.job_id in decision.run) <= fits(room, job.request, known, job.request.min_workers)
    return job.job_id in decision.run


def _plain(decision: Decision) -> tuple[object, object]:
    return {name: dict(held) for name, held in decision.run.items()}, dict(decision.wait)
