"""A cluster in simulated time: drives any policy through rounds and reports what became of every job.

A round: jobs submitted by now join, the policy decides on a `Snapshot`, its decision takes effect, all jobs advance.
A job whose workers change pays its `restart_s` with the GPUs held. A finished job's GPUs stay reserved to the end of
the round. These are the rules of the simulators of Sia and Gavel; `Rules` names where the two differ.
Deterministic: the same trace, policy, rules and seed give the same result.
"""

from __future__ import annotations

import heapq
import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from modelyard.cluster import Node
from modelyard.errors import CapacityError, ConfigError, DataError
from modelyard.scheduling.model import Allocation, Decision, Job, Policy, PoolPower, Snapshot, Tenant, pool_of
from modelyard.scheduling.results import Outcome, Result, Sample
from modelyard.scheduling.traces.base import Run, Trace, TraceJob


@dataclass(frozen=True, kw_only=True)
class Failures:
    """Nodes that break at random, each alike and independent: exponential times to failure and to repair."""

    mean_between_s: float
    repair_s: float = 1800.0
    lost_s: float = 600.0
    """Seconds of work a job repeats, on average, because its last checkpoint is older than the failure."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("mean_between_s", "repair_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"failures.{name}={getattr(self, name)} must be above 0", "give seconds")


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How simulated time behaves."""

    round_s: float = 60.0
    is_aligned: bool = True
    """Rounds begin at multiples of `round_s` (Sia); else the first begins with the first job (Gavel)."""
    ends_early: bool = False
    """A round ends when its last running job does, if that is sooner (Gavel)."""
    moves_are_free: bool = True
    """Other nodes of the same pool in the same shape cost no restart (Sia)."""
    failures: Failures | None = None
    max_rounds: int = 1_000_000

    def __post_init__(self) -> None:
        if not self.round_s > 0:
            raise ConfigError(f"round_s={self.round_s} must be above 0", "give seconds, e.g. 60")


SIA_RULES = Rules()
GAVEL_RULES = Rules(round_s=360.0, is_aligned=False, ends_early=True)


@dataclass
class _Live:
    """A job in the cluster."""

    entry: TraceJob
    run: Run
    allocation: Allocation = field(default_factory=dict)
    shape: tuple[str, tuple[int, ...]] | None = None
    delay_s: float = 0.0
    owed_s: float = 0.0
    """Lost work that the next start repeats."""
    changed_s: float | None = None
    first_s: float | None = None
    starts: int = 0
    gpu_s: float = 0.0
    restart_gpu_s: float = 0.0
    contention: list[int] = field(default_factory=list)

    def visible(self) -> Job:
        """What a policy sees of it."""
        return Job(
            request=self.entry.request,
            submitted_s=self.entry.submitted_s,
            allocation=self.allocation,
            speed=self.run.speed,
            done=self.run.done,
            attained_gpu_s=self.gpu_s,
            restarts=self.starts,
            changed_s=self.changed_s,
        )


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """A trace, a policy and the rules."""

    trace: Trace
    policy: Policy
    rules: Rules = field(default_factory=Rules)
    nodes: tuple[Node, ...] = ()
    """Instead of the trace's own."""
    tenants: tuple[Tenant, ...] = ()
    power: Mapping[str, PoolPower] = field(default_factory=dict)
    power_cap_watts: float | None = None

    def run(self) -> Result:
        """To the end of the last job."""
        return _Clock(self).run()


class _Clock:
    """State of one simulation."""

    def __init__(self, simulation: Simulation) -> None:
        self.simulation = simulation
        self.rules = simulation.rules
        self.nodes = simulation.nodes or simulation.trace.nodes
        if not self.nodes:
            raise ConfigError(f"trace {simulation.trace.name!r} describes no cluster", "give nodes")
        self.waiting = sorted(simulation.trace.jobs, key=lambda job: job.submitted_s)
        self.waiting.reverse()
        self.live: dict[str, _Live] = {}
        self.outcomes: list[Outcome] = []
        self.samples: list[Sample] = []
        self.decisions_s: list[float] = []
        self.down: dict[str, float] = {}
        self.breaks = _Breaks(self.rules.failures, self.nodes)
        self.now = self._tick(self.waiting[-1].submitted_s) if self.waiting else 0.0
        self.last_end = self.now

    def run(self) -> Result:
        for _ in range(self.rules.max_rounds):
            self._admit()
            if not self.live and not self.waiting:
                return self._result()
            decision = self._decide() if self.live else Decision({}, {})
            self._apply(decision)
            if not any(job.allocation for job in self.live.values()) and not self.down:
                self._skip_idle()
                continue
            self._advance()
        raise DataError(
            f"{len(self.live)} jobs are unfinished after {self.rules.max_rounds} rounds", "raise max_rounds"
        )

    def _tick(self, at: float) -> float:
        return math.ceil(at / self.rules.round_s) * self.rules.round_s if self.rules.is_aligned else at

    def _admit(self) -> None:
        while self.waiting and self.waiting[-1].submitted_s <= self.now:
            entry = self.waiting.pop()
            self.live[entry.request.job_id] = _Live(entry, entry.begin())
        self.down = self.breaks.down_at(self.now)
        for job in self.live.values():
            if any(node in self.down for node in job.allocation):
                job.allocation, job.shape = {}, None
                job.owed_s = self.rules.failures.lost_s if self.rules.failures else 0.0

    def _decide(self) -> Decision:
        snapshot = Snapshot(
            now_s=self.now,
            nodes=tuple(replace(node, alive=False) if node.node_id in self.down else node for node in self.nodes),
            jobs=tuple(job.visible() for job in self.live.values()),
            tenants=self.simulation.tenants,
            accelerators=self.simulation.trace.accelerators,
            power=self.simulation.power,
            power_cap_watts=self.simulation.power_cap_watts,
        )
        began = time.perf_counter()
        decision = self.simulation.policy.decide(snapshot)
        self.decisions_s.append(time.perf_counter() - began)
        check(snapshot, decision)
        for job in self.live.values():
            job.contention.append(len(self.live))
        return decision

    def _apply(self, decision: Decision) -> None:
        for job_id, job in self.live.items():
            wanted = dict(decision.run.get(job_id, {}))
            if wanted == dict(job.allocation):
                continue
            job.allocation, job.changed_s = wanted, self.now
            if not wanted:
                job.shape, job.delay_s = None, 0.0
                continue
            pool = pool_of(self._node(next(iter(wanted))))
            shape = (pool, tuple(sorted(wanted.values(), reverse=True)))
            if shape == job.shape and self.rules.moves_are_free:
                continue
            job.shape = shape
            job.delay_s = job.entry.request.restart_s + job.owed_s
            job.owed_s = 0.0
            job.starts += 1
            job.first_s = self.now if job.first_s is None else job.first_s
            job.run.place(self.simulation.trace.accelerators.get(pool, pool), shape[1])

    def _node(self, node_id: str) -> Node:
        return next(node for node in self.nodes if node.node_id == node_id)

    def _skip_idle(self) -> None:
        """Nothing runs: on to the next submission, or give up when no job can ever start."""
        if self.waiting:
            self.now = max(self._tick(self.waiting[-1].submitted_s), self.now)
            if self.waiting[-1].submitted_s > self.now:
                self.now += self.rules.round_s
            return
        stuck = ", ".join(list(self.live)[:5])
        raise CapacityError(
            f"{len(self.live)} jobs wait on an idle cluster and nothing will change: {stuck}",
            "remove them from the trace, or simulate larger pools",
        )

    def _advance(self) -> None:
        longest, used = 0.0, {}
        for job_id, job in self.live.items():
            if not job.allocation:
                continue
            delay = min(job.delay_s, self.rules.round_s)
            job.delay_s -= delay
            took = job.run.advance(self.rules.round_s - delay) if delay < self.rules.round_s else 0.0
            used[job_id] = (delay, took)
            longest = max(longest, delay + took)
        length = longest if self.rules.ends_early and longest > 0 else self.rules.round_s
        self._sample(length)
        for job_id, (delay, took) in used.items():
            job = self.live[job_id]
            gpus = job.entry.request.gpus_per_worker * sum(job.allocation.values())
            job.gpu_s += gpus * (delay + took)
            job.restart_gpu_s += gpus * delay
            if job.run.is_finished:
                self._finish(job_id, self.now + delay + took)
        self.now += length

    def _sample(self, length: float) -> None:
        held: dict[str, float] = {}
        for job in self.live.values():
            for node_id, count in job.allocation.items():
                pool = pool_of(self._node(node_id))
                held[pool] = held.get(pool, 0.0) + count * job.entry.request.gpus_per_worker
        waiting = sum(1 for job in self.live.values() if not job.allocation)
        self.samples.append(Sample(self.now, length, held, len(self.live) - waiting, waiting))

    def _finish(self, job_id: str, at: float) -> None:
        job = self.live.pop(job_id)
        self.last_end = max(self.last_end, at)
        self.outcomes.append(
            Outcome(
                job_id=job_id,
                submitted_s=job.entry.submitted_s,
                started_s=job.first_s if job.first_s is not None else at,
                finished_s=at,
                gpu_s=job.gpu_s,
                restart_gpu_s=job.restart_gpu_s,
                restarts=job.starts - 1,
                mean_contention=sum(job.contention) / len(job.contention),
            )
        )

    def _result(self) -> Result:
        capacity: dict[str, float] = {}
        for node in self.nodes:
            capacity[pool_of(node)] = capacity.get(pool_of(node), 0.0) + node.total.get("GPU", 0.0)
        return Result(
            trace=self.simulation.trace.name,
            policy=self.simulation.policy.name,
            capacity=capacity,
            jobs=tuple(sorted(self.outcomes, key=lambda job: (job.submitted_s, job.job_id))),
            samples=tuple(self.samples),
            decisions_s=tuple(self.decisions_s),
        )


class _Breaks:
    """When each node is down, drawn ahead of time per node so that a policy cannot change it."""

    def __init__(self, failures: Failures | None, nodes: Sequence[Node]) -> None:
        self.failures = failures
        self.events: list[tuple[float, str, random.Random]] = []
        self.until: dict[str, float] = {}
        if failures is not None:
            for index, node in enumerate(nodes):
                dice = random.Random(f"{failures.seed}/{index}")
                first = dice.expovariate(1 / failures.mean_between_s)
                heapq.heappush(self.events, (first, node.node_id, dice))

    def down_at(self, now: float) -> dict[str, float]:
        """Nodes that are down at `now`, to the time they are back."""
        if self.failures is None:
            return {}
        while self.events and self.events[0][0] <= now:
            at, node, dice = heapq.heappop(self.events)
            back = at + dice.expovariate(1 / self.failures.repair_s)
            self.until[node] = max(back, now + 1e-9)
            heapq.heappush(self.events, (back + dice.expovariate(1 / self.failures.mean_between_s), node, dice))
        self.until = {node: back for node, back in self.until.items() if back > now}
        return self.until


def check(snapshot: Snapshot, decision: Decision) -> None:
    """Refuses a decision that no cluster could carry out: the policy has a bug."""
    held: dict[tuple[str, str], float] = {}
    for job in snapshot.jobs:
        job_id, request = job.job_id, job.request
        if (job_id in decision.run) == (job_id in decision.wait):
            raise DataError(f"job {job_id!r} must either run or wait in a decision")
        wanted = decision.run.get(job_id)
        if wanted is None:
            continue
        if not request.min_workers <= sum(wanted.values()) <= request.max_workers or min(wanted.values()) < 1:
            raise DataError(
                f"job {job_id!r}: {dict(wanted)} is outside its {request.min_workers}..{request.max_workers}"
            )
        for node_id, count in wanted.items():
            for name, amount in request.resources.items():
                held[node_id, name] = held.get((node_id, name), 0.0) + count * amount
    for (node_id, name), amount in held.items():
        node = snapshot.node_by_id.get(node_id)
        if node is None or not node.is_usable:
            raise DataError(f"node {node_id!r} is given to a job but is not usable")
        if amount > node.total.get(name, 0.0) + 1e-6:
            raise DataError(f"node {node_id!r}: {amount:g} {name} are handed out, it has {node.total.get(name, 0.0):g}")
    unknown = (set(decision.run) | set(decision.wait)) - set(snapshot.by_id)
    if unknown:
        raise DataError(f"a decision names unknown jobs: {', '.join(sorted(unknown))}")
