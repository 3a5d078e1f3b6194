"""What the latency policy does in plain situations."""

from __future__ import annotations

import math
import random

import pytest
from tests.serving.autoscaling.builders import CAPACITY, OBJECTIVE, config, pool, report, snapshot, steady

from modelyard.config import parse
from modelyard.errors import ConfigError
from modelyard.serving.autoscaling.capacity import (
    CapacityLearner,
    Mix,
    erlang_c,
    replicas_for,
    request_work_s,
    seconds_per_token,
    wait_exceeds,
)
from modelyard.serving.autoscaling.demand import BIN_S, Forecast
from modelyard.serving.autoscaling.model import Capacity, PoolState, ReplicaReport, ScalingConfig, Snapshot
from modelyard.serving.autoscaling.policy import LatencyPolicy


def test_a_burst_is_answered_at_the_next_tick_and_said_in_numbers() -> None:
    policy = LatencyPolicy(config())
    quiet = steady(policy, 120, 0.5, 3).total
    decision = policy.decide(snapshot(120.0, quiet, requests=40, queued=40))
    assert decision.total > 3 * quiet
    assert "replica-seconds wait" in decision.reason


def test_a_longer_cold_start_asks_for_more_replicas_of_a_growing_backlog() -> None:
    def after_burst(cold_start_s: float) -> int:
        policy = LatencyPolicy(config(pool(cold_start_s=cold_start_s)))
        for second in range(60):
            policy.decide(snapshot(float(second), 5, requests=4))  # more than five replicas can do
        return policy.decide(snapshot(60.0, 5, requests=30, queued=30)).total

    assert after_burst(40.0) > after_burst(2.0)


def test_replicas_that_are_starting_are_counted_on_when_a_backlog_is_sized() -> None:
    def drain(starting: int) -> float:
        policy = LatencyPolicy(config())
        replicas = steady(policy, 60, 1.0, 4).total
        seen = snapshot(60.0, replicas, target=replicas + starting, requests=25, queued=25)
        return policy.decide(seen).figures["drain"]

    assert drain(starting=4) < drain(starting=0)


def test_nobody_asking_takes_an_optional_pool_to_zero_and_not_before_the_time() -> None:
    policy = LatencyPolicy(config(pool(min_replicas=0), zero_after_s=100.0, hold_s=10.0))
    policy.decide(snapshot(0.0, 1, requests=1))
    seen = [policy.decide(snapshot(float(second), 1, running=0)).total for second in range(1, 200)]
    assert seen[98] == 1
    assert seen[110] == 0
    assert policy.decide(snapshot(200.0, 0, requests=1, queued=1, running=0)).total >= 1


def test_running_streams_keep_their_replicas_when_demand_ends() -> None:
    policy = LatencyPolicy(config(pool(max_replicas=20), hold_s=1.0))
    for second in range(200):
        streams = tuple(report(index, float(second), running=14) for index in range(6))
        decision = policy.decide(snapshot(float(second), 6, reports=streams))
    assert decision.total == 6  # 84 streams need 5.25 replicas of 16


def test_the_cache_counts_as_much_as_the_slots() -> None:
    policy = LatencyPolicy(config(hold_s=1.0))
    for second in range(100):
        full = tuple(ReplicaReport(f"r{index}", float(second), 2, 0, 0, 0, 0, cache_usage=0.9) for index in range(5))
        decision = policy.decide(snapshot(float(second), 5, reports=full))
    assert decision.total == 5


def test_a_price_ceiling_is_named_when_it_binds() -> None:
    policy = LatencyPolicy(config(pool(price_per_hour=2.0), max_price_per_hour=9.0))
    decision = policy.decide(snapshot(0.0, 1, queued=300))
    assert decision.total == 4
    assert "bounds or price allow 4" in decision.reason


def test_the_dear_pool_serves_what_the_cheap_one_cannot() -> None:
    policy = LatencyPolicy(config(pool("dear", price_per_hour=4.0, min_replicas=0), pool("cheap", max_replicas=3)))

    def decide(at_s: float, queued: float) -> dict[str, int]:
        states = (PoolState("dear", 0, 0), PoolState("cheap", 1, 1))
        return policy.decide(Snapshot(at_s, states, queued_requests=queued)).replicas

    # A request of unknown length counts as 0.9 s of work, may wait 5.9 s, and a new replica takes 10 s: ten are worked
    # off before by the one that is there; of 25, 12.6 s are left, which two replicas would keep waiting too long.
    assert decide(0.0, 10) == {"dear": 0, "cheap": 1}
    assert decide(1.0, 25) == {"dear": 0, "cheap": 3}
    assert decide(2.0, 50) == {"dear": 3, "cheap": 3}


def test_a_price_ceiling_binds_over_all_pools_together() -> None:
    both = config(pool("cheap", max_replicas=2), pool("dear", price_per_hour=4.0), max_price_per_hour=11.0)
    states = (PoolState("cheap", 1, 1), PoolState("dear", 1, 1))
    decision = LatencyPolicy(both).decide(Snapshot(0.0, states, queued_requests=300))
    assert decision.replicas == {"cheap": 2, "dear": 2}  # 2 * 1 + 2 * 4 of 11; a third dear one would cost 14


def test_requests_that_are_just_being_read_are_no_reason_to_grow() -> None:
    policy = LatencyPolicy(config())
    settled = steady(policy, 200, 2.0, 8).total
    reading = tuple(report(index, 200.0, waiting=1) for index in range(settled))
    assert policy.decide(snapshot(200.0, settled, requests=2.0, reports=reading)).total == settled


def test_late_answers_raise_the_fleet_although_the_model_sees_no_need() -> None:
    def fleet(ratio: float | None) -> float:
        policy = LatencyPolicy(config())
        for second in range(300):
            decision = policy.decide(snapshot(float(second), 8, requests=2, ttft_over_limit=ratio))
        return decision.figures["load"]

    assert fleet(1.5) > 1.2 * fleet(0.5)
    assert fleet(0.5) == fleet(None)


def test_a_wrong_config_is_refused_with_what_to_do() -> None:
    ceiling = {"pools": [{"min_replicas": 3, "max_replicas": 4, "price_per_hour": 2}], "max_price_per_hour": 5}
    with pytest.raises(ConfigError, match="below what min_replicas cost"):
        parse(ScalingConfig, ceiling)
    with pytest.raises(ConfigError, match="share a name"):
        parse(ScalingConfig, {"pools": [{"name": "a"}, {"name": "a"}]})
    with pytest.raises(ConfigError, match="raise the latter"):
        parse(ScalingConfig, {"pools": [{"min_replicas": 2, "max_replicas": 1}]})


# --- its parts ------------------------------------------------------------------------------------------------------


def test_erlang_c_agrees_with_its_closed_forms() -> None:
    assert erlang_c(1, 0.6) == pytest.approx(0.6)  # M/M/1 waits with probability rho
    assert erlang_c(2, 1.0) == pytest.approx(1 / 3)
    assert erlang_c(5, 5.0) == 1.0


def test_one_server_waits_as_the_textbook_says() -> None:
    # M/M/1: P(W > t) = rho exp(-(1 - rho) t / s)
    assert wait_exceeds(1, 0.5, 2.0, 2.0, 3.0) == pytest.approx(0.5 * 2.718281828 ** (-0.5 * 3.0 / 2.0))


def test_fewer_replicas_than_answered_would_break_the_objective() -> None:
    mix = Mix(1000.0, 200.0)
    count = replicas_for(CAPACITY, 16, mix, OBJECTIVE, load=6.0, most=100)
    work_s = request_work_s(CAPACITY, 16, 1000.0, 200.0)
    slack_s = OBJECTIVE.ttft_limit_s(1000.0) - 1.8
    assert count > 6
    fewer_is_late = wait_exceeds(count - 1, 6.0, work_s, 2.0, slack_s) > 0.05
    assert fewer_is_late or seconds_per_token(CAPACITY, mix, 6.0 / work_s / (count - 1)) > OBJECTIVE.token_s


def test_the_capacity_of_a_replica_is_learned_from_its_counters() -> None:
    truth = Capacity(prompt_token_s=0.001, step_s=0.03, sequence_s=0.002)
    learner = CapacityLearner(Capacity(prompt_token_s=0.003, step_s=0.01, sequence_s=0.004))
    at_s = prompt = generated = 0.0
    for turn in range(1200):
        batch, tokens = 1 + turn % 13, 200.0 * (turn % 7)
        learner.observe(ReplicaReport("r", at_s, batch, 0, prompt, generated, 0))
        steps = 300
        at_s += tokens * truth.prompt_token_s + steps * (truth.step_s + batch * truth.sequence_s)
        prompt, generated = prompt + tokens, generated + steps * batch
        learner.observe(ReplicaReport("r", at_s, batch, 0, prompt, generated, 0))
        learner.forget(set())  # so that an interval never spans two batches
    learned = request_work_s(learner.capacity, 16, 1000, 200)
    assert learned == pytest.approx(request_work_s(truth, 16, 1000, 200), rel=0.06)


def test_an_idle_replica_teaches_nothing() -> None:
    learner = CapacityLearner(CAPACITY)
    for second in range(0, 600, 10):
        learner.observe(ReplicaReport("r", float(second), 0, 0, second * 1.0, second * 1.0, 0))
    assert learner.intervals == 0


def test_the_forecast_follows_a_ramp_and_a_daily_season() -> None:
    ramp = Forecast(60.0, None)
    for index in range(200):
        ramp.add(index * BIN_S, 1.0 + 0.1 * index)
    assert ramp.at(200 * BIN_S, 60.0) == pytest.approx(1.0 + 0.1 * 205, rel=0.03)

    season_s = 4000.0
    daily = Forecast(60.0, season_s)
    for index in range(1, 1 + 3 * 400):
        is_busy = (index * BIN_S - BIN_S / 2) % season_s < season_s / 2
        daily.add(index * BIN_S, 9.0 if is_busy else 1.0)
    before_rise = 3 * season_s - 40.0
    assert daily.at(before_rise, 200.0) > 4 * daily.at(before_rise, 0.0)


def test_the_forecast_errs_less_than_taking_the_last_bin_for_the_next_ones() -> None:
    chance, forecast = random.Random(7), Forecast(20.0, None)
    bins = [10 + 5 * math.sin(index / 60) + chance.gauss(0, 2) for index in range(600)]
    mine = last = 0.0
    for index, value in enumerate(bins[:-2]):
        forecast.add((index + 1) * BIN_S, value)
        if index >= 30:
            mine += (forecast.at((index + 1) * BIN_S, 20.0) - bins[index + 2]) ** 2
            last += (value - bins[index + 2]) ** 2
    assert mine < 0.75 * last
