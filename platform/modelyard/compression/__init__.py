"""Compression: a registered model and a recipe in, a smaller registered model and a report out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from modelyard.compression.recipe import Recipe

if TYPE_CHECKING:
    from modelyard.compression.pipeline import Compressed, compress

__all__ = ["Compressed", "Recipe", "compress"]


def __getattr__(name: str) -> Any:
    """`Compressed` and `compress` load on first use: they need torch, a recipe does not."""
    if name in ("Compressed", "compress"):
        from modelyard.compression import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
