"""What a calibration found, as the JSON file that a cascade is configured with."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from modelyard.artifacts.manifest import Parent
from modelyard.config import Config, parse
from modelyard.errors import ConfigError, IntegrityError, NotFoundError, StorageError


class Score(Config):
    """What is taken for a model's confidence in its answer; 0 to 1."""

    kind: Literal["probability", "mean_logprob", "quantile_logprob"]
    """`probability`: of the predicted class, calibrated (classifiers). `mean_logprob`: the geometric mean of the
    tokens' probabilities, so that long answers do not count as unsure. `quantile_logprob`: the `quantile` of the
    tokens' probabilities (Gupta et al. 2024, "Language Model Cascades: Token-level uncertainty and beyond")."""
    quantile: float = Field(default=0.0, ge=0, le=1)
    """For `quantile_logprob`: 0 is the least likely token of the answer, 0.5 the middle one."""
    first_tokens: int | None = Field(default=None, gt=0)
    """Decide after so many tokens of a text; None: when the answer is complete."""

    @model_validator(mode="after")
    def _only_where_it_counts(self) -> Self:
        if self.quantile and self.kind != "quantile_logprob":
            raise ValueError(f"quantile={self.quantile:g} does nothing for {self.kind}; take kind: quantile_logprob")
        if self.first_tokens is not None and not self.is_text:
            raise ValueError(f"first_tokens={self.first_tokens} does nothing for probability, which is of a class")
        return self

    @property
    def is_text(self) -> bool:
        """Whether it is a score of generated text."""
        return self.kind != "probability"


class Target(Config):
    """What is promised of a cascade: exactly one of two bounds, and how surely it holds."""

    max_accuracy_drop: float | None = Field(default=None, gt=0, lt=1)
    """Share of calls that the cloud would have answered rightly and the site answers wrongly; the accuracy falls by
    no more than that. The fewest calls that keep it are sent up."""
    max_share_up: float | None = Field(default=None, gt=0, lt=1)
    """Share of calls sent up; as many as that allows are."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    """Probability, over the rows of the calibration, that the bound holds for calls to come."""

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.max_accuracy_drop is None) == (self.max_share_up is None):
            raise ValueError("give max_accuracy_drop or max_share_up, one of them")
        return self

    @property
    def bound(self) -> float:
        """The promised bound."""
        found = self.max_accuracy_drop if self.max_accuracy_drop is not None else self.max_share_up
        assert found is not None
        return found


class Figures(Config):
    """A cascade at one threshold, on the rows it was measured on."""

    threshold: float
    accuracy: float
    """Share of right answers, whoever gave them."""
    share_up: float
    """Share of calls sent up."""
    bytes_up: float
    """Bytes sent up, mean over all calls: inputs or prompts, without framing."""
    bytes_down: float
    """Bytes that came back, mean over all calls."""
    regret: float
    """Share of calls that were answered wrongly at the site and would have been right in the cloud."""
    kept_error: float | None
    """Share of wrong answers among those of the site; None when it gave none."""


class Proof(Config):
    """The chosen threshold on rows that had no part in choosing it."""

    rows: int
    figures: Figures
    accuracy_small: float
    accuracy_large: float
    low: float
    """Lower end of the exact (Clopper-Pearson) interval of what was promised."""
    high: float
    """Its upper end; each end holds with the target's confidence."""
    kept_error_high: float
    """Upper end for the share of wrong answers among those of the site."""
    calibration_error: float | None = None
    """Mean gap between confidence and accuracy (expected calibration error, 10 equal bins), for `probability`."""
    calibration_error_raw: float | None = None
    """The same without temperature."""


class Calibration(Config):
    """A threshold, for two models of these digests, with where it comes from."""

    format_version: Literal[1] = 1
    created_at: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    """ISO time in UTC."""
    small: Parent
    large: Parent
    small_engine: str = ""
    """What the small model ran on; another engine rounds otherwise and is sure of other answers. Empty: any."""
    dataset: Parent
    """The held-out rows; neither model was trained on them."""
    split: str = ""
    """The rows' split of the dataset."""
    seed: int
    """What the rows were halved by."""
    score: Score
    temperature: float = Field(default=1.0, gt=0)
    """Divides the log odds of a class's probability (Guo et al. 2017, "On Calibration of Modern Neural Networks")."""
    target: Target
    threshold: float = Field(ge=0, le=1)
    """An answer stays when its confidence is above; at 0 all stay, at 1 all go up."""
    rows: int
    """Rows it was chosen on."""
    proof: Proof
    """On the other half."""
    curve: tuple[Figures, ...]
    """The trade on the other half, from all small to all large."""

    @property
    def is_refuted(self) -> bool:
        """Whether the other half speaks against the promise: even the lower end of its interval is above the bound."""
        return self.proof.low > self.target.bound

    def require(self, small_digest: str, large_digest: str, small_engine: str = "") -> None:
        """Refuse to be used for other models, or for the small one on another engine.

        Raises:
            ConfigError: a digest or the engine is another one.
        """
        for which, known, given in (("small", self.small, small_digest), ("large", self.large, large_digest)):
            if known.digest != given:
                raise ConfigError(
                    f"the calibration was made with the {which} model {known.reference} ({_short(known.digest)}), "
                    f"not with {_short(given)}",
                    "calibrate these two models: modelyard serve cascade calibrate SMALL LARGE",
                )
        if self.small_engine and small_engine and self.small_engine != small_engine:
            raise ConfigError(
                f"the calibration was made with the engine {self.small_engine}, the small model runs on {small_engine}",
                f"calibrate with --engine {small_engine}, or serve it with `engine: {self.small_engine}`",
            )

    def write(self, path: Path) -> None:
        """Save as JSON.

        Raises:
            StorageError: the file cannot be written.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(self.model_dump(mode="json"), indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise StorageError(f"{str(path)!r} cannot be written: {error}") from error

    @classmethod
    def read(cls, path: Path) -> Calibration:
        """What `write` wrote.

        Raises:
            NotFoundError: there is no such file.
            IntegrityError: it holds no JSON.
            ConfigError: the JSON is no calibration.
        """
        try:
            data: Any = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            todo = "make one: modelyard serve cascade calibrate SMALL LARGE"
            raise NotFoundError(f"there is no calibration {str(path)!r}", todo) from None
        except (OSError, ValueError) as error:
            raise IntegrityError(f"{str(path)!r} holds no calibration: {error}", "calibrate again") from error
        return parse(cls, data if isinstance(data, dict) else {}, str(path))


def _short(digest: str) -> str:
    return digest[:19]
