"""What a preparation tells its caller while it works."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple


class Progress(NamedTuple):
    """One step of the preparation, as it goes on and once when it is done."""

    step: str
    """`read`, `deduplicate`, `split`, `tokenizer`, `pack`, `store`."""
    done: int
    """Units finished; the step is over when this equals `total`."""
    total: int
    counts: Mapping[str, int]
    """What the step counted, e.g. `{"documents": 812, "too_short": 3}`; complete when the step is over."""


OnProgress = Callable[[Progress], None]


def finished(step: str, **counts: int) -> Progress:
    """The last report of a step."""
    return Progress(step, 1, 1, counts)
