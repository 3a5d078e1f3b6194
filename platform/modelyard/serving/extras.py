"""Packages that only some installations have."""

from __future__ import annotations

import importlib
from typing import Any

from modelyard.errors import MissingExtraError


def optional(module: str, package: str, extra: str) -> Any:
    """Import `module`.

    Raises:
        MissingExtraError: `package`, which `modelyard[extra]` installs, is not there.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise  # it is there, and something that it needs is not
        raise MissingExtraError(package, extra) from None
