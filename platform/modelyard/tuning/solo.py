"""A process that trains gangs of one, trial after trial: it starts once, and a trial in it starts in a second.

Training runs on a thread that halts at every rung until it is told to go on, so that a trial which is stopped there
has not trained a step more than it was judged by.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Mapping
from typing import Any

from modelyard.training.interrupts import Interrupted
from modelyard.training.monitor import Record, Reporter
from modelyard.training.worker import Job, Trained, train_alone

logger = logging.getLogger(__name__)


class _Left(BaseException):
    """Unwinds the training thread: the trial is over. Not an `Exception`, so that nothing on the way keeps it."""


class _Gate(Reporter):
    """Stands between the loop and whoever drives it: collects records, halts the loop at rungs."""

    def __init__(self, waits_for_checkpoint: bool, commit_timeout_s: float) -> None:
        self.wish = None
        self.is_leaving = False
        self._records: list[Record] = []
        self._waits_for_checkpoint = waits_for_checkpoint
        self._commit_timeout_s = commit_timeout_s
        self._measured_step: int | None = None
        self._changed = threading.Condition()
        self._committed_step = -1
        self._halted = False
        self.over = False

    def record(self, kind: str, values: Mapping[str, Any]) -> None:
        """On the training thread, or (checkpoints) on the one that uploads."""
        with self._changed:
            self._records.append({"kind": kind, "time_s": time.time(), **values})
            if kind == "validation":
                self._measured_step = int(values["step"])
            elif kind == "checkpoint":
                self._committed_step = max(self._committed_step, int(values["step"]))
                self._changed.notify_all()

    def at_boundary(self, step: int) -> None:
        """Halt after a validation (and once its checkpoint is safe, where that is wanted)."""
        if self.is_leaving:
            raise _Left
        if self._measured_step != step:
            return
        with self._changed:
            if self._waits_for_checkpoint:
                self._changed.wait_for(lambda: self._committed_step >= step, self._commit_timeout_s)
            self._halted = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._halted)
        if self.is_leaving:
            raise _Left

    def close(self) -> None:
        """The loop is over; its result follows."""

    def go_on(self) -> None:
        """Let the loop run to the next rung."""
        with self._changed:
            self._halted = False
            self._changed.notify_all()

    def leave(self) -> None:
        """End the loop at the next boundary, without a model."""
        self.is_leaving = True
        self.go_on()

    def finish(self) -> None:
        """The thread has nothing more to say."""
        with self._changed:
            self.over = True
            self._changed.notify_all()

    def wait(self) -> list[Record]:
        """Until the next halt or the end; the records since the last call."""
        with self._changed:
            self._changed.wait_for(lambda: self._halted or self.over)
            records, self._records = self._records, []
            return records


class SoloWorker:
    """The actor. One trial at a time; methods are called by its trial's runner."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        """`environment`: variables of the driver that the node may not have."""
        os.environ.update(environment)
        self._gate: _Gate | None = None
        self._thread: threading.Thread | None = None
        self._outcome: Trained | BaseException | None = None

    def begin(self, job: Job, waits_for_checkpoint: bool) -> None:
        """Start training; it halts at the first rung. A trial from before is left."""
        self.leave()
        self._outcome = None
        gate = self._gate = _Gate(waits_for_checkpoint, job.config.checkpoint.commit_timeout_s)

        def run() -> None:
            try:
                self._outcome = train_alone(job, gate)
            except BaseException as error:  # noqa: BLE001 - handed to `advance`
                self._outcome = error
            gate.finish()

        self._thread = threading.Thread(target=run, name="training", daemon=True)
        self._thread.start()

    def advance(self) -> tuple[list[Record], Trained | None]:
        """Train to the next rung, or to the end: then with the result.

        Raises:
            Interrupted: it was asked to make way.
        """
        assert self._gate is not None
        self._gate.go_on()
        records = self._gate.wait()
        if not self._gate.over:
            return records, None
        if isinstance(self._outcome, BaseException):
            raise self._outcome
        return records, self._outcome

    def ping(self) -> None:
        """Answers once the process is up."""

    def make_way(self, reason: str) -> None:
        """Checkpoint at the next step boundary and end with `Interrupted`."""
        if self._gate is not None:
            self._gate.wish = ("resize", reason)

    def leave(self, timeout_s: float = 60.0) -> None:
        """End the trial where it is; nothing is saved that was not saved before."""
        if self._gate is not None and self._thread is not None:
            self._gate.leave()
            self._thread.join(timeout_s)
            self._gate = None


__all__ = ["Interrupted", "SoloWorker"]
