"""Why a job waits, in numbers, and what would let it start."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from modelyard.scheduling.forecast import fits
from modelyard.scheduling.model import Job, Reason, Request, Wait
from modelyard.scheduling.room import UNIT, Room, demand

if TYPE_CHECKING:
    from modelyard.scheduling.policies.board import Board


class Reasons:
    """Words for the state of a board; sums per pool are made once."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._sums: dict[tuple[int, str, str], tuple[float, float, str]] = {}

    def explain(self, job: Job, ahead: Sequence[Job]) -> Reason:
        """Why a job of the queue was not started, behind the jobs that are served before it and wait too."""
        board, request = self._board, job.request
        if board.is_over_quota(job):
            return self.quota(job)
        behind = _behind(ahead)
        pools = board.pools(job)
        if fits(board.room, request, pools, request.min_workers):
            if (blocked := self._power(request, pools)) is not None:
                return dataclasses.replace(blocked, text=f"{blocked.text}{behind}")
            return Reason(
                Wait.BEHIND,
                f"needs {amount(request)} in {_either(pools)}, and they are free, but kept{behind}",
                "wait for those before it, or give `work` so that it can go first if it ends in time",
            )
        able = [pool for pool in pools if board.empty.capacity(request, pool)]
        parts = [self._pool(request, pool) for pool in able or pools]
        text = f"needs {amount(request)} together in {_either(pools)}; {'; '.join(parts)}{behind}"
        if any(self._is_scattered(request, pool) for pool in pools):
            return Reason(
                Wait.FRAGMENTED,
                text,
                "wait until jobs on the same node end, or ask for smaller workers and more of them",
            )
        most = max(board.room.capacity(request, pool) for pool in pools)
        less = f"lower min_workers from {request.min_workers} to {most}, " if most else ""
        return Reason(Wait.NO_ROOM, text, f"{less}allow other pools, or wait until running jobs end")

    def _power(self, request: Request, pools: Sequence[str]) -> Reason | None:
        """Whether watts, and not room, keep the job waiting."""
        watts = self._board.watts
        needed = request.min_workers * min(watts.each(request, pool) for pool in pools)
        if watts.allow(needed):
            return None
        return Reason(
            Wait.POWER,
            f"needs {amount(request)} in {_either(pools)}, and they are free, but draw {needed:.0f} W; the power cap "
            f"of {self._board.snapshot.power_cap_watts:g} W leaves {max(watts.left, 0.0):.0f} W",
            "raise the power cap, or wait until running jobs end",
        )

    def quota(self, job: Job) -> Reason:
        """Which limit keeps the job waiting."""
        request = job.request
        needed = request.min_workers * request.gpus_per_worker
        for pool in self._board.pools(job):
            found = self._board.ledger.blocking(request.tenant, pool, needed)
            if found is not None:
                raised = f"raise its limit: modelyard quota set {found.tenant}"
                waited = f"wait until jobs of {found.tenant!r} end, or {raised}"
                return Reason(
                    Wait.QUOTA,
                    f"needs {amount(request)}; tenant {found.tenant!r} holds {found.used:g} of at most {found.limit:g} "
                    f"in pool {pool}",
                    waited if needed <= found.limit else f"lower min_workers, or {raised}",
                )
        return Reason(Wait.QUOTA, f"needs {amount(request)}; its tenant's quota allows fewer", "raise the quota")

    def never(self, job: Job) -> Reason:
        """Why not even the empty cluster, as it is now, could hold the job."""
        board, request = self._board, job.request
        pools = board.pools(job)
        if not pools:
            wanted = _either(request.pools) if request.pools else "any pool"
            there = ", ".join(board.snapshot.pools) or "none"
            return Reason(
                Wait.NEVER_FITS,
                f"no usable node is in {wanted}; pools with usable nodes: {there}",
                "wait until nodes come back, or allow another pool",
            )
        best = max(pools, key=lambda pool: board.empty.capacity(request, pool))
        most = board.empty.capacity(request, best)
        return Reason(
            Wait.NEVER_FITS,
            f"needs {amount(request)}; the most that its largest pool {best} holds when empty is {most} of "
            f"{request.min_workers} workers",
            f"lower min_workers to {most}, or add nodes to {best}" if most else "ask for less per worker, or add nodes",
        )

    def _pool(self, request: Request, pool: str) -> str:
        unit = _unit(request)
        free, most, node = self._sum(self._board.room, pool, unit)
        total, _, _ = self._sum(self._board.empty, pool, unit)
        return f"{free:g} of {total:g} {unit}s are free in {pool}, most free on one node ({node[:12]}) is {most:g}"

    def _is_scattered(self, request: Request, pool: str) -> bool:
        units = dict(demand(request)).get(_unit(request), 0) / UNIT
        return self._sum(self._board.room, pool, _unit(request))[0] >= units * request.min_workers

    def _sum(self, room: Room, pool: str, unit: str) -> tuple[float, float, str]:
        key = (id(room), pool, unit)
        if key not in self._sums:
            members = room.members[pool]
            amounts = [room.free[number].get(unit, 0) for number in members]
            most = max(range(len(members)), key=lambda place: amounts[place])
            self._sums[key] = (sum(amounts) / UNIT, amounts[most] / UNIT, room.ids[members[most]])
        return self._sums[key]


def amount(request: Request) -> str:
    """What the smallest gang takes, in words."""
    each = dict(demand(request)).get(_unit(request), 0) / UNIT
    many = f"{each * request.min_workers:g} {_unit(request)}s"
    return many if request.min_workers == 1 else f"{many} ({request.min_workers} workers with {each:g})"


def _unit(request: Request) -> str:
    named = [name for name, _ in demand(request)]
    return next((name for name in ("GPU", "CPU") if name in named), named[0])


def _either(pools: Sequence[str]) -> str:
    return f"pool {pools[0]}" if len(pools) == 1 else f"one of the pools {', '.join(pools)}"


def _behind(ahead: Sequence[Job]) -> str:
    if not ahead:
        return ""
    names = ", ".join(job.job_id for job in ahead[:3]) + (", ..." if len(ahead) > 3 else "")
    return f"; behind {len(ahead)} job{'s' if len(ahead) > 1 else ''} ({names})"
