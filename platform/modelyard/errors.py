"""Every exception Modelyard raises on purpose.

    ModelyardError
    ├── InputError            the user can fix it: a config, a file, a name
    │   ├── ConfigError           a field of a config: field, value, limit
    │   ├── DataError             a corpus, a dataset or a shard cannot be used
    │   ├── NotFoundError         a reference or a path names nothing
    │   ├── CapacityError         the cluster can never hold what was asked
    │   └── MissingExtraError     an optional package is not installed
    ├── IntegrityError        bytes are not what they should be; nothing was read from them
    │   └── UnsafeFileError       a file could run code when it is read
    ├── StorageError          a disk or an object store refused: full, unreachable, denied
    │   └── UnreachableError      an object store does not answer now; it may later
    ├── StartError            Ray did not start on this machine
    ├── LeaseLostError        the scheduler took a job's lease away: cancelled, or not heard for too long
    ├── AccessError           who calls is unknown, or may not do this
    ├── OverloadedError       too many calls wait; says when to come back
    ├── UnavailableError      nothing that serves a model is running now
    ├── LimitError            a compressed model is worse than its recipe allows; it was not registered
    └── TrainingError         a run failed on its workers
        ├── DivergedError         the loss is no longer a number
        └── WaitTimeoutError      something did not happen in time; names the setting

Callers need three names at most: `InputError` (tell the user), `StorageError` (try again later) and
`ModelyardError` for the rest. Every error carries its text in `args`, so it survives `pickle` between processes.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ModelyardError(Exception):
    """Base of every Modelyard error: what is wrong, and what to do about it."""

    def __init__(self, problem: str, todo: str = "") -> None:
        super().__init__(problem, todo)
        self.problem = problem
        self.todo = todo

    def __str__(self) -> str:
        return f"{self.problem}\n  -> {self.todo}" if self.todo else self.problem


class InputError(ModelyardError):
    """Something the user gave is wrong, and no work was lost."""


class ConfigError(InputError):
    """A config field has a value it cannot have, or does not exist."""


class DataError(InputError):
    """A corpus, a dataset or one of its shards cannot be used."""


class NotFoundError(InputError):
    """A reference, a name or a path names nothing."""


class CapacityError(InputError):
    """The cluster can never hold what was asked, so waiting would not help."""


class MissingExtraError(InputError):
    """An optional package is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"this needs the package {package!r}", f"pip install 'modelyard[{extra}]'")
        self.args = (package, extra)


class IntegrityError(ModelyardError):
    """Stored bytes are not those that were written."""


class UnsafeFileError(IntegrityError):
    """A file could run code when it is read (a pickle), so it is refused unread."""


class StorageError(ModelyardError):
    """A disk or an object store refused: full, unreachable, denied."""


class UnreachableError(StorageError):
    """An object store does not answer now; it may later."""


class StartError(ModelyardError):
    """Ray did not start on this machine."""


class LeaseLostError(ModelyardError):
    """The scheduler took a job's lease away: it was cancelled, or its driver was not heard for too long."""


class AccessError(ModelyardError):
    """Who calls is unknown, or may not do this."""


class OverloadedError(ModelyardError):
    """Too many calls wait already."""

    def __init__(self, problem: str, retry_after_s: float) -> None:
        super().__init__(problem, f"try again in {retry_after_s:g} s")
        self.args = (problem, retry_after_s)
        self.retry_after_s = retry_after_s


class UnavailableError(ModelyardError):
    """Nothing that serves a model is running now."""


class LimitError(ModelyardError):
    """A compressed model is worse than its recipe allows, so it was not registered."""


class TrainingError(ModelyardError):
    """A run failed on its workers."""


class DivergedError(TrainingError):
    """The loss is no longer a finite number."""


class WaitTimeoutError(TrainingError):
    """Something did not happen in time."""

    def __init__(self, waited_for: str, seconds: float, setting: str) -> None:
        super().__init__(f"waited {seconds:g} s for {waited_for}", f"if it only needs longer, raise {setting}")
        self.args = (waited_for, seconds, setting)


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a misspelt name: the nearest known one, else the whole list."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known: {', '.join(names)}" if names else "there are none"
