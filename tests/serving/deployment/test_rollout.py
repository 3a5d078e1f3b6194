"""When a canary is withdrawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from modelyard.serving.deployment.rollout import Outcomes, RolloutLimits, verdict, wilson_lower
from modelyard.serving.deployment.routing import Share
from modelyard.serving.deployment.shares import ShareStore

LIMITS = RolloutLimits()
GOOD = Outcomes(1000, 2, [0.1] * 1000)


def test_a_few_calls_prove_nothing() -> None:
    assert verdict(Outcomes(19, 19), GOOD, LIMITS) is None


def test_a_canary_that_fails_goes_with_the_numbers() -> None:
    why = verdict(Outcomes(40, 12, [0.1] * 28), GOOD, LIMITS)
    assert why == "12 of 40 calls failed, against 2 of 1000 of the stable deployment"


def test_one_failure_in_fifty_is_bad_luck() -> None:
    assert verdict(Outcomes(50, 1, [0.1] * 49), GOOD, LIMITS) is None


def test_a_canary_that_fails_as_often_as_the_stable_one_stays() -> None:
    assert verdict(Outcomes(100, 20), Outcomes(1000, 210), LIMITS) is None


def test_a_slow_canary_goes_and_an_equal_one_stays() -> None:
    dice = np.random.default_rng(5)
    slow = Outcomes(60, 0, list(0.2 + 0.05 * dice.random(60)))
    why = verdict(slow, GOOD, LIMITS)
    assert why is not None
    assert "ms, against 100 ms" in why
    assert verdict(Outcomes(60, 0, [0.12] * 60), GOOD, LIMITS) is None


def test_a_healthy_canary_with_uneven_times_survives_a_look_every_second() -> None:
    dice = np.random.default_rng(3)
    gone = 0
    for _ in range(50):
        mine, theirs = dice.lognormal(-2, 0.6, 300), dice.lognormal(-2, 0.6, 300)
        looks = ((mine[:n], theirs[:n]) for n in range(20, 300, 20))
        gone += any(verdict(Outcomes(len(m), 0, m), Outcomes(len(t), 0, t), LIMITS) is not None for m, t in looks)
    assert gone == 0


def test_healthy_canaries_are_almost_never_withdrawn() -> None:
    dice = np.random.default_rng(7)
    gone = sum(verdict(Outcomes(200, int(dice.binomial(200, 0.01))), GOOD, LIMITS) is not None for _ in range(500))
    assert gone <= 5


def test_the_lower_bound_of_a_share_is_below_it_and_grows_with_the_calls() -> None:
    bounds = [wilson_lower(calls // 10, calls, 0.95) for calls in (10, 100, 1000, 10000)]
    assert bounds == sorted(bounds)
    assert bounds[-1] < 0.1


@pytest.fixture
def store(tmp_path: Path) -> ShareStore:
    return ShareStore(f"sqlite:///{tmp_path / 'gateway.db'}", clock=lambda: 1000.0)


def test_only_one_gateway_withdraws_a_canary(store: ShareStore) -> None:
    store.set_share("gpt--canary", Share(10))
    assert store.withdraw("gpt--canary", "it failed")
    assert not store.withdraw("gpt--canary", "it failed again")
    assert store.shares() == {"gpt--canary": Share(10, withdrawn="it failed")}
    store.set_share("gpt--canary", Share(20))
    assert store.shares()["gpt--canary"].withdrawn == "", "a share given anew is a new try"


def test_calls_before_the_share_was_given_and_outside_the_window_do_not_count(store: ShareStore) -> None:
    store.record([("gpt--canary", 700.0, True, None)], keep_s=10000.0)
    store.set_share("gpt--canary", Share(10))
    store.record([("gpt--canary", 1001.0, False, 0.3), ("gpt", 1002.0, True, None)], keep_s=10000.0)
    found = store.outcomes(["gpt--canary", "gpt"], window_s=500.0)
    assert found["gpt--canary"] == Outcomes(1, 0, [0.3])
    assert found["gpt"] == Outcomes(1, 1, [])
    store.forget("gpt--canary")
    assert store.shares() == {}
