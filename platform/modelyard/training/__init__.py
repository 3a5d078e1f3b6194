"""Training: one config in, one registered model out, on as many workers as the cluster holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from modelyard.training.config import TrainConfig

if TYPE_CHECKING:
    from modelyard.training.launch import Run, train

__all__ = ["Run", "TrainConfig", "train"]


def __getattr__(name: str) -> Any:
    """`Run` and `train` load on first use: they need torch and Ray, a config does not."""
    if name in ("Run", "train"):
        from modelyard.training import launch

        return getattr(launch, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
