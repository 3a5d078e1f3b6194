"""Libraries that talk while they work."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from modelyard.extras import quiet

_TALKING_TO_ROOT = "onnxruntime"
"""Logs by the root logger, so only the file that a record comes from tells whose it is."""
_SET_THEIR_LEVEL = ("DeepSpeed", "ray.serve")
"""Loggers that get their level, and their handler, when they are first used: a filter stays."""


@contextmanager
def errors_only() -> Iterator[None]:
    """No progress bars, and of log lines only errors, from the libraries that steps use."""
    from rich import get_console

    root, console = logging.getLogger(), get_console()
    handlers, was_quiet = list(root.handlers), console.quiet
    with ExitStack() as stack:
        stack.enter_context(quiet())
        root.addFilter(_no_chatter)
        stack.callback(root.removeFilter, _no_chatter)
        stack.callback(_restore, root, handlers)  # the first line to a root logger without handlers gives it one
        for logger in map(logging.getLogger, _SET_THEIR_LEVEL):
            logger.addFilter(_is_error)
            stack.callback(logger.removeFilter, _is_error)
        console.quiet = True  # where NNCF draws its bars
        stack.callback(setattr, console, "quiet", was_quiet)
        yield


def _no_chatter(record: logging.LogRecord) -> bool:
    return _TALKING_TO_ROOT not in record.pathname or _is_error(record)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def _restore(logger: logging.Logger, handlers: list[logging.Handler]) -> None:
    logger.handlers[:] = handlers
