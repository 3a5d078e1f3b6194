"""The scheduler as one named, detached Ray actor: `start`, `connect`, and the actor between them.

The actor only serializes calls, looks at the cluster about once a second, and passes what waits to Ray's autoscaler.
It holds no placement group and no worker: those belong to the drivers, so that Ray takes them away with a dead driver
and a restarted scheduler has nothing to find again but its journal.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from modelyard.cluster import RayCluster
from modelyard.config import settings
from modelyard.errors import ConfigError, NotFoundError, WaitTimeoutError
from modelyard.scheduling.growth import Bundle
from modelyard.scheduling.journal import Journal
from modelyard.scheduling.ledger import Entry, Status
from modelyard.scheduling.measured import Report
from modelyard.scheduling.model import Reason, Request, Snapshot, Tenant
from modelyard.scheduling.performance import GradientNoise
from modelyard.scheduling.policies import policy
from modelyard.scheduling.scheduler import Answer, Scheduler, Timing

logger = logging.getLogger(__name__)

NAME, NAMESPACE = "modelyard-scheduler", "modelyard"
ROUND_S = 1.0
"""Seconds between two looks at the cluster; a submitted or finished job starts a round at once."""
CALL_TIMEOUT_S = 30.0
HEAD = "node:__internal_head__"
"""The resource by which Ray marks the head."""
T = TypeVar("T")


class SchedulerActor:
    """One lock around a `Scheduler`, and the thread that runs its rounds. Methods are those of `Scheduler`."""

    def __init__(
        self,
        journal_url: str,
        policy_name: str,
        timing: Timing,
        autoscaling_config: Path | None = None,
        round_s: float = ROUND_S,
    ) -> None:
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._round_s = round_s
        self._demand: Sequence[Bundle] = ()
        self._failure = ""
        cluster = RayCluster(autoscaling_config)
        self._scheduler = Scheduler(Journal(journal_url), cluster, policy(policy_name), timing=timing)
        threading.Thread(target=self._rounds, name="rounds", daemon=True).start()

    def submit(self, request: Request, driver: str = "") -> Answer:
        """See `Scheduler.submit`."""
        return self._changing(lambda: self._scheduler.submit(request, driver))

    def renew(self, job_id: str, report: Report | None = None, driver: str = "") -> Answer:
        """See `Scheduler.renew`."""
        with self._lock:
            return self._scheduler.renew(job_id, report, driver)

    def give_back(self, job_id: str, epoch: int, status: Status, done: float = 0.0) -> None:
        """See `Scheduler.give_back`."""
        self._changing(lambda: self._scheduler.give_back(job_id, epoch, status, done))

    def cancel(self, job_id: str) -> Status:
        """See `Scheduler.cancel`."""
        return self._changing(lambda: self._scheduler.cancel(job_id))

    def hold(self, job_id: str, is_held: bool) -> None:
        """See `Scheduler.hold`."""
        self._changing(lambda: self._scheduler.hold(job_id, is_held=is_held))

    def set_priority(self, job_id: str, priority: int) -> None:
        """See `Scheduler.set_priority`."""
        self._changing(lambda: self._scheduler.set_priority(job_id, priority))

    def set_tenant(self, tenant: Tenant) -> None:
        """See `Scheduler.set_tenant`."""
        self._changing(lambda: self._scheduler.set_tenant(tenant))

    def remove_tenant(self, name: str) -> None:
        """See `Scheduler.remove_tenant`."""
        self._changing(lambda: self._scheduler.remove_tenant(name))

    def look(self) -> tuple[Snapshot, dict[str, Entry], dict[str, Answer], dict[str, Reason], str]:
        """All there is to show: snapshot, entries, answers and reasons by job, and what the last round failed of."""
        with self._lock:
            scheduler = self._scheduler
            entries = dict(scheduler.ledger.entries)
            answers = {job: scheduler.answer(job) for job in entries}
            reasons = {job: reason for job in entries if (reason := scheduler.reason(job)) is not None}
            return scheduler.snapshot(), entries, answers, reasons, self._failure

    def noise(self, job_id: str) -> GradientNoise | None:
        """See `Scheduler.noise`."""
        with self._lock:
            return self._scheduler.noise(job_id)

    def ping(self) -> str:
        """The policy's name, once the journal has been read."""
        return self._scheduler.policy.name

    def _changing(self, change: Callable[[], T]) -> T:
        with self._lock:
            result = change()
        self._wake.set()
        return result

    def _rounds(self) -> None:
        while True:
            self._wake.wait(self._round_s)
            self._wake.clear()
            try:
                with self._lock:
                    self._scheduler.decide()
                    demand = self._scheduler.growth.bundles
                self._pass_on(demand)
                self._failure = ""
            except Exception as error:  # a round that failed must not end the rounds; the next one sees the same
                logger.exception("a scheduling round failed")
                self._failure = f"{type(error).__name__}: {error}"
                time.sleep(self._round_s)

    def _pass_on(self, demand: Sequence[Bundle]) -> None:
        if demand == self._demand:
            return  # Ray remembers it
        from ray.autoscaler.sdk import request_resources

        request_resources(
            bundles=[dict(resources) for resources, _ in demand],
            bundle_label_selectors=[dict(labels) for _, labels in demand],
        )
        self._demand = demand


def default_journal() -> str:
    """SQLite below `MODELYARD_HOME` on the node that starts the scheduler."""
    return f"sqlite:///{Path(settings().home) / 'scheduler.db'}"


def start(
    policy_name: str = "fair_share",
    *,
    journal: str | None = None,
    timing: Timing | None = None,
    autoscaling_config: Path | None = None,
    start_timeout_s: float = 60.0,
) -> Any:
    """Start the scheduler of this cluster on this node; it outlives the driver and restarts by itself.

    Args:
        autoscaling_config: the cluster launcher's file on this node, which says what nodes may be launched; by
            default the one that `ray up` left on the head.

    Raises:
        ConfigError: one runs already, there is no such policy, or the autoscaling config is none.
        IntegrityError: the journal is damaged; says the line and the recovery command.
        StorageError: the journal's database cannot be reached.
    """
    url = journal or default_journal()
    policy(policy_name)
    RayCluster(autoscaling_config)
    if url.startswith("sqlite:///"):
        Path(url.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    check = Journal(url)
    check.read()
    check.close()
    options = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0, max_concurrency=32)(SchedulerActor)
    try:
        actor = options.options(name=NAME, namespace=NAMESPACE, lifetime="detached", **_here()).remote(
            url, policy_name, timing or Timing(), autoscaling_config
        )
    except ValueError:
        raise ConfigError(
            "a scheduler runs on this cluster already", "stop it first: modelyard scheduler stop"
        ) from None
    try:
        ray.get(actor.ping.remote(), timeout=start_timeout_s)
    except ray.exceptions.GetTimeoutError:
        ray.kill(actor)
        raise WaitTimeoutError("the scheduler to start", start_timeout_s, "--start-timeout-s") from None
    return actor


def _here() -> dict[str, Any]:
    """Options that pin an actor to this node; the head as such, since one that is started again has another id."""
    node_id = ray.get_runtime_context().get_node_id()
    if any(node.node_id == node_id and HEAD in node.total for node in RayCluster().nodes()):
        return {"resources": {HEAD: 0.001}}
    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node_id, soft=False)}


def connect() -> Any | None:
    """The scheduler of the cluster this process has joined, or None when there is none."""
    try:
        return ray.get_actor(NAME, namespace=NAMESPACE)
    except ValueError:
        return None


class Current:
    """The scheduler's methods for one that outlives it: whichever scheduler runs now is called."""

    def __init__(self, actor: Any) -> None:
        self._actor: Any | None = actor

    def __getattr__(self, name: str) -> CurrentMethod:
        return CurrentMethod(self, name)

    def found(self) -> Any:
        """The actor; looked up anew after `forget`."""
        if self._actor is None:
            self._actor = connect()
        if self._actor is None:
            raise ray.exceptions.RayActorError  # as of one that is being restarted
        return self._actor

    def forget(self) -> None:
        """It did not answer: another may have taken its place."""
        self._actor = None


@dataclass(frozen=True)
class CurrentMethod:
    """One method of `Current`."""

    scheduler: Current
    name: str

    def remote(self, *arguments: Any) -> Any:
        """Call it, as a method of an actor."""
        return getattr(self.scheduler.found(), self.name).remote(*arguments)


def stop() -> None:
    """End the scheduler. Leases go on unwatched; a scheduler started on the same journal takes them over."""
    from ray.autoscaler.sdk import request_resources

    ray.kill(required(), no_restart=True)
    request_resources(bundles=[])  # Ray would keep nodes for what the scheduler last asked for


def required() -> Any:
    """The scheduler.

    Raises:
        NotFoundError: none runs on this cluster.
    """
    actor = connect()
    if actor is None:
        raise NotFoundError("no scheduler runs on this cluster", "start one: modelyard scheduler start")
    return actor


def call(method: Any, *arguments: Any, timeout_s: float = CALL_TIMEOUT_S) -> Any:
    """Call the scheduler and wait for its answer, over its restarts; errors arrive as they were raised.

    Every call may be repeated: a job submitted again, or a lease given back again, changes nothing.

    Raises:
        WaitTimeoutError: it did not answer in time.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return ray.get(method.remote(*arguments), timeout=max(deadline - time.monotonic(), 0.1))
        except ray.exceptions.GetTimeoutError:
            break
        except ray.exceptions.RayTaskError as error:
            cause = getattr(error, "cause", None)
            raise (cause if isinstance(cause, Exception) else error) from None
        except ray.exceptions.RayActorError:  # it is being restarted, or was stopped and is started anew
            if isinstance(method, CurrentMethod):
                method.scheduler.forget()
            if time.monotonic() > deadline:
                break
            time.sleep(0.3)
    raise WaitTimeoutError("the scheduler's answer", timeout_s, "scheduling.service.CALL_TIMEOUT_S")
