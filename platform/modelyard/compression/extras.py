"""Packages that only some installations have, without the noise that their imports make."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from modelyard.errors import MissingExtraError

EXTRA = "compression"
_LOGGERS = ("torchao", "torch.utils._pytree", "nncf", "torch.onnx", "onnxscript", "onnx_ir")


def package(root: str, distribution: str, module: str = "") -> Any:
    """Import `root.module`.

    Raises:
        MissingExtraError: `distribution` is not installed.
    """
    try:
        with quiet():
            return importlib.import_module(f"{root}.{module}" if module else root)
    except ModuleNotFoundError as error:
        if error.name != root:
            raise  # it is there, and something that it needs is not
        raise MissingExtraError(distribution, EXTRA) from None


@contextmanager
def quiet() -> Iterator[None]:
    """Only errors from packages that report on every import and every layer."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
