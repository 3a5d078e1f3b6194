"""Choose a cascade's threshold on one half of held-out rows, and prove it on the other.

What is promised is monotone in the threshold: the lower it is, the more wrong answers stay at the site; the higher, the
more calls go up. So the threshold may be moved as long as an exact binomial bound allows, and the promise holds with
the stated probability for any distribution that the rows and the calls to come share (Bates et al. 2021,
"Distribution-Free, Risk-Controlling Prediction Sets"; it is fixed-sequence testing in Angelopoulos et al. 2021, "Learn
then Test"). It says nothing of calls that are unlike the rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import optimize, stats

from modelyard.artifacts.manifest import Parent
from modelyard.errors import DataError
from modelyard.serving.cascade.confidence import keeps, softened
from modelyard.serving.cascade.records import Calibration, Figures, Proof, Score, Target

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
_TEMPERATURES = (0.05, 20.0)
_BINS = 10
_CURVE_POINTS = 40
_LEAST = math.nextafter(0.0, 1.0)
"""A threshold that answers of confidence 0 do not pass; at 0 itself all do."""


@dataclass(frozen=True)
class Observations:
    """Both models on the same labelled rows; all arrays are (n,)."""

    confidence: FloatArray
    """The small model's, 0 to 1; for the score `probability` before any temperature."""
    small_right: BoolArray
    large_right: BoolArray
    bytes_up: FloatArray
    """What sending the row up costs."""
    bytes_down: FloatArray

    def __post_init__(self) -> None:
        arrays: dict[str, npt.NDArray[Any]] = dict(vars(self))
        sizes = {name: array.shape for name, array in arrays.items()}
        if len(set(sizes.values())) != 1 or self.confidence.ndim != 1:
            raise DataError(f"observations differ in shape: {sizes}", "give one value of each for every row")
        if not np.all((self.confidence >= 0) & (self.confidence <= 1)):
            raise DataError("a confidence is outside 0..1, or no number")

    def __len__(self) -> int:
        return len(self.confidence)

    def take(self, rows: npt.NDArray[np.int64]) -> Observations:
        """Some of the rows."""
        return Observations(**{name: array[rows] for name, array in vars(self).items()})

    def softened(self, temperature: float) -> Observations:
        """With calibrated probabilities as confidence."""
        values = np.array([softened(value, temperature) for value in self.confidence.tolist()], dtype=np.float64)
        return replace(self, confidence=values)


def calibrate(
    observations: Observations,
    *,
    score: Score,
    target: Target,
    small: Parent,
    large: Parent,
    dataset: Parent,
    split: str = "",
    small_engine: str = "",
    seed: int = 0,
) -> Calibration:
    """A threshold for two models.

    Args:
        observations: held-out rows, independent of each other and like the calls to come.
        score: how their confidence was taken.
        target: what is to be promised.
        small: the model at the site.
        large: the model in the cloud.
        dataset: where the rows are from.
        split: which split of it.
        small_engine: what the small model ran on.
        seed: halves the rows.

    Raises:
        DataError: half of the rows are too few for the target.
    """
    order = np.random.default_rng(seed).permutation(len(observations))
    half = len(order) // 2
    chosen_on, others = observations.take(order[:half]), observations.take(order[half:])
    require_rows(half, target)
    raw = others
    temperature = 1.0
    if score.kind == "probability":
        temperature = fit_temperature(chosen_on.confidence, chosen_on.small_right)
        chosen_on, others = chosen_on.softened(temperature), others.softened(temperature)
    threshold = choose_threshold(chosen_on, target)
    proof = prove(others, threshold, target)
    if score.kind == "probability":
        proof = proof.with_changes(
            calibration_error=calibration_error(others.confidence, others.small_right),
            calibration_error_raw=calibration_error(raw.confidence, raw.small_right),
        )
    return Calibration(
        small=small,
        large=large,
        dataset=dataset,
        split=split,
        small_engine=small_engine,
        seed=seed,
        score=score,
        temperature=temperature,
        target=target,
        threshold=threshold,
        rows=half,
        proof=proof,
        curve=curve(others),
    )


def require_rows(rows: int, target: Target) -> None:
    """Refuse rows that cannot show the target even when none of them speaks against it.

    Raises:
        DataError: says how many are needed.
    """
    needed = math.ceil(math.log(1 - target.confidence) / math.log(1 - target.bound))
    if rows < needed:
        raise DataError(
            f"{rows} rows cannot show a bound of {target.bound:g} with confidence {target.confidence:g}; "
            f"that takes {needed}, and as many again for the proof",
            "give more rows, a larger bound or a lower confidence",
        )


def choose_threshold(observations: Observations, target: Target) -> float:
    """The threshold that keeps the target's bound: the lowest for a drop of accuracy, the highest for a share.

    Raises:
        DataError: the rows are too few.
    """
    rows = len(observations)
    require_rows(rows, target)
    allowed = allowed_count(rows, target.bound, 1 - target.confidence)
    if target.max_accuracy_drop is not None:
        bad = observations.large_right & ~observations.small_right
        surest = np.sort(observations.confidence[bad])[::-1]
        return max(float(surest[allowed]), _LEAST) if len(surest) > allowed else 0.0
    ordered = np.sort(observations.confidence)
    if allowed >= rows:
        return 1.0
    below = ordered[:allowed][ordered[:allowed] < ordered[allowed]]  # of equal ones, all go or none
    return float(below[-1]) if len(below) else 0.0


def prove(observations: Observations, threshold: float, target: Target) -> Proof:
    """A threshold on rows that had no part in choosing it."""
    rows, doubt = len(observations), 1 - target.confidence
    figures = figures_at(observations, threshold)
    promised = figures.regret if target.max_accuracy_drop is not None else figures.share_up
    kept = rows - round(figures.share_up * rows)
    wrong = round((figures.kept_error or 0.0) * kept)
    count = round(promised * rows)
    return Proof(
        rows=rows,
        figures=figures,
        accuracy_small=float(observations.small_right.mean()),
        accuracy_large=float(observations.large_right.mean()),
        low=lower_bound(count, rows, doubt),
        high=upper_bound(count, rows, doubt),
        kept_error_high=upper_bound(wrong, kept, doubt),
    )


def figures_at(observations: Observations, threshold: float) -> Figures:
    """What a cascade with this threshold does on these rows."""
    kept = np.array([keeps(value, threshold) for value in observations.confidence.tolist()], dtype=np.bool_)
    small, large = observations.small_right, observations.large_right
    return Figures(
        threshold=threshold,
        accuracy=float(np.where(kept, small, large).mean()),
        share_up=float((~kept).mean()),
        bytes_up=float(np.where(kept, 0.0, observations.bytes_up).mean()),
        bytes_down=float(np.where(kept, 0.0, observations.bytes_down).mean()),
        regret=float((kept & large & ~small).mean()),
        kept_error=float((~small[kept]).mean()) if kept.any() else None,
    )


def curve(observations: Observations, points: int = _CURVE_POINTS) -> tuple[Figures, ...]:
    """From all small (threshold 0) to all large (1), at equal steps of the share that goes up."""
    between = np.quantile(observations.confidence, np.linspace(0, 1, points + 1), method="lower")
    thresholds = sorted({0.0, 1.0, *between.tolist()})
    return tuple(figures_at(observations, threshold) for threshold in thresholds)


def allowed_count(rows: int, bound: float, doubt: float) -> int:
    """The most events among `rows` that still show, at level `doubt`, that their share is at most `bound`; or -1."""
    count = int(stats.binom.ppf(doubt, rows, bound))
    return count if stats.binom.cdf(count, rows, bound) <= doubt else count - 1


def upper_bound(count: int, rows: int, doubt: float) -> float:
    """The share of events is below this with probability 1 - `doubt` (Clopper and Pearson 1934)."""
    return 1.0 if count >= rows else float(stats.beta.ppf(1 - doubt, count + 1, rows - count))


def lower_bound(count: int, rows: int, doubt: float) -> float:
    """The share of events is above this with probability 1 - `doubt`."""
    return 0.0 if count == 0 else float(stats.beta.ppf(doubt, count, rows - count + 1))


def fit_temperature(probability: FloatArray, right: BoolArray) -> float:
    """The temperature at which the probabilities say best how often the answers (n,) are right (least log loss).

    It keeps their order, so a threshold may be chosen on the same rows.
    """
    inside = np.clip(probability, 1e-9, 1 - 1e-9)
    odds = np.log(inside / (1 - inside))
    signed = np.where(right, odds, -odds)

    def loss(log_temperature: float) -> float:
        return float(np.logaddexp(0.0, -signed / math.exp(log_temperature)).mean())

    low, high = (math.log(value) for value in _TEMPERATURES)
    return math.exp(float(optimize.minimize_scalar(loss, bounds=(low, high), method="bounded").x))


def calibration_error(confidence: FloatArray, right: BoolArray) -> float:
    """Expected calibration error over equal bins (Naeini et al. 2015)."""
    bins = np.minimum((confidence * _BINS).astype(np.int64), _BINS - 1)
    gaps = np.bincount(bins, weights=confidence - right.astype(np.float64), minlength=_BINS)
    return float(np.abs(gaps).sum() / len(confidence))
