"""A trial's training, driven rung by rung: in one warm process for a gang of one, under Ray Train for larger gangs."""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from contextlib import ExitStack, nullcontext
from typing import Any, Protocol

import ray

from modelyard.cluster import RayCluster
from modelyard.errors import LeaseLostError, TrainingError, WaitTimeoutError
from modelyard.scheduling.client import Lease, lease
from modelyard.training.config import TrainConfig, Workers
from modelyard.training.elastic import check_capacity
from modelyard.training.interrupts import Interrupted, original_error
from modelyard.training.launch import Launch
from modelyard.training.leased import request_of, watched
from modelyard.training.monitor import Record
from modelyard.training.worker import Trained
from modelyard.tuning.solo import SoloWorker

logger = logging.getLogger(__name__)

LEAVE_TIMEOUT_S = 90.0
"""Longest wait for a gang to end when its trial is over."""
Advance = tuple[list[Record], Trained | None]


class Attempt(Protocol):
    """One trial's training."""

    def advance(self) -> Advance:
        """Train to the next validation; its records, and the result once the run is over.

        Raises:
            ModelyardError: the training failed.
        """
        ...

    def leave(self) -> None:
        """End it and free its workers and its lease. A second call does nothing."""
        ...


class WarmWorker:
    """The process that trains gangs of one, kept for the next trial where that may be placed there as well."""

    def __init__(self) -> None:
        self._actor: Any = None
        self._place: Any = None

    def get(self, workers: Workers, selector: dict[str, str]) -> Any:
        """The worker on such a place: the one there is, or a new one.

        Raises:
            WaitTimeoutError: there was no room within `workers.start_timeout_s`.
        """
        place = (workers.per_worker, selector)
        if self._actor is None or self._place != place:
            self.close()
            self._actor, self._place = self._start(workers, selector), place
        return self._actor

    def close(self) -> None:
        """End the process and free its room."""
        if self._actor is not None:
            ray.kill(self._actor)
            self._actor = None

    @staticmethod
    def _start(workers: Workers, selector: dict[str, str]) -> Any:
        resources = workers.per_worker
        actor = (
            ray.remote(SoloWorker)
            .options(
                num_cpus=resources.pop("CPU", 0),
                num_gpus=resources.pop("GPU", 0),
                resources=resources,
                label_selector=selector or None,
                max_concurrency=2,  # `make_way` while `advance` runs
                scheduling_strategy="DEFAULT",  # not the runner's placement group, which has no room
            )
            .remote({name: value for name, value in os.environ.items() if name.startswith("MODELYARD_")})
        )
        try:
            ray.get(actor.ping.remote(), timeout=workers.start_timeout_s)
        except ray.exceptions.GetTimeoutError:
            ray.kill(actor)
            raise WaitTimeoutError(
                "room for a trial's worker", workers.start_timeout_s, "workers.start_timeout_s"
            ) from None
        return actor


class SoloAttempt:
    """A gang of one in a warm worker, on a lease when the config asks for one."""

    def __init__(self, launch: Launch, config: TrainConfig, warm: WarmWorker, *, waits_for_checkpoint: bool) -> None:
        self._launch, self._config, self._warm = launch, config, warm
        self._waits_for_checkpoint = waits_for_checkpoint
        self._stack = ExitStack()
        self._lease: Lease | None = None
        self._actor: Any = None
        self._failures_left = config.failures.max_failures
        check_capacity(RayCluster(), config.workers)
        launch.write_record()

    def advance(self) -> Advance:
        """See `Attempt`. A worker that died, or had to make way, is replaced; the run goes on at its checkpoint."""
        while True:
            actor = self._placed()
            try:
                with self._watched(actor):
                    records, trained = ray.get(actor.advance.remote())
                    return records, trained
            except ray.exceptions.RayActorError as error:
                self._actor = None
                self._warm.close()
                if self._failures_left == 0:
                    raise TrainingError(f"the worker process ended: {str(error).splitlines()[-1]}") from error
                self._failures_left -= 1
            except ray.exceptions.RayTaskError as error:
                cause = original_error(error)
                if not isinstance(cause, Interrupted):
                    raise cause from error
                self._make_way()

    def leave(self) -> None:
        """See `Attempt`."""
        actor, self._actor = self._actor, None
        if actor is not None:
            try:
                ray.get(actor.leave.remote(), timeout=LEAVE_TIMEOUT_S)
            except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError):
                self._warm.close()
        if self._lease is not None:
            self._warm.close()  # it sits on the lease's room
            self._lease = None
        self._stack.close()

    def _placed(self) -> Any:
        if self._actor is not None:
            return self._actor
        config = self._config
        if config.lease is not None and self._lease is None:
            request = request_of(config, self._launch.run_id, time.time())
            self._lease = self._stack.enter_context(lease(request, timeout_s=config.lease.timeout_s))
        selector = dict(config.workers.selector)
        if self._lease is not None and not self._lease.is_local:
            selector = dict(self._lease.bundles[0][1])
        self._actor = self._warm.get(config.workers, selector)
        ray.get(self._actor.begin.remote(self._launch.job(), self._waits_for_checkpoint), timeout=LEAVE_TIMEOUT_S)
        return self._actor

    def _watched(self, actor: Any) -> Any:
        return nullcontext() if self._lease is None else watched(self._lease, lambda why: actor.make_way.remote(why))

    def _make_way(self) -> None:
        self._actor = None
        self._warm.close()
        assert self._lease is not None
        if self._lease.is_lost:
            raise LeaseLostError("the scheduler took the trial's lease away", "resume the study to go on")
        logger.warning("giving way: %s", self._lease.reason)
        self._lease.give_way()


class GangAttempt:
    """A gang under Ray Train, which goes on while its figures are looked at."""

    def __init__(self, launch: Launch, *, waits_for_checkpoint: bool) -> None:
        self._launch = launch
        self._waits_for_checkpoint = waits_for_checkpoint
        self._records: queue.SimpleQueue[Record | None] = queue.SimpleQueue()
        self._outcome: Trained | BaseException | None = None
        self._monitor: Any = None
        launch.write_record()
        self._thread = threading.Thread(target=self._run, name="gang", daemon=True)
        self._thread.start()

    def advance(self) -> Advance:
        """See `Attempt`."""
        records: list[Record] = []
        measured: int | None = None
        while (record := self._records.get()) is not None:
            records.append(record)
            step = int(record["step"])
            if record["kind"] == "validation":
                measured = step
                if not self._waits_for_checkpoint:
                    return records, None
            elif record["kind"] == "checkpoint" and measured is not None and step >= measured:
                return records, None
        if isinstance(self._outcome, BaseException):
            raise self._outcome
        return records, self._outcome

    def leave(self) -> None:
        """See `Attempt`."""
        if self._thread.is_alive() and self._monitor is not None:
            try:
                ray.get(self._monitor.close.remote("the trial is over"), timeout=10)
            except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError):
                logger.warning("the run's monitor does not answer", exc_info=True)
        self._thread.join(LEAVE_TIMEOUT_S)

    def _run(self) -> None:
        try:
            with self._launch.admitted() as monitor:
                self._monitor = monitor
                self._outcome = self._launch.train(monitor, [self._records.put])
        except BaseException as error:  # noqa: BLE001 - handed to `advance`
            self._outcome = error
        self._records.put(None)


def is_solo(config: TrainConfig) -> bool:
    """Whether one process is enough."""
    return config.workers.max == 1
