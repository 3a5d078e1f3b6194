"""What a cascade can be told."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from modelyard.config import Config
from modelyard.errors import ModelyardError
from modelyard.serving.cascade.records import Calibration

_SITE = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"


class CascadeConfig(Config):
    """Two served models behind one name."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$")
    """What callers write into `model`."""
    small: str = Field(min_length=1)
    """Name of the served model that is asked first, at the site."""
    large: str = Field(min_length=1)
    """Name of the served model that is asked when the small one is unsure."""
    calibration: Calibration
    """In a file: the path of what `modelyard serve cascade calibrate` wrote. It is read with the config, so the nodes
    that serve need no such file."""
    threshold: float | None = Field(default=None, ge=0, le=1)
    """Instead of the calibrated one, and then without its promise; 0: always the small model, 1: always the large."""
    small_site: str = Field(default="site", pattern=_SITE)
    """Who answered, for the caller, where the backend does not say more."""
    large_site: str = Field(default="cloud", pattern=_SITE)
    """The same for the large model."""
    small_timeout_s: float = Field(default=30.0, gt=0)
    """The small model must have said by then what is decided on; else the large one is asked."""
    large_timeout_s: float = Field(default=30.0, gt=0)
    """The large model must have begun by then (be done, where the call is not streamed); else the site's answer
    stands."""
    large_pause_s: float = Field(default=10.0, ge=0)
    """After the large model could not be reached it is asked again no sooner than this, as long as the site answers."""

    @field_validator("calibration", mode="before")
    @classmethod
    def _from_file(cls, value: Any) -> Any:
        if not isinstance(value, str | Path):
            return value
        try:
            return Calibration.read(Path(value))
        except ModelyardError as error:
            raise ValueError(str(error)) from error

    @model_validator(mode="after")
    def _three_names(self) -> Self:
        if len({self.name, self.small, self.large}) < 3:
            raise ValueError(f"name={self.name!r}, small={self.small!r} and large={self.large!r} must be three names")
        return self

    @property
    def limit(self) -> float:
        """The threshold that counts."""
        return self.calibration.threshold if self.threshold is None else self.threshold
