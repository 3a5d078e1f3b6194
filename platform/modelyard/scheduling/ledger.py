"""What the scheduler remembers: jobs, leases and tenants, as a pure fold over the journal's events.

`Ledger.apply` is the only way anything changes, so a replay of the journal gives the same ledger as the service had
when it was killed. It refuses what must never happen: a lease on room that another lease holds, a lease given back
twice, a job submitted twice.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from modelyard.errors import IntegrityError, NotFoundError, nearest
from modelyard.scheduling.journal import Event
from modelyard.scheduling.model import Allocation, Request, Tenant
from modelyard.scheduling.performance import Observation


class Status(enum.StrEnum):
    """Where a job stands."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    LOST = "lost"
    """Its driver fell silent and nobody asked for the job again."""

    @property
    def is_over(self) -> bool:
        """Whether the job will never run again."""
        return self not in (Status.WAITING, Status.RUNNING)


@dataclass(frozen=True)
class Measured:
    """The speed of a job's steps in one configuration."""

    accelerator: str
    global_batch: int
    observation: Observation

    @property
    def where(self) -> tuple[str, int, int]:
        """The configuration."""
        return (self.accelerator, self.observation.workers, self.observation.nodes)


@dataclass(frozen=True)
class Entry:
    """One job, and the lease it holds if it runs."""

    request: Request
    submitted_s: float
    status: Status = Status.WAITING
    allocation: Allocation = field(default_factory=dict)
    epoch: int = 0
    """Number of the newest lease; one given back or expired is told from its successor by it."""
    changed_s: float | None = None
    attained_gpu_s: float = 0.0
    done: float = 0.0
    restarts: int = 0
    is_held: bool = False
    is_cancelled: bool = False
    """Cancelled while it runs: the lease ends when its driver gives it back, or its time to do so is over."""
    driver: str = ""
    """Who keeps it alive; two drivers of one job never hold its lease together."""
    measured: tuple[Measured, ...] = ()
    """What its reports said of its speed, the newest of each configuration."""


class Ledger:
    """All jobs, leases and tenants after some events."""

    def __init__(self, events: Iterable[Event] = ()) -> None:
        self.entries: dict[str, Entry] = {}
        self.tenants: dict[str, Tenant] = {}
        for event in events:
            self.apply(event)

    def apply(self, event: Event) -> None:
        """Take one event in.

        Raises:
            NotFoundError: it is about a job that nobody submitted.
            IntegrityError: it contradicts the events before it, or is of a kind this version does not know.
        """
        body = event.body
        match event.kind:
            case "submitted":
                self._submitted(event.at_s, request_of(body["request"]), body.get("driver", ""))
            case "granted":
                self._granted(event.at_s, body["job"], body["epoch"], body["allocation"])
            case "returned":
                self._returned(event.at_s, body)
            case "cancelled":
                self._cancelled(body["job"])
            case "driver":
                self._change(body["job"], driver=body["driver"])
            case "held":
                self._change(body["job"], is_held=body["is_held"])
            case "priority":
                request = dataclasses.replace(self.entry(body["job"]).request, priority=body["priority"])
                self._change(body["job"], request=request)
            case "measured":
                self._measured(body["job"], _measured_of(body["measured"]))
            case "state":
                self._restored(body)
            case "tenant":
                tenant = Tenant(**body["tenant"])
                self.tenants[tenant.name] = tenant
            case "tenant_removed":
                self.tenants.pop(body["name"], None)
            case kind:
                raise IntegrityError(
                    f"the scheduler's journal holds an event of kind {kind!r}",
                    "it was written by a newer version; start that one",
                )

    def entry(self, job_id: str) -> Entry:
        """A job by its id.

        Raises:
            NotFoundError: there is none; the nearest id is suggested.
        """
        if job_id not in self.entries:
            raise NotFoundError(f"there is no job {job_id!r} in the queue", nearest(job_id, self.entries))
        return self.entries[job_id]

    def active(self) -> list[Entry]:
        """Jobs that wait or run, in the order they were submitted."""
        return [entry for entry in self.entries.values() if not entry.status.is_over]

    def held(self, node_id: str) -> dict[str, float]:
        """Resources that leases hold on a node."""
        used: dict[str, float] = {}
        for entry in self.entries.values():
            workers = entry.allocation.get(node_id, 0)
            for name, amount in entry.request.resources.items() if workers else ():
                used[name] = used.get(name, 0.0) + amount * workers
        return used

    def _submitted(self, at_s: float, request: Request, driver: str) -> None:
        before = self.entries.get(request.job_id)
        if before is not None and not before.status.is_over:
            raise IntegrityError(f"job {request.job_id!r} is in the queue already", "choose another id, or cancel it")
        epoch = before.epoch if before else 0
        self.entries.pop(request.job_id, None)  # it goes to the end of the line
        self.entries[request.job_id] = Entry(request, at_s, epoch=epoch, driver=driver)

    def _granted(self, at_s: float, job_id: str, epoch: int, allocation: Mapping[str, int]) -> None:
        entry = self.entry(job_id)
        if entry.status is not Status.WAITING or epoch != entry.epoch + 1 or not allocation:
            raise IntegrityError(f"job {job_id!r} ({entry.status}, lease {entry.epoch}) cannot be given lease {epoch}")
        self._change(
            job_id,
            status=Status.RUNNING,
            allocation=dict(allocation),
            epoch=epoch,
            changed_s=at_s,
            restarts=entry.restarts + 1,
        )

    def _returned(self, at_s: float, body: Mapping[str, Any]) -> None:
        entry = self.entry(body["job"])
        if entry.status is not Status.RUNNING or body["epoch"] != entry.epoch:
            raise IntegrityError(
                f"job {body['job']!r} ({entry.status}, lease {entry.epoch}) cannot give back {body['epoch']}"
            )
        status = Status(body["status"])
        if entry.is_cancelled and status is Status.WAITING:
            status = Status.CANCELLED
        seconds = max(at_s - (entry.changed_s or at_s), 0.0)
        self._change(
            body["job"],
            status=status,
            allocation={},
            changed_s=at_s,
            attained_gpu_s=entry.attained_gpu_s
            + seconds * entry.request.gpus_per_worker * sum(entry.allocation.values()),
            done=max(entry.done, float(body.get("done", 0.0))),
        )

    def state(self, keep_over: int) -> dict[str, Any]:
        """All that is known as JSON, for one `state` event in place of those before; of what is over the newest."""
        over = [job_id for job_id, entry in self.entries.items() if entry.status.is_over]
        dropped = set(over[: max(len(over) - keep_over, 0)])
        return {
            "entries": [plain(entry) for job_id, entry in self.entries.items() if job_id not in dropped],
            "tenants": [plain(tenant) for tenant in self.tenants.values()],
        }

    def _restored(self, body: Mapping[str, Any]) -> None:
        self.tenants = {each["name"]: Tenant(**each) for each in body["tenants"]}
        self.entries = {each["request"]["job_id"]: _entry_of(each) for each in body["entries"]}

    def _measured(self, job_id: str, new: Measured) -> None:
        others = tuple(each for each in self.entry(job_id).measured if each.where != new.where)
        self._change(job_id, measured=(*others, new))

    def _cancelled(self, job_id: str) -> None:
        if self.entry(job_id).status is Status.WAITING:
            self._change(job_id, status=Status.CANCELLED, is_cancelled=True)
        else:
            self._change(job_id, is_cancelled=True)

    def _change(self, job_id: str, **changes: Any) -> None:
        self.entries[job_id] = dataclasses.replace(self.entry(job_id), **changes)


def request_of(plain: Mapping[str, Any]) -> Request:
    """A request from the journal's JSON."""
    return Request(**{**plain, "pools": tuple(plain.get("pools", ()))})


def plain(value: Request | Tenant | Entry | Measured) -> dict[str, Any]:
    """A value of the ledger as JSON for the journal."""
    return {k: dict(v) if isinstance(v, Mapping) else v for k, v in dataclasses.asdict(value).items()}


def _measured_of(plain: Mapping[str, Any]) -> Measured:
    return Measured(**{**plain, "observation": Observation(**plain["observation"])})


def _entry_of(plain: Mapping[str, Any]) -> Entry:
    restored = {
        "request": request_of(plain["request"]),
        "status": Status(plain["status"]),
        "measured": tuple(_measured_of(each) for each in plain["measured"]),
    }
    return Entry(**{**plain, **restored})
