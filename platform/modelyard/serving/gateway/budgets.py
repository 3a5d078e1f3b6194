"""Limits of callers and quotas of tenants in one replica: leased from the shared store, settled with what was used.

A call reserves a request and the tokens it may cost before any work starts. Most calls find what they need in the
slices this replica holds and touch no database. When a call ends, the tokens it did not use go back; tokens beyond
the estimate are counted as well, so the next call waits for them. A replica that is killed takes what it holds
(a second's worth) with it until the window has passed: limits err on the side of too little, never too much.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from modelyard.errors import ModelyardError, StorageError
from modelyard.security import Caller, TokenQuota
from modelyard.serving.gateway import limits
from modelyard.serving.gateway.errors import RateLimitError, over_limit
from modelyard.serving.gateway.usage_store import Refusal, UsageStore, Want

_log = logging.getLogger("modelyard.gateway")


@dataclass
class _Lease:
    slot: int
    units: int
    until_s: float
    remaining: int
    resets_at_s: float


@dataclass
class Reservation:
    """What a call holds: units by subject, with the slot they count in."""

    held: list[tuple[Want, int]] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)
    """OpenAI's `x-ratelimit-*` headers."""


class Budgets:
    """Reserves and settles; one for each replica, used from its event loop."""

    def __init__(self, store: UsageStore, *, clock: Callable[[], float] = time.time) -> None:
        """`store` is called from one thread of its own."""
        self._store, self._clock = store, clock
        self._leases: dict[str, _Lease] = {}
        self._changes: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))
        self._lock = asyncio.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="gateway-usage")

    async def reserve(self, caller: Caller, quota: TokenQuota, tokens: int | None) -> Reservation:
        """Take one request and `tokens` tokens (None: of work that has none), or nothing.

        Raises:
            RateLimitError: a limit is used up; says when to come back.
            StorageError: the shared store does not answer: nothing is let through uncounted.
        """
        wants = wanted(caller, quota, tokens)
        if not wants:
            return Reservation()
        reservation = self._take(wants)
        if reservation is not None:
            return reservation
        leasing = asyncio.ensure_future(self._lease_and_take(wants))
        try:
            return await asyncio.shield(leasing)
        except asyncio.CancelledError:
            leasing.add_done_callback(self._abandoned)  # the caller left while the grant was on its way
            raise

    def settle(self, reservation: Reservation, tokens: int | None) -> None:
        """Count the tokens that a call really cost; None: the request did not reach a model, its tokens go back."""
        for want, slot in reservation.held:
            if want.subject.endswith("/requests"):
                continue
            difference = (tokens or 0) - want.needed
            lease = self._leases.get(want.subject)
            if lease is not None and lease.slot == slot and lease.until_s > self._clock():
                taken = min(difference, lease.units)
                lease.units -= taken
                difference -= taken
            if difference:
                self._changes[want.subject][slot] += difference
        reservation.held.clear()

    async def flush(self) -> None:
        """Give back what is not used in time and count what was used beyond reservations."""
        async with self._lock:
            self._return_expired()
            if self._changes:
                await self._exchange([])

    async def run(self) -> None:
        """Flush every `LEASE_S`, until cancelled."""
        while True:
            await asyncio.sleep(limits.LEASE_S)
            try:
                await self.flush()
            except StorageError as error:
                _log.warning("usage is not written yet: %s", error.problem)

    async def close(self) -> None:
        """Give everything back and let go of the store."""
        for lease in self._leases.values():
            lease.until_s = 0.0
        try:
            await self.flush()
        except ModelyardError as error:
            _log.warning("usage of the last moments is lost: %s", error.problem)
        self._thread.shutdown(wait=True)
        self._store.close()

    def _abandoned(self, leasing: asyncio.Task[Reservation]) -> None:
        if not leasing.cancelled() and leasing.exception() is None:
            self.settle(leasing.result(), None)

    def _take(self, wants: list[Want]) -> Reservation | None:
        """From the leases alone; None when one of them does not hold enough."""
        now = self._clock()
        leases = [self._leases.get(want.subject) for want in wants]
        for want, lease in zip(wants, leases, strict=True):
            if lease is None or lease.until_s <= now or lease.units < want.needed:
                return None
        reservation = Reservation()
        for want, lease in zip(wants, leases, strict=True):
            assert lease is not None
            lease.units -= want.needed
            reservation.held.append((want, lease.slot))
            reservation.headers |= rate_headers(
                want, lease.remaining + lease.units, max(0.0, lease.resets_at_s - now), reservation.headers
            )
        return reservation

    async def _lease_and_take(self, wants: list[Want]) -> Reservation:
        async with self._lock:
            reservation = self._take(wants)  # the one before us may have leased enough for both
            if reservation is not None:
                return reservation
            for want in wants:
                self._give_back(want.subject)
            self._return_expired()
            now = self._clock()
            answer = await self._exchange(wants)
            if isinstance(answer, Refusal):
                raise refused(answer)
            reservation = Reservation()
            for want, granted in zip(wants, answer, strict=True):
                until = now + limits.LEASE_S
                if want.window.period == "minute":
                    until = min(until, granted.slot + 1.0)
                units = granted.units - want.needed
                self._leases[want.subject] = _Lease(
                    granted.slot, units, until, granted.remaining, now + granted.reset_s
                )
                reservation.held.append((want, granted.slot))
                reservation.headers |= rate_headers(
                    want, granted.remaining + units, granted.reset_s, reservation.headers
                )
            return reservation

    async def _exchange(self, wants: list[Want]) -> list[limits.Grant] | Refusal:
        changes = {subject: dict(slots) for subject, slots in self._changes.items()}
        self._changes.clear()
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._thread, self._store.exchange, self._clock(), changes, wants)
        except StorageError:
            for subject, slots in changes.items():
                for slot, units in slots.items():
                    self._changes[subject][slot] += units
            raise

    def _return_expired(self) -> None:
        now = self._clock()
        for subject in [subject for subject, lease in self._leases.items() if lease.until_s <= now]:
            self._give_back(subject)

    def _give_back(self, subject: str) -> None:
        lease = self._leases.pop(subject, None)
        if lease is not None and lease.units:
            self._changes[subject][lease.slot] -= lease.units


def wanted(caller: Caller, quota: TokenQuota, tokens: int | None) -> list[Want]:
    """What one call with at most `tokens` tokens takes from which windows."""
    found = []
    if caller.requests_per_minute is not None:
        found.append(Want(f"{caller.subject}/requests", limits.Window(caller.requests_per_minute, "minute"), 1))
    if tokens is None:
        return found
    if caller.tokens_per_minute is not None:
        found.append(Want(f"{caller.subject}/tokens", limits.Window(caller.tokens_per_minute, "minute"), tokens))
    if quota.tokens_per_day is not None:
        found.append(Want(f"tenant:{caller.tenant}/day", limits.Window(quota.tokens_per_day, "day"), tokens))
    if quota.tokens_per_month is not None:
        found.append(Want(f"tenant:{caller.tenant}/month", limits.Window(quota.tokens_per_month, "month"), tokens))
    return found


def rate_headers(want: Want, remaining: int, reset_s: float, before: dict[str, str] | None = None) -> dict[str, str]:
    """OpenAI's three headers of a window; a quota shows only where no limit of tokens a minute stands already."""
    kind = "requests" if want.subject.endswith("/requests") else "tokens"
    if before and f"x-ratelimit-limit-{kind}" in before:
        return {}
    return {
        f"x-ratelimit-limit-{kind}": str(want.window.limit),
        f"x-ratelimit-remaining-{kind}": str(max(0, remaining)),
        f"x-ratelimit-reset-{kind}": limits.as_duration(reset_s),
    }


def refused(refusal: Refusal) -> RateLimitError:
    """The 429 of a refusal."""
    want = refusal.want
    kind = "requests" if want.subject.endswith("/requests") else "tokens"
    whose = f"the quota of the tenant: {kind}" if want.window.period in ("day", "month") else f"the key's {kind}"
    problem = f"{whose} per {want.window.period}: limit {want.window.limit}, left {refusal.remaining}"
    return over_limit(
        f"{problem}, this call needs {want.needed}",
        kind=kind,
        retry_after_s=refusal.wait_s,
        headers=rate_headers(want, refusal.remaining, refusal.reset_s),
        is_quota=want.window.period in ("day", "month"),
    )
