"""Bootstrap intervals: they cover what they should, as often as they say."""

from __future__ import annotations

import time

import numpy as np
import pytest

from modelyard.tasks import ImageClassification
from modelyard.training.bootstrap import Interval, Stats, bootstrap, paired_bootstrap


def mean(stats: Stats) -> dict[str, float]:
    return {"mean": float(stats["x"].mean())}


def test_intervals_cover_the_true_mean_as_often_as_they_say() -> None:
    # 200 tries at 90 %: coverage below 0.82 or above 0.97 has odds under 1 in 1,000 for a true interval
    generator = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        rows = generator.exponential(5.0, size=200)
        covered += bootstrap(mean, {"x": rows}, samples=200, confidence=0.9, seed=seed)["mean"].holds(5.0)
    assert 0.82 <= covered / 200 <= 0.97


def test_the_width_is_that_of_the_central_limit_theorem() -> None:
    rows = np.random.default_rng(1).normal(0, 2.0, size=10_000)
    value, low, high = bootstrap(mean, {"x": rows}, samples=2000, confidence=0.95)["mean"]
    assert value == rows.mean()
    assert high - low == pytest.approx(2 * 1.96 * 2.0 / 100, rel=0.1)


def test_the_same_seed_gives_the_same_interval() -> None:
    stats = {"x": np.random.default_rng(0).normal(size=50)}
    assert bootstrap(mean, stats, seed=3) == bootstrap(mean, stats, seed=3) != bootstrap(mean, stats, seed=4)


def test_columns_of_a_row_stay_together() -> None:
    stats = {"x": np.arange(40.0), "y": -np.arange(40.0)}
    found = bootstrap(lambda s: {"sum": float((s["x"] + s["y"]).sum())}, stats, samples=50)
    assert found["sum"] == Interval(0.0, 0.0, 0.0)


def test_pairing_sees_a_small_difference_that_lies_within_both_intervals() -> None:
    generator = np.random.default_rng(0)
    hardness = generator.normal(10, 5, size=400)
    one, other = {"x": hardness}, {"x": hardness + 0.1 + generator.normal(0, 0.2, size=400)}
    alone = bootstrap(mean, one)["mean"], bootstrap(mean, other)["mean"]
    assert alone[0].high > alone[1].low
    difference = paired_bootstrap(mean, one, other)["mean"]
    assert difference.high < 0
    assert difference.holds(-0.1)


def test_a_model_against_itself_differs_by_nothing() -> None:
    stats = {"x": np.random.default_rng(0).normal(size=50)}
    assert paired_bootstrap(mean, stats, stats)["mean"] == Interval(0.0, 0.0, 0.0)


def test_no_resamples_leave_the_value_alone() -> None:
    assert bootstrap(mean, {"x": np.array([1.0, 3.0])}, samples=0) == {"mean": Interval(2.0, 2.0, 2.0)}


def test_a_thousand_resamples_of_fifty_thousand_rows_take_seconds() -> None:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 10, 50_000)
    stats = {"label": labels, "prediction": (labels + (generator.random(50_000) < 0.1)) % 10}
    stats["loss"] = generator.random(50_000, dtype=np.float32)
    started = time.process_time()
    found = bootstrap(ImageClassification().metrics, stats, samples=100)
    assert (time.process_time() - started) * 10 < 20
    assert found["accuracy"].holds(0.9)


def test_a_row_may_have_several_numbers_which_stay_together() -> None:
    stats = {"pair": np.array([[1, 10], [2, 20], [3, 30]]), "one": np.array([1, 2, 3])}

    def metrics(drawn: Stats) -> dict[str, float]:
        assert (drawn["pair"] == drawn["one"][:, None] * [1, 10]).all()
        return {"sum": float(drawn["pair"].sum())}

    assert bootstrap(metrics, stats, samples=20)["sum"].value == 66
