"""A job's side of the scheduler: ask for a lease, keep it alive, follow it, give it back whatever happens.

    with modelyard.scheduling.lease(Request(job_id="sweep", min_workers=2, max_workers=8)) as lease:
        while not finished:
            work_on(lease.bundles)             # until finished, or lease.must_yield
            if lease.must_yield:
                lease.give_way()               # waits in line again, returns with the next allocation

On a cluster without a scheduler (a laptop) the same code runs at once, with a lease that pins nothing.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from modelyard.errors import LeaseLostError, ModelyardError, WaitTimeoutError
from modelyard.scheduling.ledger import Status
from modelyard.scheduling.measured import Report
from modelyard.scheduling.model import POOL_LABEL, Allocation, Request
from modelyard.scheduling.placement import bundles
from modelyard.scheduling.scheduler import Answer

logger = logging.getLogger(__name__)

_CONNECTING = threading.Lock()
"""Two threads cannot join a cluster at once."""


class Lease:
    """The permission to use `allocation`. Made by `lease(...)`; a thread keeps it alive."""

    def __init__(self, request: Request, service: Any | None, *, poll_s: float = 0.5, renew_s: float = 3.0) -> None:
        self.request = request
        self._service = service
        self._poll_s, self._renew_s = poll_s, renew_s
        self._driver = uuid.uuid4().hex
        self._answer = Answer(Status.RUNNING, 0)
        self._report: Report | None = None
        self._closing = threading.Event()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._keep_alive, name="lease", daemon=True)

    @property
    def is_local(self) -> bool:
        """Whether no scheduler is there, so that any room may be used."""
        return self._service is None

    @property
    def allocation(self) -> Allocation:
        """Node id to number of workers; empty for a local lease."""
        return self._answer.allocation

    @property
    def workers(self) -> int:
        """How many workers may run; the request's maximum for a local lease."""
        return self.request.max_workers if self.is_local else sum(self.allocation.values())

    @property
    def bundles(self) -> list[tuple[dict[str, float], dict[str, str]]]:
        """Resources and Ray label selector of each worker, for a placement group or for Ray Train."""
        if self.is_local:
            selector = {POOL_LABEL: f"in({','.join(self.request.pools)})"} if self.request.pools else {}
            return [(dict(self.request.resources), selector)] * self.request.max_workers
        return bundles(self.allocation, self.request)

    @property
    def must_yield(self) -> bool:
        """Whether the lease should be given back at the next step boundary (`reason` says why)."""
        return self._answer.must_yield or self.is_lost

    @property
    def is_lost(self) -> bool:
        """Whether the scheduler has already taken it."""
        return not self.is_local and self._answer.status is not Status.RUNNING

    @property
    def reason(self) -> str:
        """Why it must be given back."""
        return self._answer.reason

    def report(self, report: Report) -> None:
        """Tell the scheduler, with the next sign of life, how far the job is and how fast its steps are."""
        self._report = report

    @contextmanager
    def placement_group(self, timeout_s: float = 60.0) -> Iterator[Any]:
        """A Ray placement group on exactly the leased nodes, removed at the end.

        Raises:
            WaitTimeoutError: Ray could not reserve it in time.
        """
        import ray

        group = ray.util.placement_group(
            [resources for resources, _ in self.bundles], bundle_label_selector=[labels for _, labels in self.bundles]
        )
        try:
            if not group.wait(timeout_s):
                raise WaitTimeoutError(f"Ray to reserve {self.workers} workers", timeout_s, "timeout_s")
            yield group
        finally:
            ray.util.remove_placement_group(group)

    def give_way(self, timeout_s: float | None = None) -> None:
        """Give the workers back, keep the place in line, and return with the next allocation.

        Raises:
            LeaseLostError: the job was cancelled.
            WaitTimeoutError: no lease within `timeout_s`.
        """
        if not self.is_local:
            self._give_back(Status.WAITING)
            self._wait(timeout_s)

    def _submit(self) -> None:
        if self._service is not None:
            self._answer = _call(self._service.submit, self.request, self._driver)
            self._thread.start()

    def _close(self, status: Status) -> None:
        self._closing.set()
        if self._service is None:
            return
        if not self.is_lost:
            self._give_back(status)
        else:
            self._leave_line()

    def _leave_line(self) -> None:
        """Take a job out of the line whose driver no longer waits; not one that another driver keeps."""
        if self._answer.status is Status.WAITING and not self._answer.has_other_driver:
            _call(self._service.cancel, self.request.job_id)  # type: ignore[union-attr]
            self._ask()
            if not self.is_lost:  # it was granted just then
                self._give_back(Status.CANCELLED)

    def _give_back(self, status: Status) -> None:
        assert self._service is not None
        epoch = self._answer.epoch
        done = self._report.done if self._report else 0.0
        _call(self._service.give_back, self.request.job_id, epoch, status, done)
        self._ask()

    def _wait(self, timeout_s: float | None) -> None:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        shown = ""
        while self._answer.status is Status.WAITING:
            if self._answer.reason != shown:
                shown = self._answer.reason
                logger.warning("job %s waits: %s", self.request.job_id, shown)
            if deadline is not None and time.monotonic() > deadline:
                raise WaitTimeoutError(f"a lease for {self.request.job_id}: {shown}", timeout_s or 0.0, "timeout_s")
            with self._changed:
                self._changed.wait(self._poll_s)
        if self._answer.status is not Status.RUNNING:
            raise LeaseLostError(
                f"job {self.request.job_id!r} was {self._answer.status} while it waited", "submit it again"
            )

    def _keep_alive(self) -> None:
        while not self._closing.is_set():
            try:
                self._ask()
            except Exception as error:  # noqa: BLE001 - it restarts, or is slow: the lease stands until it says otherwise
                logger.warning("the scheduler does not answer (%s); trying again", type(error).__name__)
            waiting = self._answer.status is Status.WAITING
            self._closing.wait(self._poll_s if waiting else self._renew_s)

    def _ask(self) -> None:
        assert self._service is not None
        self._answer = _call(self._service.renew, self.request.job_id, self._report, self._driver)
        with self._changed:
            self._changed.notify_all()


@contextmanager
def lease(request: Request, *, timeout_s: float | None = None, renew_s: float = 3.0) -> Iterator[Lease]:
    """Wait for a lease, hold it for the body, give it back whatever happens.

    Args:
        timeout_s: longest wait for the first allocation; None waits as long as it takes.
        renew_s: seconds between signs of life; well below the scheduler's `lease_ttl_s`.

    Raises:
        CapacityError, ConfigError: the request can never be granted; says what could.
        LeaseLostError: it was cancelled while it waited.
        WaitTimeoutError: `timeout_s` is over.
    """
    from modelyard.cluster import connect
    from modelyard.scheduling import service

    with _CONNECTING:
        connect()
    actor = service.connect()
    held = Lease(request, None if actor is None else service.Current(actor), renew_s=renew_s)
    held._submit()
    status = Status.FAILED
    try:
        held._wait(timeout_s)
        yield held
        status = Status.DONE
    except KeyboardInterrupt:
        status = Status.CANCELLED
        raise
    finally:
        _closed_quietly(held, status)


def _closed_quietly(held: Lease, status: Status) -> None:
    try:
        held._close(status)
    except ModelyardError:
        logger.warning("the scheduler could not be told that %s ended; its lease will expire", held.request.job_id)


def _call(method: Any, *arguments: Any) -> Any:
    from modelyard.scheduling.service import call

    return call(method, *arguments)
