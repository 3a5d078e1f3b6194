"""What is learned of a job's speed, and the batch size that follows from it."""

from __future__ import annotations

import pytest

from modelyard.errors import ConfigError
from modelyard.scheduling.performance import (
    BatchLimits,
    GradientNoise,
    Learner,
    Observation,
    StepTime,
    best_batch,
    fit,
)

TRUTH = StepTime(0.05, 0.001, 0.10, 0.010, 0.04, 0.004, 1.5)
LIMITS = BatchLimits(base=64, most=4096, least_per_worker=16, most_per_worker=256)
NOISE = GradientNoise(sqr=1.0, var=8.0)


def seen(nodes: int, workers: int, batch: int = 64, truth: StepTime = TRUTH) -> Observation:
    step = float(truth.step(nodes, workers, batch))
    return Observation(nodes, workers, batch, step, step - float(truth.compute(batch)))


def test_the_fit_predicts_configurations_it_has_not_seen():
    model = fit([seen(1, 1, 32), seen(1, 1, 128), seen(1, 2), seen(1, 4), seen(2, 8), seen(4, 16)])
    for nodes, workers, batch in [(1, 8, 64), (3, 12, 128), (8, 32, 64)]:
        assert float(model.step(nodes, workers, batch)) == pytest.approx(
            float(TRUTH.step(nodes, workers, batch)), rel=0.08
        )


def test_what_was_never_measured_is_taken_to_cost_nothing():
    model = fit([seen(1, 1)])
    assert float(model.step(1, 4, 64)) == pytest.approx(float(model.step(1, 1, 64)), rel=1e-3)
    assert float(model.step(1, 4, 64)) < float(TRUTH.step(1, 4, 64))


def test_crossing_nodes_is_taken_to_cost_more_than_what_links_were_seen_to_cost():
    model = fit([seen(1, 1), seen(1, 4), seen(1, 2)])
    assert float(model.step(2, 4, 64)) > float(model.step(1, 4, 64))


def test_a_fit_of_nothing_says_what_to_do():
    with pytest.raises(ConfigError, match="at least one observation"):
        fit([])


def test_a_step_that_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="sync_s < step_s"):
        Observation(1, 1, 8, 0.1, 0.2)


def test_noise_makes_larger_batches_worth_more():
    assert float(GradientNoise(1, 8).gain(4)) == pytest.approx(9 / 3)
    assert float(GradientNoise(1, 1000).gain(4)) == pytest.approx(4, rel=0.01)
    assert float(GradientNoise(1, 0).gain(4)) == pytest.approx(1)


def test_the_batch_grows_with_the_workers_and_with_the_noise():
    one, many = (best_batch(TRUTH, NOISE, LIMITS, workers, -(-workers // 4)) for workers in (1, 8))
    assert many.total(8) > one.total(1)
    calm, noisy = (best_batch(TRUTH, GradientNoise(1, var), LIMITS, 8, 2).total(8) for var in (1, 100))
    assert noisy > calm
    assert best_batch(TRUTH, NOISE, LIMITS, 8, 2).per_worker <= LIMITS.most_per_worker


def test_no_batch_fits_more_workers_than_samples():
    assert best_batch(TRUTH, NOISE, LIMITS, 512, 64).goodput == 0


def learner() -> Learner:
    return Learner({"fast": LIMITS, "slow": LIMITS}, {"fast": 1000.0, "slow": 250.0})


def test_before_any_run_only_one_worker_and_the_ratio_of_accelerators_are_known():
    speed = learner().speed
    assert speed.goodput("fast", 1, 1) == pytest.approx(4 * speed.goodput("slow", 1, 1))
    assert speed.goodput("fast", 2, 1) == 0


def test_a_run_teaches_its_accelerator_and_by_ratio_the_others():
    job = learner()
    job.observe("fast", seen(1, 1), NOISE)
    assert job.speed.goodput("slow", 1, 1) == pytest.approx(job.speed.goodput("fast", 1, 1) / 4)
    assert job.speed.goodput("fast", 2, 1) > job.speed.goodput("fast", 1, 1)
    assert job.speed.goodput("fast", 5, 1) == 0, "at most four times what was measured"


def test_what_was_given_out_does_not_change_when_more_is_learned():
    job = learner()
    job.observe("fast", seen(1, 1), NOISE)
    before = job.speed
    job.observe("fast", seen(1, 2), NOISE)
    after = job.speed
    assert before.goodput("fast", 8, 1) == 0 < after.goodput("fast", 8, 1)
    assert after.goodput("fast", 2, 1) < before.goodput("fast", 2, 1), "the first guess was optimistic"


def test_an_accelerator_without_a_speed_is_refused():
    with pytest.raises(ConfigError, match="slow"):
        Learner({"slow": LIMITS}, {})
