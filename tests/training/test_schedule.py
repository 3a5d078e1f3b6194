"""Learning rates: where each schedule starts, ends and bends."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelyard.training.config import Schedule
from modelyard.training.schedule import rate_factor

KINDS = ("cosine", "linear", "wsd", "constant")

steps = st.integers(2, 300)
shares = st.floats(0, 1)


def factors(max_steps: int, **fields: object) -> list[float]:
    schedule = Schedule.model_validate(fields)
    return [rate_factor(schedule, step, max_steps) for step in range(max_steps)]


@pytest.mark.parametrize("kind", KINDS)
def test_warm_up_is_a_straight_line_from_one_part_to_the_peak(kind: str) -> None:
    assert factors(20, kind=kind, warmup_steps=4)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize(("warmup", "max_steps"), [(0, 10), (3, 10), (8, 10), (0, 1000)])
def test_the_last_step_has_the_final_share_of_the_peak(kind: str, warmup: int, max_steps: int) -> None:
    last = factors(max_steps, kind=kind, warmup_steps=warmup, final_share=0.05)[-1]
    assert last == pytest.approx(0.05)


def test_a_constant_rate_stays_at_the_peak() -> None:
    assert set(factors(50, kind="constant", warmup_steps=5)[4:]) == {1.0}


def test_half_way_cosine_and_linear_are_in_the_middle() -> None:
    assert factors(101, kind="cosine", final_share=0)[50] == pytest.approx(0.5)
    assert factors(101, kind="linear", final_share=0)[50] == pytest.approx(0.5)
    assert factors(101, kind="cosine", final_share=0)[25] == pytest.approx(0.5 + 0.5 * 2**-0.5)


def test_wsd_is_stable_until_its_share_of_the_run_begins() -> None:
    values = factors(100, kind="wsd", warmup_steps=10, decay_share=0.3, final_share=0)
    assert set(values[9:71]) == {1.0}
    assert values[71] < 1.0
    assert values[85] == pytest.approx(14 / 29)


def test_wsd_whose_decay_would_begin_in_the_warm_up_decays_right_after_it() -> None:
    values = factors(10, kind="wsd", warmup_steps=6, decay_share=1.0, final_share=0)
    assert values[5:7] == [1.0, 1.0]
    assert values[7:] == pytest.approx([2 / 3, 1 / 3, 0])


@settings(deadline=None)
@given(st.sampled_from(KINDS), steps, shares, shares, st.floats(0.01, 1))
def test_every_rate_rises_while_warming_up_then_never_rises_and_stays_in_bounds(
    kind: str, max_steps: int, warm: float, final: float, decay: float
) -> None:
    warmup = int(warm * (max_steps - 1))
    values = factors(max_steps, kind=kind, warmup_steps=warmup, final_share=final, decay_share=decay)
    assert all(low < high for low, high in itertools.pairwise(values[:warmup]))
    assert all(low >= high - 1e-12 for low, high in itertools.pairwise(values[warmup:]))
    assert all(0 < value <= 1 for value in values[:warmup])
    assert all(final - 1e-12 <= value <= 1 for value in values[warmup:])


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_of_one_step_has_a_rate_above_zero(kind: str) -> None:
    assert factors(1, kind=kind, final_share=0) == [1.0]
