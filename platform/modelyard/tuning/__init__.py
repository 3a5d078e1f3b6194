"""Tuning: a search over any field of a training config, one registered best model out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from modelyard.tuning.config import StudyConfig

if TYPE_CHECKING:
    from modelyard.tuning.launch import Study, resume, tune

__all__ = ["Study", "StudyConfig", "resume", "tune"]


def __getattr__(name: str) -> Any:
    """`Study`, `resume` and `tune` load on first use: they need torch and Ray, a config does not."""
    if name in ("Study", "resume", "tune"):
        from modelyard.tuning import launch

        return getattr(launch, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
