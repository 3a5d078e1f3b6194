"""Which models are in memory: the longest idle one makes room, a busy one never does."""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from modelyard.errors import CapacityError, OverloadedError


class Resident(Protocol):
    """Something that takes memory until it is closed."""

    async def close(self) -> None: ...


@dataclass(eq=False)
class _Seat:
    size_bytes: int
    model: asyncio.Task[Resident]
    users: int = 0

    @property
    def failed(self) -> bool:
        """Whether loading ended without a model."""
        return self.model.done() and (self.model.cancelled() or self.model.exception() is not None)


class Residents:
    """Loaded models by name, least recently used first; used by one event loop."""

    def __init__(self, budget_bytes: int | None, room_timeout_s: float) -> None:
        """Nothing is loaded yet. `budget_bytes` None: no limit."""
        self._budget_bytes = budget_bytes
        self._room_timeout_s = room_timeout_s
        self._seats: OrderedDict[str, _Seat] = OrderedDict()
        self._changed = asyncio.Condition()

    @property
    def names(self) -> tuple[str, ...]:
        """Loaded or loading, least recently used first."""
        return tuple(self._seats)

    @property
    def used_bytes(self) -> int:
        """What they take together."""
        return sum(seat.size_bytes for seat in self._seats.values())

    def room(self, size_bytes: int) -> bool:
        """Whether a further model would fit without anything being unloaded."""
        return self._budget_bytes is None or self.used_bytes + size_bytes <= self._budget_bytes

    def loaded(self, name: str) -> Resident | None:
        """The model if it is in memory now; it may be gone after the next await unless `use` holds it."""
        seat = self._seats.get(name)
        return seat.model.result() if seat is not None and seat.model.done() and not seat.failed else None

    @contextlib.asynccontextmanager
    async def use(self, name: str, size_bytes: int, load: Callable[[], Awaitable[Resident]]) -> AsyncIterator[Resident]:
        """The model, loaded if it must be; while it is used it stays.

        Raises:
            CapacityError: it is larger than the whole budget.
            OverloadedError: the others were busy for `room_timeout_s`.
            whatever `load` raises.
        """
        if self._budget_bytes is not None and size_bytes > self._budget_bytes:
            raise CapacityError(
                f"model {name!r} needs {size_bytes >> 20} MiB, memory_mib is {self._budget_bytes >> 20}",
                "raise memory_mib, or lower the model's cache_mib",
            )
        if (known := self._seats.get(name)) is not None and known.failed:
            del self._seats[name]  # nobody waited for it any more: this call tries again
        seat = self._seats.get(name) or await self._seat(name, size_bytes, load)
        seat.users += 1
        self._seats.move_to_end(name)
        try:
            # shielded: others may wait for the same model, and a half-loaded one helps nobody
            yield await asyncio.shield(seat.model)
        finally:
            seat.users -= 1
            if seat.failed and self._seats.get(name) is seat:
                del self._seats[name]
            async with self._changed:
                self._changed.notify_all()

    async def close(self) -> None:
        """Unload everything, busy or not; what is still loading is waited for first."""
        seats, self._seats = list(self._seats.values()), OrderedDict()
        for seat in seats:
            await _unload(seat)

    async def _seat(self, name: str, size_bytes: int, load: Callable[[], Awaitable[Resident]]) -> _Seat:
        try:
            async with asyncio.timeout(self._room_timeout_s), self._changed:
                while name not in self._seats and not self.room(size_bytes):
                    idle = next((n for n, seat in self._seats.items() if not seat.users and seat.model.done()), None)
                    if idle is None:
                        await self._changed.wait()
                    else:
                        await _unload(self._seats.pop(idle))
                if name not in self._seats:

                    async def loading() -> Resident:
                        return await load()

                    self._seats[name] = _Seat(size_bytes, asyncio.create_task(loading()))
                return self._seats[name]
        except TimeoutError:
            raise OverloadedError(
                f"no room for model {name!r}: the others were busy for room_timeout_s={self._room_timeout_s:g}",
                retry_after_s=self._room_timeout_s,
            ) from None


async def _unload(seat: _Seat) -> None:
    with contextlib.suppress(Exception):  # loading failed: there is nothing to free
        await asyncio.wait({seat.model})
        await seat.model.result().close()
