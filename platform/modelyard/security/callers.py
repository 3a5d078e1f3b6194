"""Who calls, as plain data: what a key or a token turns into once it is proved."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Work = Literal["generate", "embed", "predict"]
"""What can be asked of a model: text, vectors, or an answer of another task."""

ALL_WORK: tuple[Work, ...] = ("embed", "generate", "predict")


@dataclass(frozen=True, kw_only=True)
class Caller:
    """A proved caller and the bounds of what it may do."""

    subject: str
    """The name that limits and the audit log count by, unique over keys and issuers: `key:4f1c...`."""
    tenant: str
    name: str = ""
    """What people call it; no secret."""
    models: tuple[str, ...] = ("*",)
    """Globs over model names."""
    within: tuple[str, ...] = ("*",)
    """Globs that a model must match as well: the bounds of who vouched for the caller."""
    work: tuple[Work, ...] = ALL_WORK
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    site: str | None = None
    """Where it is at home; a router prefers that site."""
    expires_s: float | None = None
    """Unix time at which the proof ends."""

    def may_see(self, model: str) -> bool:
        """Whether the caller may know of `model`."""
        return _matches(model, self.models) and _matches(model, self.within)

    def may_do(self, work: Work) -> bool:
        """Whether the caller may ask for this kind of work."""
        return work in self.work

    def visible(self, models: Iterable[str]) -> list[str]:
        """Those of `models` the caller may use, sorted."""
        return sorted(name for name in models if self.may_see(name))


def _matches(name: str, globs: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, glob) for glob in globs)
