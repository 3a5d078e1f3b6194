"""The arithmetic of limits: no window ever holds more than its limit, and the waits that are told are true."""

from __future__ import annotations

import datetime as dt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelyard.serving.gateway import limits
from modelyard.serving.gateway.limits import Window

moment = st.builds(lambda minute, quarters: 60 * minute + quarters / 4, st.integers(0, 3), st.integers(0, 12))
moments = st.lists(moment, min_size=2, max_size=80).map(sorted)  # crowded around whole minutes, where windows end
uses = st.lists(st.integers(1, 12), min_size=80, max_size=80)
windows = st.builds(Window, st.integers(1, 200) | st.integers(1, 12), st.just("minute"))


@given(windows, moments, uses)
def test_no_sixty_seconds_hold_more_than_the_limit(window: Window, times: list[float], needed: list[int]) -> None:
    slots: dict[int, int] = {}
    granted: list[tuple[float, int]] = []
    for at, units in zip(times, needed, strict=False):
        found = limits.grant(window, slots, at, units)
        if found is not None:
            slots = limits.changed(limits.live(window, slots, at), {found.slot: found.units})
            granted.append((at, found.units))
    for start, _ in granted:
        assert sum(units for at, units in granted if start <= at < start + 60) <= window.limit


@given(windows, moments, uses, st.integers(1, 200))
def test_who_waits_as_told_is_let_in_and_not_much_too_late(
    window: Window, times: list[float], used: list[int], needed: int
) -> None:
    slots: dict[int, int] = {}
    for at, units in zip(times, used, strict=False):
        slots = limits.changed(slots, {limits.slot_of(window, at): units})
    now = times[-1]
    wait = limits.wait_s(window, slots, now, needed)
    if wait is None:
        assert needed > window.limit
        return
    assert limits.grant(window, slots, now + wait, needed) is not None
    if wait > 1:
        assert limits.grant(window, slots, now + wait - 1, needed) is None


@given(windows, st.floats(0, 1e9), st.integers(1, 200))
def test_a_grant_gives_what_is_needed_and_at_most_a_slice_more(window: Window, now: float, needed: int) -> None:
    found = limits.grant(window, {}, now, needed)
    assert (found is None) == (needed > window.limit)
    if found is not None:
        assert needed <= found.units <= min(window.limit, max(needed, window.slice_units))
        assert found.remaining == window.limit - found.units


@given(windows, st.integers(0, 100), st.integers(0, 200), st.integers(0, 200))
def test_what_is_given_back_can_be_used_again(window: Window, slot: int, taken: int, back: int) -> None:
    left = limits.changed({slot: taken}, {slot: -back})
    assert left[slot] == max(0, taken - back)


def test_a_quota_of_a_day_begins_anew_at_midnight_and_of_a_month_on_the_first() -> None:
    late = dt.datetime(2026, 12, 31, 23, 59, 50, tzinfo=dt.UTC).timestamp()
    for period in ("day", "month"):
        window = Window(10, period)  # type: ignore[arg-type]
        slots = {limits.slot_of(window, late): 10}
        assert limits.grant(window, slots, late, 1) is None
        assert limits.wait_s(window, slots, late, 1) == 10.0
        assert limits.grant(window, slots, late + 10, 1) is not None
    december = limits.slot_of(Window(1, "month"), late)
    assert december == dt.datetime(2026, 12, 1, tzinfo=dt.UTC).timestamp()


def test_use_in_a_slot_of_the_future_counts() -> None:
    assert limits.grant(Window(5, "minute"), {103: 5}, 100.0, 1) is None


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (0.0201, "21ms"), (1, "1s"), (59.2, "1m0s"), (362, "6m2s"), (3_600, "1h0m0s")]
)
def test_durations_read_as_openais(seconds: float, text: str) -> None:
    assert limits.as_duration(seconds) == text


def test_the_estimate_of_a_prompt_is_above_what_english_needs() -> None:
    text = "The quick brown fox jumps over the lazy dog. " * 20
    assert limits.estimate_tokens(len(text.encode()), 1) > len(text.split()) * 1.3
