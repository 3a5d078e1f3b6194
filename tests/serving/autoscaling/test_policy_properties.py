"""What holds of every decision of the latency policy, whatever it sees."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st
from tests.serving.autoscaling.builders import config, pool, snapshot, steady

from modelyard.serving.autoscaling.model import PoolState, ReplicaReport, Snapshot
from modelyard.serving.autoscaling.policy import LatencyPolicy

counts = st.floats(min_value=0, max_value=500)


@st.composite
def histories(draw: st.DrawFn) -> list[Snapshot]:
    """A few minutes of two pools with any demand, any queue and any fleet."""
    seen, now_s = [], 0.0
    for _ in range(draw(st.integers(1, 12))):
        now_s += draw(st.floats(min_value=0.1, max_value=40))
        pools = []
        for name in ("cheap", "dear"):
            running = draw(st.integers(0, 12))
            reports = tuple(
                ReplicaReport(
                    f"{name}-{index}",
                    now_s,
                    draw(st.integers(0, 16)),
                    draw(st.integers(0, 30)),
                    draw(st.floats(0, 1e6)),
                    draw(st.floats(0, 1e5)),
                    draw(st.integers(0, 1000)),
                    draw(st.floats(0, 1)),
                )
                for index in range(min(running, 2))
            )
            pools.append(PoolState(name, running, running + draw(st.integers(0, 6)), reports))
        requests = draw(counts)
        seen.append(
            Snapshot(
                now_s=now_s,
                pools=tuple(pools),
                arrived_requests=requests,
                arrived_prompt_tokens=draw(st.none() | st.just(requests * 700)),
                queued_requests=draw(counts),
                running_requests=draw(st.none() | counts),
                ttft_over_limit=draw(st.none() | st.floats(0, 10)),
            )
        )
    return seen


TWO = config(
    pool("dear", min_replicas=1, max_replicas=12, price_per_hour=3.0),
    pool("cheap", min_replicas=0, max_replicas=9, price_per_hour=1.0),
    max_price_per_hour=20.0,
)


@given(histories())
@settings(max_examples=40, deadline=None)
def test_a_decision_is_within_bounds_and_price_and_cheap_replicas_come_first(history: list[Snapshot]) -> None:
    policy = LatencyPolicy(TWO)
    for seen in history:
        replicas = policy.decide(seen).replicas
        assert 1 <= replicas["dear"] <= 12
        assert 0 <= replicas["cheap"] <= 9
        assert 3.0 * replicas["dear"] + replicas["cheap"] <= 20.0
        streams = sum(
            one.running + one.waiting for state in seen.pools if state.name == "dear" for one in state.reports
        )
        cache = sum(one.cache_usage for state in seen.pools if state.name == "dear" for one in state.reports)
        if replicas["dear"] > max(1, -(-streams // 16), cache + 1):
            assert replicas["cheap"] == 9 or 3.0 * replicas["dear"] + replicas["cheap"] > 19.0


@given(histories())
@settings(max_examples=20, deadline=None)
def test_the_same_history_gives_the_same_decisions(history: list[Snapshot]) -> None:
    one, other = LatencyPolicy(TWO), LatencyPolicy(TWO)
    assert [one.decide(seen) for seen in history] == [other.decide(seen) for seen in history]


@given(histories(), counts, counts)
@settings(max_examples=40, deadline=None)
def test_more_demand_never_gets_fewer_replicas(history: list[Snapshot], queued: float, requests: float) -> None:
    policy = LatencyPolicy(config(pool("cheap"), pool("dear", price_per_hour=3.0)))
    for seen in history[:-1]:
        policy.decide(seen)
    last = replace(history[-1], arrived_prompt_tokens=None)
    more = replace(
        last, queued_requests=last.queued_requests + queued, arrived_requests=last.arrived_requests + requests
    )
    assert deepcopy(policy).decide(last).total <= policy.decide(more).total


@given(st.floats(min_value=0.0, max_value=8.0), st.integers(1, 40))
@settings(max_examples=8, deadline=None)
def test_a_constant_demand_gets_a_constant_fleet(rate: float, replicas: int) -> None:
    policy = LatencyPolicy(config())
    settled = steady(policy, 200, rate, replicas).total
    for second in range(200, 260):
        assert policy.decide(snapshot(float(second), settled, requests=rate)).total == settled


@given(st.floats(min_value=0.5, max_value=8.0), st.floats(min_value=0.0, max_value=1.0))
@settings(max_examples=8, deadline=None)
def test_the_fleet_shrinks_only_when_the_rest_would_have_held_with_margin(rate: float, fall: float) -> None:
    policy = LatencyPolicy(config(hold_s=30.0))
    replicas = steady(policy, 150, rate, 20).total
    needs = []
    for second in range(150, 260):
        decision = policy.decide(snapshot(float(second), replicas, requests=rate * fall))
        needs.append(max(decision.figures["steady"], decision.figures["drain"]))
        if decision.total < replicas:
            assert decision.total >= max(needs[-30:]) - 1e-6
            assert decision.total >= decision.figures["held"] - 1e-6
        replicas = decision.total
