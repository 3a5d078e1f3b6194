"""How much may be used: counting in windows, as pure arithmetic.

A minute is counted in slots of a second and slides: what was used in second `s` counts against every moment up to
`s + 60`. So no sixty seconds, wherever they begin, hold more than the limit; a token bucket would let nearly twice as
much through, and a fixed minute twice as much around its end. Days and months are one slot each and follow the
calendar in UTC, as bills do.

Replicas do not ask the shared store for every request: they lease a slice (`Window.slice_units`), spend it within the
second in which it was counted, and give the rest back.
"""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

MINUTE_S = 60
LEASE_S = 1.0
"""A slice not spent by then goes back."""
_PARTS = {"minute": 60, "day": 1_440, "month": 1_440}

Slots = Mapping[int, int]
"""What was used: slot (its first second, Unix time) -> units. Replicas that settle late make a slot change later."""


@dataclass(frozen=True)
class Window:
    """At most `limit` units in every period."""

    limit: int
    period: Literal["minute", "day", "month"]

    @property
    def slice_units(self) -> int:
        """What a replica leases ahead at most: what the limit allows in a second, or in a minute of a day."""
        return self.limit // _PARTS[self.period]


@dataclass(frozen=True)
class Grant:
    """What the store gave: `units`, counted in `slot`; `remaining` units are left to everyone."""

    units: int
    slot: int
    remaining: int
    reset_s: float
    """Seconds until nothing counts any more."""


def slot_of(window: Window, now_s: float) -> int:
    """The slot in which a use at `now_s` counts."""
    if window.period == "minute":
        return math.floor(now_s)
    now = dt.datetime.fromtimestamp(now_s, dt.UTC)
    first = now.replace(hour=0, minute=0, second=0, microsecond=0)
    return int((first if window.period == "day" else first.replace(day=1)).timestamp())


def end_of(window: Window, slot: int) -> int:
    """The moment (Unix time) from which on `slot` counts no more."""
    if window.period == "minute":
        return slot + MINUTE_S + 1  # units are spent until the end of their slot
    start = dt.datetime.fromtimestamp(slot, dt.UTC)
    if window.period == "day":
        return int((start + dt.timedelta(days=1)).timestamp())
    return int((start + dt.timedelta(days=32)).replace(day=1).timestamp())


def live(window: Window, slots: Slots, now_s: float) -> dict[int, int]:
    """The slots that still count. One of the future does: another replica's clock may be ahead."""
    return {slot: units for slot, units in slots.items() if units > 0 and end_of(window, slot) > now_s}


def changed(slots: Slots, changes: Slots) -> dict[int, int]:
    """`slots` with units given back (negative) or used beyond a grant (positive); never below zero."""
    result = dict(slots)
    for slot, units in changes.items():
        result[slot] = max(0, result.get(slot, 0) + units)
    return result


def grant(window: Window, slots: Slots, now_s: float, needed: int) -> Grant | None:
    """`needed` units and, where there is room, up to a slice; None when `needed` do not fit now."""
    counted = live(window, slots, now_s)
    room = window.limit - sum(counted.values())
    if needed > room:
        return None
    units = min(max(needed, window.slice_units), room)
    slot = slot_of(window, now_s)
    return Grant(units, slot, room - units, reset_s(window, changed(counted, {slot: units}), now_s))


def reset_s(window: Window, slots: Slots, now_s: float) -> float:
    """Seconds until nothing that was used counts any more."""
    return max((end_of(window, slot) - now_s for slot in live(window, slots, now_s)), default=0.0)


def wait_s(window: Window, slots: Slots, now_s: float, needed: int) -> float | None:
    """Seconds until `needed` units fit if nobody else uses any; None when they never will."""
    if needed > window.limit:
        return None
    counted = live(window, slots, now_s)
    excess = sum(counted.values()) + needed - window.limit
    wait = 0.0
    for slot in sorted(counted):
        if excess <= 0:
            break
        excess -= counted[slot]
        wait = end_of(window, slot) - now_s
    return wait


def estimate_tokens(text_bytes: int, num_messages: int) -> int:
    """Prompt tokens to reserve before a tokenizer has seen it: rather more than fewer (a token has 4 bytes in English).

    The difference to the real usage is settled when the call ends.
    """
    return math.ceil(text_bytes / 3) + 4 * num_messages + 2


def as_duration(seconds: float) -> str:
    """Seconds as OpenAI's rate-limit headers write them: `0s`, `850ms`, `6m2s`, `1h0m0s`."""
    if seconds <= 0:
        return "0s"
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    whole = math.ceil(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return (f"{hours}h" if hours else "") + (f"{minutes}m" if whole >= 60 else "") + f"{whole % 60}s"
