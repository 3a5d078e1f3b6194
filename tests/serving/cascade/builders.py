"""Calibrations and observations for tests of the cascade."""

from __future__ import annotations

from typing import Any

import numpy as np

from modelyard.artifacts import Parent
from modelyard.serving.cascade.calibration import Observations, calibrate
from modelyard.serving.cascade.records import Calibration, Score, Target

SMALL_DIGEST, LARGE_DIGEST = "sha256:" + "a" * 64, "sha256:" + "b" * 64
SMALL = Parent(reference="models:/small/1", digest=SMALL_DIGEST)
LARGE = Parent(reference="models:/large/1", digest=LARGE_DIGEST)
DATASET = Parent(reference="datasets:/rows/1", digest="sha256:" + "c" * 64)
PROBABILITY = Score(kind="probability")
DROP = Target(max_accuracy_drop=0.05)


def population(rows: int, seed: int) -> Observations:
    """Rows whose truth is known: confidence u is uniform, the small model is right with 1 - (1 - u)^2, the large with
    0.95, independently. So a threshold t sends the share t up, and its regret is 0.95 (1 - t)^3 / 3."""
    draw = np.random.default_rng(seed)
    confidence = draw.random(rows)
    return Observations(
        confidence=confidence,
        small_right=draw.random(rows) < 1 - (1 - confidence) ** 2,
        large_right=draw.random(rows) < 0.95,
        bytes_up=np.full(rows, 64.0),
        bytes_down=draw.integers(30, 50, rows).astype(np.float64),
    )


def true_regret(threshold: float) -> float:
    """Of `population`."""
    return 0.95 * (1 - threshold) ** 3 / 3


def calibration(observations: Observations | None = None, **changes: Any) -> Calibration:
    """Of `population` by default."""
    options: dict[str, Any] = {
        "score": PROBABILITY,
        "target": DROP,
        "small": SMALL,
        "large": LARGE,
        "dataset": DATASET,
        **changes,
    }
    return calibrate(population(1_000, 0) if observations is None else observations, **options)
