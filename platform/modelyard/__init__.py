"""Modelyard: train, evaluate and register large models on one Ray cluster of unlike machines.

Public names load on first use, so `import modelyard` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from modelyard.training import Run, TrainConfig, train

_HOMES = {
    "Run": "modelyard.training",
    "TrainConfig": "modelyard.training",
    "train": "modelyard.training",
}

__all__ = ["Run", "TrainConfig", "__version__", "train"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'modelyard' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
