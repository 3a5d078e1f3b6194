"""The scheduler itself, without Ray: a journal, a view on the cluster and a policy, turned into leases.

Everything that changes goes through the journal first. A lease is granted only into room that no other lease holds,
whatever the policy said: that check is made here, once, against the ledger. A job whose allocation should change is
asked to give its lease back (at a step boundary, after a checkpoint); its new one is granted when it has.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from modelyard.cluster import Cluster, Node
from modelyard.errors import ConfigError, NotFoundError, nearest
from modelyard.scheduling import ledger as ledgers
from modelyard.scheduling.admission import FREE_TENANT, check_request
from modelyard.scheduling.growth import Growth, growth, launchable
from modelyard.scheduling.journal import STATE, Event, Journal
from modelyard.scheduling.ledger import Entry, Ledger, Measured, Status
from modelyard.scheduling.measured import Gauge, Report
from modelyard.scheduling.model import (
    Action,
    Allocation,
    Decision,
    Job,
    LinearSpeed,
    Policy,
    Reason,
    Request,
    Snapshot,
    Tenant,
    Wait,
    actions,
    pool_of,
)
from modelyard.scheduling.performance import GradientNoise
from modelyard.scheduling.quota import Tree

SLACK = 1e-6
COMPACT_LINES = 20_000
"""Lines of the journal after which one line takes their place."""
KEEP_OVER = 1_000
"""Jobs that are over and stay known then, the newest."""
_UNDECIDED = Reason(Wait.UNDECIDED, "the scheduler has just started; its first round decides", "wait for a moment")


@dataclass(frozen=True)
class Answer:
    """What a job's driver is told when it asks."""

    status: Status
    epoch: int
    allocation: Allocation = field(default_factory=dict)
    must_yield: bool = False
    """The lease should be given back at the next step boundary, before `yield_by_s`."""
    yield_by_s: float | None = None
    reason: str = ""
    """Why it waits, or why it must yield."""
    has_other_driver: bool = False
    """The job is another driver's, for as long as that one is heard."""


@dataclass(frozen=True)
class Timing:
    """How long the scheduler waits for whom."""

    lease_ttl_s: float = 15.0
    """A driver that has not been heard for so long has died."""
    yield_timeout_s: float = 120.0
    """Longest time between asking for a lease and taking it."""

    def __post_init__(self) -> None:
        for name in ("lease_ttl_s", "yield_timeout_s"):
            if not 0 < (value := getattr(self, name)) < math.inf:
                raise ConfigError(f"{name}={value:g} is not above 0 and finite", "give seconds, e.g. 15")


class Scheduler:
    """Grants leases. Not thread-safe: its one caller serializes."""

    def __init__(
        self,
        journal: Journal,
        cluster: Cluster,
        policy: Policy,
        *,
        timing: Timing | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Replay the journal; leases of before go on, their drivers have one `lease_ttl_s` to be heard again.

        Raises:
            IntegrityError: the journal is damaged; the line and the way back are named.
        """
        self.policy = policy
        self._journal, self._cluster, self._clock = journal, cluster, clock
        self._timing = timing or Timing()
        self.ledger = Ledger(journal.read())
        now = clock()
        self._heard: dict[str, float] = {entry.request.job_id: now for entry in self.ledger.active()}
        self._seconds: dict[str, tuple[str, float]] = {}
        """Job to another driver that would go on with it, and when that was heard."""
        self._yields: dict[str, tuple[float, str]] = {}
        self._reasons: dict[str, Reason] = {
            entry.request.job_id: _UNDECIDED for entry in self.ledger.active() if entry.status is Status.WAITING
        }
        self._gauges = {entry.request.job_id: _gauge(entry) for entry in self.ledger.active()}
        self._done: dict[str, float] = {}
        self._pools: dict[str, str] = {}
        self.growth = Growth()
        """What the autoscaler should make room for, as of the last decision."""

    # --- what drivers call ---------------------------------------------------------------------------------------

    def submit(self, request: Request, driver: str = "") -> Answer:
        """Put a job at the end of the line; the same request again only says where it stands.

        Args:
            driver: who asks. A second driver of a job waits until the first has been silent for `lease_ttl_s`.

        Raises:
            CapacityError, ConfigError: it can never run here; says what would.
        """
        entry = self.ledger.entries.get(request.job_id)
        if entry is not None and not entry.status.is_over:
            known = dataclasses.replace(entry.request, priority=request.priority, deadline_s=request.deadline_s)
            if known != request:
                raise ConfigError(
                    f"job {request.job_id!r} is in the queue with another request",
                    "cancel it first, or choose another id",
                )
        else:
            nodes = self._cluster.nodes()
            more = launchable(nodes, self._cluster.node_groups(), request.min_workers)
            check_request(request, nodes, tuple(self.ledger.tenants.values()), more)
            self._write(("submitted", {"request": ledgers.plain(request), "driver": driver}))
            for memory in (self._reasons, self._gauges, self._done, self._seconds):  # of an earlier job of that name
                memory.pop(request.job_id, None)
        return self.renew(request.job_id, driver=driver)

    def renew(self, job_id: str, report: Report | None = None, driver: str = "") -> Answer:
        """A sign of life from a job's driver; tells it what it holds and whether to give that back."""
        entry = self.ledger.entry(job_id)
        if not entry.status.is_over and driver and entry.driver not in ("", driver):
            return self._second(entry, driver)
        if not entry.status.is_over:
            self._heard[job_id] = self._clock()
        if report is not None:
            self._done[job_id] = max(self._done.get(job_id, 0.0), report.done)
            self._measure(entry, report)
        return self.answer(job_id)

    def _second(self, entry: Entry, driver: str) -> Answer:
        """What a driver is told whose job another one keeps."""
        self._seconds[entry.request.job_id] = (driver, self._clock())
        silence = f"{self._timing.lease_ttl_s:g} s"
        reason = f"another driver of this job is alive; this one goes on when that has been silent for {silence}"
        return Answer(Status.WAITING, entry.epoch, reason=reason, has_other_driver=True)

    def answer(self, job_id: str) -> Answer:
        """Where a job stands, without a sign of life."""
        entry = self.ledger.entry(job_id)
        yield_by, why = self._yields.get(job_id, (None, ""))
        reason = self._reasons.get(job_id)
        text = why if entry.status is Status.RUNNING else reason.text if reason else ""
        return Answer(entry.status, entry.epoch, entry.allocation, yield_by is not None, yield_by, text)

    def give_back(self, job_id: str, epoch: int, status: Status, done: float = 0.0) -> None:
        """End a lease: the job is over, or (`WAITING`) goes back into the line. One given back before is ignored."""
        entry = self.ledger.entry(job_id)
        if entry.status is Status.RUNNING and entry.epoch == epoch:
            self._write(("returned", {"job": job_id, "epoch": epoch, "status": str(status), "done": done}))
            self._yields.pop(job_id, None)

    # --- what people call ----------------------------------------------------------------------------------------

    def cancel(self, job_id: str) -> Status:
        """Take a job out of the line; a running one is asked to give its lease back first. Returns what it was."""
        status = self.ledger.entry(job_id).status
        if not status.is_over:
            self._write(("cancelled", {"job": job_id}))
        return status

    def hold(self, job_id: str, *, is_held: bool = True) -> None:
        """Keep a job from being started (or let it go again). A running one is asked to give its lease back.

        Raises:
            ConfigError: the job is over.
        """
        self._check_active(job_id)
        self._write(("held", {"job": job_id, "is_held": is_held}))

    def set_priority(self, job_id: str, priority: int) -> None:
        """Change a job's priority; refused outside the band, and when the job is over."""
        self._check_active(job_id)
        dataclasses.replace(self.ledger.entry(job_id).request, priority=priority)
        self._write(("priority", {"job": job_id, "priority": priority}))

    def set_tenant(self, tenant: Tenant) -> None:
        """Add or change a tenant; refused when it names no pool, or the tree would have a cycle or promise too much."""
        nodes = self._cluster.nodes()
        known = {pool_of(node) for node in (*nodes, *launchable(nodes, self._cluster.node_groups(), 1))}
        for pool in sorted({*tenant.guaranteed, *tenant.limit} - known):
            raise ConfigError(
                f"tenant {tenant.name!r} names {pool!r}, which is no pool; known: {', '.join(sorted(known)) or 'none'}",
                nearest(pool, known),
            )
        Tree([*(t for t in self.ledger.tenants.values() if t.name != tenant.name), tenant])
        self._write(("tenant", {"tenant": ledgers.plain(tenant)}))

    def remove_tenant(self, name: str) -> None:
        """Forget a tenant; refused while others stand below it, or its jobs are in the queue.

        Raises:
            NotFoundError: there is none of that name.
        """
        if name not in self.ledger.tenants:
            raise NotFoundError(f"there is no tenant {name!r}", nearest(name, self.ledger.tenants))
        jobs = [entry.request.job_id for entry in self.ledger.active() if entry.request.tenant == name]
        if jobs and name != FREE_TENANT:
            raise ConfigError(
                f"tenant {name!r} has {len(jobs)} jobs in the queue, among them {jobs[0]!r}",
                "wait until they end, or cancel them first",
            )
        Tree([t for t in self.ledger.tenants.values() if t.name != name])
        self._write(("tenant_removed", {"name": name}))

    def _check_active(self, job_id: str) -> None:
        if (status := self.ledger.entry(job_id).status).is_over:
            raise ConfigError(f"job {job_id!r} is over: {status}", "submit it again to run it once more")

    def noise(self, job_id: str) -> GradientNoise | None:
        """What a job said last of the noise of its gradients."""
        return self._gauges[job_id].noise if job_id in self._gauges else None

    def reason(self, job_id: str) -> Reason | None:
        """Why a job waits, as of the last decision."""
        self.ledger.entry(job_id)
        return self._reasons.get(job_id)

    # --- the round -----------------------------------------------------------------------------------------------

    def decide(self) -> list[str]:
        """One round: take what silent drivers held, ask the policy, grant what fits now. Returns who got a lease."""
        self._expire()
        snapshot = self.snapshot()
        decision = self.policy.decide(snapshot)
        deaf_s = self._clock() - snapshot.now_s  # nobody was heard meanwhile
        self._heard = {job_id: heard_s + deaf_s for job_id, heard_s in self._heard.items()}
        self.growth = growth(snapshot, decision, self._cluster.node_groups())
        self._reasons = {job_id: self._with_growth(job_id, reason) for job_id, reason in decision.wait.items()}
        self._ask_back(snapshot, decision)
        return self._grant(snapshot, decision)

    def _with_growth(self, job_id: str, reason: Reason) -> Reason:
        if (pool := self.growth.pools.get(job_id)) is None:
            return reason
        return Reason(
            reason.code, f"{reason.text}; more nodes of {pool} were asked for", "wait until the autoscaler brings them"
        )

    def snapshot(self) -> Snapshot:
        """What the policy sees: nodes with what leases may use, jobs with their history."""
        nodes = self._nodes()
        alive = {node.node_id for node in nodes if node.is_usable}
        return Snapshot(
            now_s=self._clock(),
            nodes=nodes,
            jobs=tuple(self._job(entry, alive) for entry in self.ledger.active() if not entry.is_cancelled),
            tenants=tuple(self.ledger.tenants.values()),
        )

    def _nodes(self) -> tuple[Node, ...]:
        """The cluster's nodes; `total` without what others than leases use there."""
        found = []
        nodes = self._cluster.nodes()
        self._pools = {node.node_id: pool_of(node) for node in nodes}
        for node in nodes:
            held = self.ledger.held(node.node_id)
            total = {
                name: amount - max(amount - node.free.get(name, 0.0) - held.get(name, 0.0), 0.0)
                for name, amount in node.total.items()
            }
            found.append(
                dataclasses.replace(node, total=total, free={n: a - held.get(n, 0.0) for n, a in total.items()})
            )
        return tuple(found)

    def _job(self, entry: Entry, alive: set[str]) -> Job:
        gauge = self._gauges.get(entry.request.job_id, Gauge())
        return Job(
            request=entry.request,
            submitted_s=entry.submitted_s,
            allocation={node: count for node, count in entry.allocation.items() if node in alive},
            speed=gauge.speed or LinearSpeed(),
            done=max(entry.done, self._done.get(entry.request.job_id, 0.0)),
            attained_gpu_s=entry.attained_gpu_s,
            restarts=entry.restarts,
            changed_s=entry.changed_s,
            is_held=entry.is_held,
        )

    def _measure(self, entry: Entry, report: Report) -> None:
        pools = {self._pools.get(node, "") for node in entry.allocation}
        if len(pools) == 1 and "" not in pools:  # a step over several pools tells nothing of one of them
            gauge = self._gauges.setdefault(entry.request.job_id, Gauge())
            pool = pools.pop()
            news = gauge.take(pool, sum(entry.allocation.values()), len(entry.allocation), report)
            if news is not None:
                measured = Measured(pool, report.global_batch, news)
                self._write(("measured", {"job": entry.request.job_id, "measured": ledgers.plain(measured)}))

    def _expire(self) -> None:
        now = self._clock()
        for entry in self.ledger.active():
            job_id, running = entry.request.job_id, entry.status is Status.RUNNING
            silent_s = now - self._heard.setdefault(job_id, now)
            if silent_s > self._timing.lease_ttl_s:
                if self._pass_to_second(entry):
                    continue
                if running:
                    self.give_back(job_id, entry.epoch, Status.LOST)
                else:
                    self._write(("cancelled", {"job": job_id}))
            elif running and job_id in self._yields and now > self._yields[job_id][0]:
                self.give_back(job_id, entry.epoch, Status.WAITING)

    def _pass_to_second(self, entry: Entry) -> bool:
        """Leave the job of a silent driver to another one that asked for it, at its place in line."""
        job_id, now = entry.request.job_id, self._clock()
        driver, heard_s = self._seconds.pop(job_id, ("", 0.0))
        if not driver or now - heard_s > self._timing.lease_ttl_s:
            return False
        if entry.status is Status.RUNNING:
            self.give_back(job_id, entry.epoch, Status.WAITING)
        self._write(("driver", {"job": job_id, "driver": driver}))
        self._heard[job_id] = heard_s
        return True

    def _ask_back(self, snapshot: Snapshot, decision: Decision) -> None:
        wanted: dict[str, str] = {}
        for job_id, action in actions(snapshot, decision).items():
            entry = self.ledger.entry(job_id)
            if entry.status is Status.RUNNING and action in (Action.MOVE, Action.RESIZE, Action.PREEMPT):
                wanted[job_id] = _why(action, snapshot, decision, job_id)
        usable = {node.node_id for node in snapshot.nodes if node.is_usable}
        for entry in self.ledger.active():
            job_id = entry.request.job_id
            if lost := sorted(set(entry.allocation) - usable):
                wanted[job_id] = f"node {', '.join(node[:12] for node in lost)} is gone or being drained"
            if entry.status is Status.RUNNING and (entry.is_cancelled or entry.is_held):
                wanted[job_id] = "it was cancelled" if entry.is_cancelled else "it was put on hold"
        deadline = self._clock() + self._timing.yield_timeout_s
        self._yields = {job: (self._yields.get(job, (deadline, ""))[0], why) for job, why in wanted.items()}

    def _grant(self, snapshot: Snapshot, decision: Decision) -> list[str]:
        free = {node.node_id: dict(node.free) for node in snapshot.nodes if node.is_usable}
        granted, events = [], []
        for job_id, allocation in decision.run.items():
            entry = self.ledger.entry(job_id)
            if entry.status is not Status.WAITING or entry.is_held:
                continue
            if _take(free, entry.request, allocation):
                events.append(("granted", {"job": job_id, "epoch": entry.epoch + 1, "allocation": dict(allocation)}))
                granted.append(job_id)
            else:
                others = ", ".join(sorted(self._yields)) or "what runs beside the scheduler"
                self._reasons[job_id] = Reason(
                    Wait.NO_ROOM, f"{sum(allocation.values())} workers are chosen for it; waits for room from {others}"
                )
        self._write(*events)
        return granted

    def _write(self, *events: tuple[str, Mapping[str, Any]]) -> None:
        for event in self._journal.append(*events):
            self.ledger.apply(event)
        if self._journal.length > COMPACT_LINES:
            state = self.ledger.state(KEEP_OVER)
            self._journal.compact(state)
            self.ledger = Ledger([Event(self._clock(), STATE, state)])


def _gauge(entry: Entry) -> Gauge:
    gauge = Gauge()
    for each in entry.measured:
        gauge.restore(each.accelerator, each.observation, each.global_batch)
    return gauge


def _take(free: dict[str, dict[str, float]], request: Request, allocation: Allocation) -> bool:
    """Take an allocation out of what is free; False, and nothing taken, if it does not fit."""
    for node_id, workers in allocation.items():
        for name, amount in request.resources.items():
            if free.get(node_id, {}).get(name, 0.0) + SLACK < amount * workers:
                return False
    for node_id, workers in allocation.items():
        for name, amount in request.resources.items():
            if amount:
                free[node_id][name] -= amount * workers
    return True


def _why(action: Action, snapshot: Snapshot, decision: Decision, job_id: str) -> str:
    if action is Action.PREEMPT:
        reason = decision.wait.get(job_id)
        return f"preempted: {reason.text}" if reason else "preempted"
    now, then = snapshot.by_id[job_id].workers, sum(decision.run[job_id].values())
    return f"to go on with {then} workers instead of {now}" if now != then else f"to move its {now} workers"


__all__ = ["Answer", "Scheduler", "Timing"]
