"""How the workers of a gang agree after a step, also while some of them are already ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from modelyard.training.gang import Gang

T = TypeVar("T")


@dataclass(frozen=True)
class Verdict:
    """What the gang agreed on; the same on every worker."""

    interrupt: str | None = None
    """Why the gang has to be started anew."""
    stop: bool = False
    save: bool = False

    @property
    def asks_for_something(self) -> bool:
        """Whether training does not just go on."""
        return self.interrupt is not None or self.stop or self.save

    def __or__(self, other: Verdict) -> Verdict:
        return Verdict(self.interrupt or other.interrupt, self.stop or other.stop, self.save or other.save)


class Agreements(Generic[T]):
    """Sums over all workers, each read `spread` steps after it was begun: by then every worker has come so far.

    All methods are collective: every worker calls them after the same steps.
    """

    def __init__(self, gang: Gang, spread: int) -> None:
        self._gang, self._spread = gang, spread
        self._pending: deque[tuple[int, T, Callable[[], list[float]]]] = deque()

    def begin(self, step: int, note: T, values: Sequence[float]) -> None:
        """Tell the others `values` after `step` steps; `note` comes back with their sum."""
        self._pending.append((step, note, self._gang.begin_sum(values)))

    def due(self, step: int, *, everything: bool = False) -> Iterator[tuple[T, list[float]]]:
        """Notes and sums that are due after `step` steps, oldest first; with `everything`, all that were begun."""
        while self._pending and (everything or self._pending[0][0] <= step - self._spread):
            _, note, total = self._pending.popleft()
            yield note, total()
