"""Learning rate as a pure function of the step, so that resuming needs no scheduler state."""

from __future__ import annotations

import math

from modelyard.training.config import Schedule


def rate_factor(schedule: Schedule, step: int, max_steps: int) -> float:
    """Factor on the peak learning rate for optimizer step `step` (0-based) of `max_steps`.

    Cosine: Loshchilov and Hutter 2017 (SGDR, one cycle). WSD: Hu et al. 2024 (MiniCPM).
    """
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    if schedule.kind == "constant":
        return 1.0
    first, last = schedule.warmup_steps, max(max_steps - 1, schedule.warmup_steps + 1)
    if schedule.kind == "wsd":
        first = max(first, round(max_steps * (1 - schedule.decay_share)))
        last = max(last, first + 1)
    progress = min(max((step - first) / (last - first), 0.0), 1.0)
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if schedule.kind == "cosine" else 1 - progress
    return schedule.final_share + (1 - schedule.final_share) * shape
