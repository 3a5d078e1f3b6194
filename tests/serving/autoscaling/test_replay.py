"""The replay: nothing is lost, time is what the model says, and no policy beats the clairvoyant bound."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.serving.autoscaling.builders import CAPACITY, MODEL, OBJECTIVE, config, pool

from modelyard.errors import DataError, ModelyardError
from modelyard.serving.autoscaling.baselines import Fixed, Ours, Planned, QueueScaler, ServeDefault
from modelyard.serving.autoscaling.clairvoyant import lower_bound
from modelyard.serving.autoscaling.model import Snapshot
from modelyard.serving.autoscaling.replay import Controller, Outcome, Replay
from modelyard.serving.autoscaling.traces import Burst, Generator, Request, Trace, read_azure

SHORT = Generator(
    duration_s=400.0, requests_per_s=2.0, swing=0.5, cycle_s=400.0, bursts=(Burst(at_s=200.0, requests=40),), seed=3
).trace()


def run(trace: Trace, controller: Controller, initial: int = 4) -> Outcome:
    return Replay(trace, controller, {"pool": MODEL}, {"pool": initial}, OBJECTIVE).run()


class Jumpy:
    """Another number of replicas at each decision."""

    period_s = 7.0
    reads_reports = False

    def __init__(self, numbers: list[int]) -> None:
        self.numbers, self.turn = numbers, 0

    def decide(self, snapshot: Snapshot) -> dict[str, int]:
        self.turn += 1
        return {"pool": self.numbers[self.turn % len(self.numbers)]}


@given(st.lists(st.integers(1, 12), min_size=1, max_size=8), st.integers(0, 20))
@settings(max_examples=15, deadline=None)
def test_every_request_is_answered_once_and_in_order_however_the_fleet_jumps(numbers: list[int], seed: int) -> None:
    trace = Generator(duration_s=120.0, requests_per_s=2.0, seed=seed).trace()
    outcome = run(trace, Jumpy(numbers))
    assert [one.request for one in outcome.served] == list(trace.requests)
    for one in outcome.served:
        assert one.request.arrival_s <= one.taken_s <= one.first_s <= one.end_s
        assert one.ttft_s >= one.request.prompt_tokens * CAPACITY.prompt_token_s - 1e-6
        assert one.token_s >= CAPACITY.step_s + CAPACITY.sequence_s - 1e-6


def test_a_request_alone_takes_what_the_steps_take() -> None:
    trace = Trace("one", (Request(0.0, 640, 100),))
    one = run(trace, Fixed(1), 1).served[0]
    assert one.first_s == pytest.approx(640 * CAPACITY.prompt_token_s + 10 * CAPACITY.step_s)
    assert one.token_s == pytest.approx(CAPACITY.step_s + CAPACITY.sequence_s)


def test_a_fixed_fleet_pays_for_the_time_of_the_trace() -> None:
    assert run(SHORT, Fixed(6), 6).replica_hours == pytest.approx(6 * SHORT.duration_s / 3600)


def test_a_replica_answers_only_after_its_cold_start() -> None:
    trace = Trace("two", (Request(0.0, 10, 10), Request(60.0, 10, 10)))
    first = run(trace, Fixed(1), 0).served[0]
    assert first.taken_s == pytest.approx(MODEL.cold_start_s)


@pytest.mark.parametrize(
    "controller",
    [
        Fixed(30),
        Ours(config(pool(max_replicas=60))),
        ServeDefault(1, 60, target_ongoing_requests=1),
        QueueScaler(1, 60, 1.0),
        Planned([30] * 401, "pool", 10.0),
    ],
    ids=lambda one: type(one).__name__,
)
def test_no_policy_without_a_miss_needs_less_than_the_clairvoyant_bound(controller: Controller) -> None:
    initial = 30
    outcome = run(SHORT, controller, initial)
    missed = outcome.missed_share(OBJECTIVE)
    bound = lower_bound(SHORT, MODEL, OBJECTIVE, initial=initial, min_replicas=1, missed_share=missed)
    assert outcome.replica_hours >= bound.replica_hours
    if isinstance(controller, Fixed | Planned):
        assert missed == 0  # so that the bound without a miss is tested too


def test_what_happens_before_the_time_that_counts_is_not_counted() -> None:
    counted = Replay(SHORT, Fixed(6), {"pool": MODEL}, {"pool": 6}, OBJECTIVE, from_s=300.0).run()
    assert counted.replica_hours == pytest.approx(6 * (SHORT.duration_s - 300.0) / 3600)
    assert [one.request for one in counted.served] == [one for one in SHORT.requests if one.arrival_s >= 300.0]


def test_the_bound_with_a_free_start_is_below_any_start() -> None:
    free = lower_bound(SHORT, MODEL, OBJECTIVE, initial=None, min_replicas=1).replica_hours
    for initial in (0, 5, 30):
        try:
            given_start = lower_bound(SHORT, MODEL, OBJECTIVE, initial=initial, min_replicas=1).replica_hours
        except ModelyardError:  # no fleet from so few could keep every objective
            continue
        assert free <= given_start + 1e-9


def test_missing_more_may_cost_less() -> None:
    strict = lower_bound(SHORT, MODEL, OBJECTIVE, initial=10, min_replicas=1)
    lenient = lower_bound(SHORT, MODEL, OBJECTIVE, initial=10, min_replicas=1, missed_share=0.05)
    assert lenient.replica_hours < strict.replica_hours


def test_serves_default_waits_half_a_minute_before_it_grows() -> None:
    trace = Trace("flood", tuple(Request(index / 4, 300, 50) for index in range(400)))
    targets = run(trace, ServeDefault(1, 20), 1).targets
    first_change_s = targets[1][0]
    assert 30.0 <= first_change_s <= 50.0
    assert run(trace, Ours(config(pool())), 1).targets[1][0] <= 5.0


def test_ours_misses_less_than_serves_default_at_no_more_replica_hours() -> None:
    trace = Generator(duration_s=800.0, requests_per_s=3.0, swing=0.7, cycle_s=800.0, seed=5).trace()
    ours = run(trace, Ours(config(pool())), 3)
    theirs = run(trace, ServeDefault(1, 50, target_ongoing_requests=9), 3)
    assert ours.replica_hours <= theirs.replica_hours
    assert ours.missed_share(OBJECTIVE) <= 0.5 * theirs.missed_share(OBJECTIVE)


def test_the_reader_gives_seconds_and_tokens(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:17:03.9799600,4808,10\n"
        "2023-11-16 18:17:05.0319600,3180,8\n"
    )
    first, second = read_azure(path).requests
    assert first == Request(0.0, 4808, 10)
    assert second.arrival_s == pytest.approx(1.052)


def test_the_reader_names_the_line_it_cannot_read(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,2\n")
    with pytest.raises(DataError, match="line 2"):
        read_azure(path)
    with pytest.raises(DataError, match=r"none\.csv"):
        read_azure(tmp_path / "none.csv")


def test_the_same_seed_gives_the_same_trace_with_its_bursts() -> None:
    generator = Generator(duration_s=60.0, bursts=(Burst(at_s=10.0, requests=30, over_s=2.0),), seed=1)
    assert generator.trace() == generator.trace()
    inside = [one for one in generator.trace().requests if 10.0 <= one.arrival_s < 12.0]
    assert len(inside) >= 30
