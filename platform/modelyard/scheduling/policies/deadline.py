"""Earliest deadline first, with as few workers as still meet it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from modelyard.scheduling.forecast import expected_end
from modelyard.scheduling.model import Allocation, Decision, Job, Reason, Snapshot
from modelyard.scheduling.placement import extend
from modelyard.scheduling.policies.backfill import Reservation
from modelyard.scheduling.policies.board import Board, age


@dataclass
class DeadlinePolicy:
    """Jobs that can meet their deadline go first, the earliest before the others and then the least laxity; after
    them those that will be late anyway, and last those without a deadline.

    A job gets the fewest workers with which it ends in time; if there is room for fewer only, it starts with those,
    and a running job that falls behind grows as soon as there is room. Nothing is stopped. The first job without
    room is not delayed by those after it.
    """

    moves: bool = True
    """Whether running jobs are moved, where that loses less than the wait it saves, so that the next in line fits."""
    name: str = "deadline"

    def decide(self, snapshot: Snapshot) -> Decision:
        """Where each job runs, or why it waits."""
        return _Round(snapshot, self.moves).decide()


@dataclass(frozen=True)
class Outlook:
    """What a job's deadline asks for."""

    choices: tuple[tuple[float, str, int], ...] = ()
    """GPUs, pool and workers that would end in time if they started now, the fewest GPUs first."""
    laxity_s: float = float("inf")
    """Seconds by which the fastest choice would be early; negative when it would be late."""
    fastest: str = ""
    """That choice, in words."""


class _Round:
    def __init__(self, snapshot: Snapshot, moves: bool) -> None:
        self.board = Board(snapshot)
        self.moves = moves
        self.now_s = snapshot.now_s
        running = [snapshot.by_id[job_id] for job_id in self.board.run]
        self.behind = {job.job_id for job in running if self._is_late(job, job.allocation)}
        jobs = [*self.board.queue, *(job for job in running if job.job_id in self.behind)]
        self.outlooks = {job.job_id: self._outlook(job) for job in jobs}
        self.order = sorted(jobs, key=self._urgency)
        self.reservation: Reservation | None = None

    def decide(self) -> Decision:
        for job in self.order:
            if job.job_id in self.behind:
                if self.reservation is None or self.reservation.is_apart(job):
                    self._hurry(job)
            elif not self.board.is_over_quota(job) and not self._start(job) and self.reservation is None:
                self.reservation = Reservation(self.board, job)
        if self.moves and self.reservation is not None:
            self.board.make_room(self.reservation.head)
        decision = self.board.decision([job for job in self.order if job.job_id not in self.behind])
        return Decision(decision.run, {name: self._with_outlook(name, why) for name, why in decision.wait.items()})

    def _start(self, job: Job) -> bool:
        """Start a job with the fewest workers that meet its deadline, else with what there is room for."""
        board, held = self.board, self.reservation
        if held is not None and not held.is_apart(job):
            if not held.start(job):
                return False
            self._hurry(job)
            return True
        found = self._in_time(job) or board.find(job, job.request.min_workers)
        if found is None:
            return False
        board.start(job, found)
        if self._is_late(job, found):
            board.grow(job, most=max((workers for _, _, workers in self.outlooks[job.job_id].choices), default=None))
        if held is not None:
            held.follow(board.run[job.job_id])
        return True

    def _in_time(self, job: Job) -> Allocation | None:
        """The cheapest place, free now, where the job ends before its deadline."""
        for _, pool, workers in self.outlooks[job.job_id].choices:
            if self.board.room.capacity(job.request, pool) < workers:
                continue
            found = self.board.find(job, workers, pools=(pool,))
            if found is not None and not self._is_late(job, found):
                return found
        return None

    def _hurry(self, job: Job) -> None:
        """Give a job that would be late the fewest more workers with which it ends in time, if there is room."""
        board, held = self.board, self.board.run[job.job_id]
        apart = self.reservation is None or self.reservation.is_apart(job)
        room = board.room if apart or self.reservation is None else self.reservation.spare
        if not self._is_late(job, held):
            return
        for workers in sorted({n for _, _, n in self.outlooks[job.job_id].choices if n > sum(held.values())}):
            grown = extend(room, job.request, held, workers - sum(held.values()))
            if grown is None:
                return
            if self._is_late(job, grown):
                continue
            if self.reservation is None or apart:
                board.grow(job, most=workers)
            else:
                self.reservation.grow(job, most=workers)
            if apart and self.reservation is not None:
                self.reservation.follow(grown)
            return

    def _is_late(self, job: Job, allocation: Allocation) -> bool:
        deadline = job.request.deadline_s
        end = expected_end(self.board.snapshot, job, allocation)
        return deadline is not None and end is not None and end > deadline

    def _outlook(self, job: Job) -> Outlook:
        request, snapshot, deadline = job.request, self.board.snapshot, job.request.deadline_s
        if deadline is None or job.remaining is None:
            return Outlook()
        choices = []
        best: tuple[float, str] = (float("-inf"), "")
        for pool in self.board.pools(job):
            whole = self.board.empty.view(request, pool).whole
            for workers in range(request.min_workers, min(request.max_workers, whole.capacity) + 1):
                speed = job.speed.goodput(snapshot.accelerator(pool), workers, whole.num_nodes(workers))
                if speed <= 0:
                    continue
                early = deadline - snapshot.now_s - request.restart_s - job.remaining / speed
                best = max(best, (early, f"{workers} workers in pool {pool}"))
                if early >= 0:
                    choices.append((workers * request.gpus_per_worker, pool, workers))
        return Outlook(tuple(sorted(choices)), *best)

    def _urgency(self, job: Job) -> tuple[int, float, float, float, str]:
        deadline, outlook = job.request.deadline_s, self.outlooks[job.job_id]
        if deadline is None:
            return (2, 0.0, 0.0, *age(job))
        return (0 if outlook.laxity_s >= 0 else 1, deadline, outlook.laxity_s, *age(job))

    def _with_outlook(self, job_id: str, reason: Reason) -> Reason:
        job, outlook = self.board.snapshot.by_id[job_id], self.outlooks.get(job_id)
        if job.request.deadline_s is None or outlook is None:
            return reason
        left = f"its deadline is in {job.request.deadline_s - self.now_s:.0f} s"
        if not outlook.fastest:
            said = f"{left}; nobody knows whether it can be met, as its work or speed is unknown"
        elif outlook.laxity_s < 0:
            said = f"{left} and cannot be met: {outlook.fastest} would be {-outlook.laxity_s:.0f} s late"
        else:
            fewest = outlook.choices[0]
            said = (
                f"{left} and can be met with {fewest[2]} workers in pool {fewest[1]}; "
                f"{outlook.fastest} could start up to {outlook.laxity_s:.0f} s from now"
            )
        return dataclasses.replace(reason, text=f"{reason.text}; {said}")
