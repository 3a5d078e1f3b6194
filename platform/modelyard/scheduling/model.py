"""What the scheduler knows and what it decides: plain data, no ray, no torch.

A policy maps a `Snapshot` to a `Decision`. The same policy object runs in the live service, in the simulator and in
the tests. A decision is the whole wanted state: for every job of the snapshot either where its workers run or why it
waits. What has to happen (`start`, `resize`, `move`, `preempt`) is the difference to what the snapshot says is held.
"""

from __future__ import annotations

import enum
import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from modelyard.cluster import Node
from modelyard.errors import ConfigError

POOL_LABEL = "modelyard/pool"
DEFAULT_POOL = "default"
"""The pool of nodes without the label."""
TOPOLOGY_LABELS = ("modelyard/rack", "ray.io/availability-zone")
"""Domains wider than a node, smallest first."""

LEAST = 0.0001
"""The smallest amount of a resource that Ray counts."""

Allocation = Mapping[str, int]
"""Node id to the number of workers there; every count is at least 1."""


class Speed(Protocol):
    """What is known of a job's speed. Pure and deterministic; a policy asks it thousands of times."""

    def goodput(self, accelerator: str, workers: int, nodes: int) -> float:
        """Useful progress per second of `workers` workers on `nodes` nodes of one accelerator; 0 if it cannot run."""
        ...


@dataclass(frozen=True)
class LinearSpeed:
    """The prior when nothing has been measured: each worker adds its accelerator's relative speed."""

    per_worker: Mapping[str, float] = field(default_factory=dict)
    """Accelerator to progress per second of one worker; `default` for those not named."""
    default: float = 1.0
    efficiency: float = 1.0
    """Share of its speed that each doubling of the workers keeps, in (0, 1]."""

    def goodput(self, accelerator: str, workers: int, nodes: int) -> float:
        """`workers` times the speed of one, less what each doubling loses."""
        if workers < 1:
            return 0.0
        one = self.per_worker.get(accelerator, self.default)
        return float(one * workers * self.efficiency ** (workers.bit_length() - 1))


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a job asks of the scheduler. Refuses what can never make sense when it is built."""

    job_id: str
    tenant: str = "default"
    priority: int = 0
    """Higher goes first; 0..1000, negative only for work that may always be evicted, down to -1000."""
    min_workers: int = 1
    max_workers: int = 1
    resources: Mapping[str, float] = field(default_factory=lambda: {"GPU": 1.0})
    """Of one worker, by Ray's names."""
    pools: tuple[str, ...] = ()
    """Pools it may use, most wanted first; empty means any."""
    span_pools: bool = False
    """Whether one gang may hold workers of several pools."""
    deadline_s: float | None = None
    """Time by which it should be done, on the snapshot's clock."""
    work: float | None = None
    """Total progress to make, in the units of `speed`; None when nobody knows."""
    restart_s: float = 30.0
    """Seconds that a start, a resize or a move costs while the workers are held."""
    is_preemptible: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "pools", _names(self, "pools", self.pools))
        _check_name("job_id", self.job_id)
        _check_name("tenant", self.tenant)
        for name in ("min_workers", "max_workers", "priority"):
            if not isinstance(value := getattr(self, name), int):
                raise ConfigError(f"job {self.job_id!r}: {name}={value!r} is no whole number", "give an int")
        if not 1 <= self.min_workers <= self.max_workers:
            raise ConfigError(
                f"job {self.job_id!r}: min_workers={self.min_workers} is outside 1..max_workers={self.max_workers}",
                "lower min_workers or raise max_workers",
            )
        if not -1000 <= self.priority <= 1000:
            raise ConfigError(
                f"job {self.job_id!r}: priority={self.priority} is outside -1000..1000", "choose one in that band"
            )
        self._check_numbers()

    def _check_numbers(self) -> None:
        amounts = self.resources.values()
        if not any(amounts) or not all(amount == 0 or LEAST <= amount < math.inf for amount in amounts):
            raise ConfigError(
                f"job {self.job_id!r}: resources={dict(self.resources)} of a worker are nothing, negative, or not "
                f"finite amounts of at least {LEAST:g}",
                "give at least one positive amount, e.g. GPU: 1",
            )
        for name, least in (("work", 0.0), ("restart_s", 0.0), ("deadline_s", -math.inf)):
            value = getattr(self, name)
            if value is not None and not (least <= value and math.isfinite(value)):
                raise ConfigError(
                    f"job {self.job_id!r}: {name}={value:g} is below 0 or not finite",
                    "give a finite number" + ("" if name == "restart_s" else ", or leave it out"),
                )

    @property
    def gpus_per_worker(self) -> float:
        """GPUs of one worker; for jobs without any, its CPUs count (a pool of CPUs is scheduled alike)."""
        return self.resources.get("GPU", 0.0) or self.resources.get("CPU", 0.0) or 1.0


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job that is waiting or running, with its history so far."""

    request: Request
    submitted_s: float
    allocation: Allocation = field(default_factory=dict)
    """What it holds now; empty while it waits."""
    speed: Speed = field(default_factory=LinearSpeed)
    done: float = 0.0
    """Progress made, in the units of `speed`."""
    attained_gpu_s: float = 0.0
    """GPU-seconds it has held so far."""
    restarts: int = 0
    """Starts, resizes and moves so far."""
    changed_s: float | None = None
    """When its allocation last changed."""
    is_held: bool = False
    """Its owner put it on hold: it stays in the queue and is not started."""

    @property
    def job_id(self) -> str:
        """The request's."""
        return self.request.job_id

    @property
    def workers(self) -> int:
        """Number of workers it holds."""
        return sum(self.allocation.values())

    @property
    def is_running(self) -> bool:
        """Whether it holds anything."""
        return bool(self.allocation)

    @property
    def remaining(self) -> float | None:
        """Progress still to make; None when unknown."""
        return None if self.request.work is None else max(self.request.work - self.done, 0.0)


@dataclass(frozen=True, kw_only=True)
class Tenant:
    """A share of the cluster; tenants form a tree under the nameless root."""

    name: str
    parent: str | None = None
    weight: float = 1.0
    """Share among its siblings of what nobody is guaranteed."""
    guaranteed: Mapping[str, float] = field(default_factory=dict)
    """Pool to GPUs it can always get back; others may borrow them while it does not ask."""
    limit: Mapping[str, float] = field(default_factory=dict)
    """Pool to the most GPUs it may hold; absent means no limit."""

    def __post_init__(self) -> None:
        _check_name("tenant", self.name)


@dataclass(frozen=True, kw_only=True)
class PoolPower:
    """What one accelerator of a pool costs to run."""

    busy_watts: float = 0.0
    idle_watts: float = 0.0
    price_per_hour: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """All a policy may know, at one moment."""

    now_s: float
    nodes: tuple[Node, ...]
    """Usable and unusable nodes; `total` is what the scheduler may hand out there, leases included."""
    jobs: tuple[Job, ...]
    tenants: tuple[Tenant, ...] = ()
    accelerators: Mapping[str, str] = field(default_factory=dict)
    """Pool to accelerator name as `Speed` knows it; a pool not named is its own accelerator."""
    power: Mapping[str, PoolPower] = field(default_factory=dict)
    power_cap_watts: float | None = None

    @functools.cached_property
    def by_id(self) -> Mapping[str, Job]:
        """Jobs by id."""
        return {job.job_id: job for job in self.jobs}

    @functools.cached_property
    def node_by_id(self) -> Mapping[str, Node]:
        """Nodes by id."""
        return {node.node_id: node for node in self.nodes}

    @functools.cached_property
    def pools(self) -> Mapping[str, tuple[Node, ...]]:
        """Pool to its usable nodes, both in a fixed order."""
        found: dict[str, list[Node]] = {}
        for node in sorted(self.nodes, key=lambda n: n.node_id):
            if node.is_usable:
                found.setdefault(pool_of(node), []).append(node)
        return {name: tuple(found[name]) for name in sorted(found)}

    def accelerator(self, pool: str) -> str:
        """The accelerator of a pool."""
        return self.accelerators.get(pool, pool)


class Wait(enum.StrEnum):
    """Why a job waits, for programs; the words are in `Reason.text`."""

    HELD = "held"
    NO_ROOM = "no_room"
    FRAGMENTED = "fragmented"
    BEHIND = "behind"
    QUOTA = "quota"
    POWER = "power"
    PREEMPTED = "preempted"
    NEVER_FITS = "never_fits"
    NOT_WORTH_IT = "not_worth_it"
    UNDECIDED = "undecided"


@dataclass(frozen=True)
class Reason:
    """Why a job waits, in numbers, and what would let it start."""

    code: Wait
    text: str
    remedy: str = ""


@dataclass(frozen=True)
class Decision:
    """The wanted state: each job of the snapshot is in exactly one of the two."""

    run: Mapping[str, Allocation]
    wait: Mapping[str, Reason]


class Policy(Protocol):
    """Decides. Deterministic: the same snapshot (and seed) gives the same decision."""

    name: str

    def decide(self, snapshot: Snapshot) -> Decision:
        """Where each job runs, or why it waits."""
        ...


class Action(enum.StrEnum):
    """What a decision asks to be done with one job."""

    START = "start"
    RESIZE = "resize"
    MOVE = "move"
    PREEMPT = "preempt"
    KEEP = "keep"


def actions(snapshot: Snapshot, decision: Decision) -> dict[str, Action]:
    """What to do with each job that runs or is to run."""
    found = {}
    for job in snapshot.jobs:
        wanted = decision.run.get(job.job_id, {})
        if dict(wanted) == dict(job.allocation):
            if wanted:
                found[job.job_id] = Action.KEEP
        elif not job.is_running:
            found[job.job_id] = Action.START
        elif not wanted:
            found[job.job_id] = Action.PREEMPT
        else:
            found[job.job_id] = Action.MOVE if sum(wanted.values()) == job.workers else Action.RESIZE
    return found


def _check_name(field_name: str, name: object) -> None:
    """Names stand in tables, commands and journals."""
    if not isinstance(name, str) or not 1 <= len(name) <= 200 or not name.isprintable():
        shown = repr(name) if len(repr(name)) < 60 else f"{repr(name)[:57]}..."
        raise ConfigError(f"{field_name}={shown} is no name", "give 1 to 200 printable characters")


def _names(request: Request, field_name: str, names: object) -> tuple[str, ...]:
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise ConfigError(f"job {request.job_id!r}: {field_name}={names!r} is no list of names", "write ('a100',)")
    return tuple(names)


def pool_of(node: Node) -> str:
    """The pool a node belongs to."""
    return node.labels.get(POOL_LABEL, DEFAULT_POOL)
