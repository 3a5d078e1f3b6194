"""Thresholds: what is promised on one half of the rows holds for calls to come, as often as is said."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.serving.cascade.builders import (
    DROP,
    LARGE_DIGEST,
    SMALL_DIGEST,
    calibration,
    population,
    true_regret,
)

from modelyard.errors import ConfigError, DataError, IntegrityError, NotFoundError
from modelyard.serving.cascade.calibration import (
    Observations,
    allowed_count,
    calibration_error,
    choose_threshold,
    curve,
    figures_at,
    fit_temperature,
    lower_bound,
    upper_bound,
)
from modelyard.serving.cascade.confidence import keeps, of_logprobs, softened
from modelyard.serving.cascade.picture import draw_curve
from modelyard.serving.cascade.records import Calibration, Score, Target

SEEDS = 400
SLACK = 3 * math.sqrt(0.1 * 0.9 / SEEDS)
"""Three standard deviations of the share of broken promises; the tests fail by chance once in 700 sets of seeds."""


def test_the_accuracy_drop_is_kept_as_often_as_promised() -> None:
    target = Target(max_accuracy_drop=0.05, confidence=0.9)
    regrets = [true_regret(choose_threshold(population(400, seed), target)) for seed in range(SEEDS)]
    assert np.mean([regret > 0.05 for regret in regrets]) <= 0.1 + SLACK
    assert np.mean(regrets) > 0.025  # and the bound is used, not run away from


def test_the_share_sent_up_is_kept_as_often_as_promised() -> None:
    target = Target(max_share_up=0.3, confidence=0.9)
    shares = [choose_threshold(population(400, seed), target) for seed in range(SEEDS)]
    assert np.mean([share > 0.3 for share in shares]) <= 0.1 + SLACK
    assert np.mean(shares) > 0.25


def test_the_accuracy_falls_by_no_more_than_the_regret() -> None:
    rows = population(5_000, 1)
    large = figures_at(rows, 1.0).accuracy
    assert all(large - point.accuracy <= point.regret + 1e-12 for point in curve(rows))


def test_the_other_half_does_not_refute_the_promise() -> None:
    found = [calibration(population(1_000, seed), seed=seed) for seed in range(40)]
    assert sum(each.is_refuted for each in found) <= 2  # 40 halves, each refuting with far less than 5 %
    assert all(each.proof.low <= each.proof.figures.regret <= each.proof.high for each in found)


def test_threshold_0_is_the_small_model_alone_and_1_the_large() -> None:
    rows = population(500, 2)
    first, last = curve(rows)[0], curve(rows)[-1]
    assert (first.threshold, first.accuracy, first.share_up) == (0.0, rows.small_right.mean(), 0.0)
    assert (last.threshold, last.accuracy, last.share_up) == (1.0, rows.large_right.mean(), 1.0)
    assert (first.bytes_up, last.bytes_up) == (0.0, 64.0)
    assert last.bytes_down == pytest.approx(rows.bytes_down.mean())
    assert keeps(0.0, 0.0)
    assert not keeps(1.0, 1.0)


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_a_higher_threshold_sends_more_up_and_regrets_less(rows: list[tuple[float, bool, bool]]) -> None:
    confidence, small, large = (np.array(column) for column in zip(*rows, strict=True))
    ones = np.ones(len(rows))
    points = curve(Observations(confidence.astype(np.float64), small, large, ones, ones), points=10)
    shares, regrets = [point.share_up for point in points], [point.regret for point in points]
    assert shares == sorted(shares)
    assert regrets == sorted(regrets, reverse=True)
    assert (shares[0], shares[-1], regrets[-1]) == (0.0, 1.0, 0.0)


@given(
    st.lists(st.tuples(st.sampled_from([0.0, 0.2, 0.5, 1.0]), st.booleans()), min_size=30, max_size=80),
    st.sampled_from([Target(max_accuracy_drop=0.2), Target(max_share_up=0.4)]),
)
def test_equal_confidences_stay_or_go_together_within_what_is_allowed(
    rows: list[tuple[float, bool]], target: Target
) -> None:
    confidence, small = (np.array(column) for column in zip(*rows, strict=True))
    ones = np.ones(len(rows))
    seen = Observations(confidence.astype(np.float64), small, np.ones(len(rows), dtype=np.bool_), ones, ones)
    point = figures_at(seen, choose_threshold(seen, target))
    events = point.regret if target.max_accuracy_drop else point.share_up
    assert round(events * len(rows)) <= allowed_count(len(rows), target.bound, 0.05)


def test_bounds_are_those_of_clopper_and_pearson() -> None:
    assert upper_bound(0, 59, 0.05) == pytest.approx(1 - 0.05 ** (1 / 59))
    assert (lower_bound(0, 59, 0.05), upper_bound(59, 59, 0.05)) == (0.0, 1.0)
    assert upper_bound(3, 100, 0.05) == pytest.approx(0.0757, abs=1e-4)  # their table
    assert (allowed_count(59, 0.05, 0.05), allowed_count(58, 0.05, 0.05)) == (0, -1)


def test_rows_that_can_show_nothing_are_refused_with_how_many_it_takes() -> None:
    with pytest.raises(DataError, match="takes 299"):
        calibration(population(500, 0), target=Target(max_accuracy_drop=0.01))


def test_a_temperature_makes_overconfident_probabilities_true_and_keeps_their_order() -> None:
    draw = np.random.default_rng(0)
    true = draw.uniform(0.5, 1, 4_000)
    right = draw.random(4_000) < true
    shown = np.array([softened(value, 1 / 3) for value in true])
    temperature = fit_temperature(shown, right)
    assert temperature == pytest.approx(3, rel=0.1)
    better = np.array([softened(value, temperature) for value in shown])
    assert calibration_error(better, right) < 0.03 < calibration_error(shown, right)
    assert np.all(np.diff(better[np.argsort(shown)]) >= 0)


def test_confidence_in_a_text_is_a_mean_or_a_quantile_of_its_tokens_probabilities() -> None:
    logprobs = [math.log(p) for p in (0.9, 0.5, 0.8)]
    assert of_logprobs(Score(kind="mean_logprob"), logprobs) == pytest.approx((0.9 * 0.5 * 0.8) ** (1 / 3))
    assert of_logprobs(Score(kind="quantile_logprob"), logprobs) == pytest.approx(0.5)
    assert of_logprobs(Score(kind="quantile_logprob", quantile=0.5), logprobs) == pytest.approx(0.8)
    assert of_logprobs(Score(kind="quantile_logprob", first_tokens=1), logprobs) == pytest.approx(0.9)
    assert of_logprobs(Score(kind="mean_logprob"), []) == 0.0
    assert of_logprobs(Score(kind="quantile_logprob", quantile=0.5), [-math.inf, 0.0]) == 0.0


def test_a_longer_answer_of_equally_sure_tokens_is_as_sure() -> None:
    score = Score(kind="mean_logprob")
    assert of_logprobs(score, [-0.1] * 50) == pytest.approx(of_logprobs(score, [-0.1]))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"kind": "mean_logprob", "quantile": 0.5}, "quantile=0.5 does nothing"),
        ({"kind": "probability", "first_tokens": 4}, "first_tokens=4 does nothing"),
        ({"kind": "quantile_logprob", "quantile": 1.5}, "less than or equal to 1"),
    ],
)
def test_a_score_with_a_field_that_does_nothing_is_refused(fields: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Score.model_validate(fields)


@pytest.mark.parametrize("fields", [{}, {"max_accuracy_drop": 0.1, "max_share_up": 0.1}, {"max_share_up": 1.0}])
def test_a_target_is_one_bound_between_0_and_1(fields: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"one of them|less than 1"):
        Target.model_validate(fields)


@pytest.mark.parametrize("confidence", [[0.5, 1.5], [0.5, math.nan], [0.5]])
def test_observations_that_cannot_be_are_refused(confidence: list[float]) -> None:
    two, right = np.ones(2), np.ones(2, dtype=np.bool_)
    with pytest.raises(DataError):
        Observations(np.array(confidence), right, right, two, two)


def test_a_calibration_comes_back_from_its_file_as_it_was(tmp_path: Path) -> None:
    made = calibration()
    made.write(tmp_path / "deep" / "cascade.json")
    assert Calibration.read(tmp_path / "deep" / "cascade.json") == made


def test_a_calibration_is_refused_for_models_of_other_digests() -> None:
    made = calibration()
    made.require(SMALL_DIGEST, LARGE_DIGEST)
    for digests in ((LARGE_DIGEST, LARGE_DIGEST), (SMALL_DIGEST, SMALL_DIGEST)):
        with pytest.raises(ConfigError, match=r"calibration was made with the (small|large) model"):
            made.require(*digests)


def test_a_calibration_is_refused_for_another_engine() -> None:
    made = calibration(small_engine="openvino")
    made.require(SMALL_DIGEST, LARGE_DIGEST, "openvino")
    with pytest.raises(ConfigError, match="made with the engine openvino, the small model runs on transformers"):
        made.require(SMALL_DIGEST, LARGE_DIGEST, "transformers")


def test_files_that_hold_no_calibration_are_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no calibration"):
        Calibration.read(tmp_path / "none.json")
    damaged = tmp_path / "damaged.json"
    damaged.write_text("{")
    with pytest.raises(IntegrityError):
        Calibration.read(damaged)
    damaged.write_text('{"threshold": 2}')
    with pytest.raises(ConfigError, match="threshold"):
        Calibration.read(damaged)


def test_the_curve_is_drawn(tmp_path: Path) -> None:
    assert draw_curve(calibration(), tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_the_target_decides_which_bound_is_proven() -> None:
    by_drop, by_share = calibration(target=DROP), calibration(target=Target(max_share_up=0.2))
    assert by_drop.proof.low <= by_drop.proof.figures.regret <= by_drop.proof.high
    assert by_share.proof.low <= by_share.proof.figures.share_up <= by_share.proof.high
    assert by_share.proof.figures.share_up > 0.1
