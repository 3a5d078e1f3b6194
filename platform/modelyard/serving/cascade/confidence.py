"""How sure a model is of an answer, 0 to 1."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from modelyard.errors import ConfigError
from modelyard.serving.cascade.records import Score

_EDGE = 1e-9
"""Probabilities are kept so far from 0 and 1, where log odds are infinite."""


def keeps(confidence: float, threshold: float) -> bool:
    """Whether an answer stays at the site. At threshold 0 all do, at 1 none does."""
    return threshold <= 0 or confidence > threshold


def softened(probability: float, temperature: float) -> float:
    """A class's probability with its log odds divided by `temperature`.

    The log odds of the likeliest class against the rest are scaled, so the order of answers stays as it is; scaling all
    scores of a network (Guo et al. 2017) differs from it a little when there are more than two classes.
    """
    inside = min(max(probability, _EDGE), 1 - _EDGE)
    return 1 / (1 + math.exp(-math.log(inside / (1 - inside)) / temperature))


def raw_probability(answer: Any) -> float:
    """The probability that a classifier gives the class it answers with.

    Raises:
        ConfigError: the answer holds none.
    """
    value = answer.get("probability") if isinstance(answer, Mapping) else None
    if not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ConfigError(
            "the small model's answers have no `probability`, so a cascade cannot tell how sure it is",
            "take a model of the task image_classification",
        )
    return float(value)


def of_logprobs(score: Score, logprobs: Sequence[float]) -> float:
    """The confidence in a text, from its tokens' log probabilities in nats; 0 when there are none."""
    counted = [min(value, 0.0) for value in logprobs[: score.first_tokens]]
    if not counted or any(math.isnan(value) for value in counted):
        return 0.0
    if score.kind == "mean_logprob":
        return math.exp(sum(counted) / len(counted))
    return math.exp(_quantile(sorted(counted), score.quantile))


def _quantile(ordered: Sequence[float], share: float) -> float:
    """Linear between neighbours; ends may be minus infinity."""
    place = share * (len(ordered) - 1)
    low, part = ordered[math.floor(place)], place - math.floor(place)
    return low if not part else low + part * (ordered[math.floor(place) + 1] - low) if low > -math.inf else low
