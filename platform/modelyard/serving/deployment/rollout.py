"""Whether a canary stays: a comparison with the stable deployment over the calls of the last minutes. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from pydantic import Field
from scipy.stats import mannwhitneyu

from modelyard.config import Config


class RolloutLimits(Config):
    """What makes a canary go."""

    window_s: float = Field(default=300.0, gt=0)
    """Only calls of the last so many seconds count."""
    min_calls: int = Field(default=20, gt=0)
    """Calls of the canary before anything is concluded."""
    max_error_share: float = Field(default=0.02, ge=0, le=1)
    """Share of failed calls that is always fine."""
    max_latency_ratio: float = Field(default=1.5, gt=1)
    """Time to the first token, over the stable deployment's."""
    confidence: float = Field(default=0.99, gt=0.5, lt=1)
    """How sure each look must be that the canary fails more often, or is slower by more than that. There is a look
    every second, so that a low one withdraws a healthy canary sooner or later."""


@dataclass(frozen=True)
class Outcomes:
    """Calls that one deployment answered."""

    calls: int = 0
    errors: int = 0
    """Failures of the deployment; a caller's own mistakes and his leaving are none."""
    first_token_s: Sequence[float] = field(default_factory=tuple)


def verdict(canary: Outcomes, stable: Outcomes, limits: RolloutLimits) -> str | None:
    """Why the canary should be withdrawn, in numbers; None while there is no reason.

    Error shares are compared by the lower end of the Wilson score interval (Wilson 1927), which does not jump at the
    first failed call of a few; times by ranks (Mann and Whitney 1947), which a few slow calls do not move.
    """
    if canary.calls < limits.min_calls:
        return None
    lower = wilson_lower(canary.errors, canary.calls, limits.confidence)
    normal = max(limits.max_error_share, stable.errors / stable.calls if stable.calls else 0.0)
    if lower > normal:
        return (
            f"{canary.errors} of {canary.calls} calls failed, against {stable.errors} of {stable.calls} of the stable "
            f"deployment"
        )
    if min(len(canary.first_token_s), len(stable.first_token_s)) >= limits.min_calls:
        mine, theirs = float(np.median(canary.first_token_s)), float(np.median(stable.first_token_s))
        allowed = limits.max_latency_ratio * np.asarray(stable.first_token_s)
        if mannwhitneyu(canary.first_token_s, allowed, alternative="greater").pvalue < 1 - limits.confidence:
            return (
                f"the median time to the first token is {mine * 1000:.0f} ms, against {theirs * 1000:.0f} ms of the "
                f"stable deployment (limit: {limits.max_latency_ratio:g} times)"
            )
    return None


def wilson_lower(hits: int, calls: int, confidence: float) -> float:
    """Lower end of the one-sided Wilson score interval of a share."""
    from statistics import NormalDist

    z = NormalDist().inv_cdf(confidence)
    share = hits / calls
    centre = share + z * z / (2 * calls)
    spread = z * math.sqrt(share * (1 - share) / calls + z * z / (4 * calls * calls))
    return float(max(0.0, (centre - spread) / (1 + z * z / calls)))
