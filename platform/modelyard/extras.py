"""Packages that only some installations have."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from modelyard.errors import MissingExtraError

_NOISY = ("torchao", "torch.utils._pytree", "nncf", "torch.onnx", "onnxscript", "onnx_ir")


def optional(module: str, package: str, extra: str) -> Any:
    """Import `module`, without the noise that some packages make.

    Raises:
        MissingExtraError: `package`, which `modelyard[extra]` installs, is not there.
    """
    try:
        with quiet():
            return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise  # it is there, and something that it needs is not
        raise MissingExtraError(package, extra) from None


@contextmanager
def quiet() -> Iterator[None]:
    """Only errors from packages that report on every import and every layer."""
    loggers = [logging.getLogger(name) for name in _NOISY]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
