"""A fleet in simulated time: replays a request trace through any scaling policy.

A replica works in steps of continuous batching with chunked prefill (Agrawal et al., Sarathi-Serve, OSDI 2024): while
a prompt is being read, a step reads `chunk_tokens` of it and gives one token to each sequence; prompts are read one
after the other. Between two events all rates are constant, so the simulation is exact for that fluid model, and needs
three events for a request. A request goes to the replica with a free slot that has the fewest prompt tokens to read,
then the fewest sequences; if no slot is free it waits in front of all, first come, first served. Deterministic.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from modelyard.errors import ConfigError
from modelyard.serving.autoscaling.model import Capacity, Objective, PoolState, ReplicaReport, Snapshot
from modelyard.serving.autoscaling.traces import Request, Trace

_NEVER = float("inf")


@dataclass(frozen=True, kw_only=True)
class ReplicaModel:
    """What the simulated replicas of a pool can do."""

    capacity: Capacity
    slots: int = 16
    chunk_tokens: int = 256
    cold_start_s: float = 13.0
    price_per_hour: float = 1.0

    def __post_init__(self) -> None:
        if self.slots < 1 or self.chunk_tokens < 1:
            raise ConfigError(f"slots={self.slots}, chunk_tokens={self.chunk_tokens}: both must be at least 1")


class Controller(Protocol):
    """What decides in a replay."""

    period_s: float
    """Seconds between two decisions."""
    reads_reports: bool
    """Whether it looks at more than counts of replicas and requests."""

    def decide(self, snapshot: Snapshot) -> dict[str, int]:
        """Replicas for each pool."""
        ...


@dataclass
class Served:
    """What became of a request; seconds of the trace."""

    request: Request
    taken_s: float = -1.0
    """A replica took it."""
    first_s: float = -1.0
    """Its prompt was read: the first token."""
    end_s: float = -1.0

    @property
    def wait_s(self) -> float:
        """In front of the replicas."""
        return self.taken_s - self.request.arrival_s

    @property
    def ttft_s(self) -> float:
        """To the first token."""
        return self.first_s - self.request.arrival_s

    @property
    def token_s(self) -> float:
        """Mean between its tokens."""
        return (self.end_s - self.first_s) / max(1, self.request.output_tokens)

    def misses(self, objective: Objective) -> bool:
        """Whether the first token or the others came too late."""
        late = self.ttft_s > objective.ttft_limit_s(self.request.prompt_tokens)
        return late or self.token_s > objective.token_s


@dataclass(frozen=True)
class Outcome:
    """A replay's figures, of the time that counts."""

    served: tuple[Served, ...]
    replica_hours: float
    """From the decision to start to the end of the last stream, up to the last arrival."""
    price: float
    changes: int
    """Decisions that changed a pool's target."""
    reversals: int
    """Changes of direction of a pool's target."""
    targets: tuple[tuple[float, int], ...] = field(repr=False)
    """When the target of all pools together became what."""

    def missed_share(self, objective: Objective) -> float:
        """Of all requests."""
        return sum(one.misses(objective) for one in self.served) / max(1, len(self.served))

    def ttft_s(self, share: float) -> float:
        """Time to the first token at a percentile."""
        return float(np.quantile([one.ttft_s for one in self.served], share))

    def wait_s(self, share: float) -> float:
        """Seconds in front of the replicas, at a percentile."""
        return float(np.quantile([one.wait_s for one in self.served], share))


class _Replica:
    """One simulated replica."""

    def __init__(self, number: int, pool: str, model: ReplicaModel, start_s: float, ready_s: float) -> None:
        self.number, self.pool, self.model = number, pool, model
        self.start_s, self.ready_s = start_s, ready_s
        self.is_draining = False
        self.at_s = ready_s
        self.prompts: deque[Served] = deque()
        self.left_tokens = 0.0
        """Of the first prompt."""
        self.waiting_tokens = 0.0
        """Of all prompts, the first included."""
        self.given = 0.0
        """Tokens that a sequence got which ran from the start."""
        self.streams: list[tuple[float, int, Served]] = []
        """(value of `given` at which it ends, tie-break, request), a heap."""
        self.order = 0
        self.version = 0
        self.read_tokens = self.generated = 0.0
        self.finished = 0

    @property
    def load(self) -> int:
        return len(self.prompts) + len(self.streams)

    def step_s(self) -> float:
        capacity = self.model.capacity
        chunk_s = self.model.chunk_tokens * capacity.prompt_token_s if self.prompts else 0.0
        return capacity.step_s + capacity.sequence_s * len(self.streams) + chunk_s

    def advance(self, now_s: float) -> None:
        """Work until then; no event lies between."""
        steps = (now_s - self.at_s) / self.step_s()
        self.at_s = now_s
        if self.prompts:
            read = min(self.left_tokens, steps * self.model.chunk_tokens)
            self.left_tokens -= read
            self.waiting_tokens -= read
            self.read_tokens += read
        if self.streams:
            self.given += steps
            self.generated += steps * len(self.streams)

    def next_s(self) -> float:
        """When its next event is."""
        step_s = self.step_s()
        until = _NEVER
        if self.prompts:
            until = self.left_tokens / self.model.chunk_tokens
        if self.streams:
            until = min(until, self.streams[0][0] - self.given)
        return self.at_s + max(0.0, until) * step_s

    def take(self, served: Served, now_s: float) -> None:
        served.taken_s = now_s
        self.prompts.append(served)
        self.waiting_tokens += served.request.prompt_tokens
        if len(self.prompts) == 1:
            self.left_tokens = float(served.request.prompt_tokens)

    def settle(self, now_s: float) -> tuple[Served | None, list[Served]]:
        """Apply what is due: who got a first token, and who ended."""
        first, ended = None, list[Served]()
        if self.prompts and self.left_tokens <= 1e-6:
            first = self.prompts.popleft()
            first.first_s = now_s
            self.order += 1
            heapq.heappush(self.streams, (self.given + first.request.output_tokens, self.order, first))
            if self.prompts:
                self.left_tokens = float(self.prompts[0].request.prompt_tokens)
        while self.streams and self.streams[0][0] <= self.given + 1e-6:
            served = heapq.heappop(self.streams)[2]
            served.end_s = now_s
            ended.append(served)
        self.finished += len(ended)
        return first, ended

    def report(self, now_s: float) -> ReplicaReport:
        return ReplicaReport(
            f"{self.pool}-{self.number}",
            now_s,
            len(self.streams),
            len(self.prompts),
            self.read_tokens,
            self.generated,
            self.finished,
        )


class Replay:
    """One trace through one controller. What happens before `from_s` runs and does not count."""

    def __init__(
        self,
        trace: Trace,
        controller: Controller,
        models: dict[str, ReplicaModel],
        initial: dict[str, int],
        objective: Objective,
        from_s: float = 0.0,
    ) -> None:
        self.from_s = from_s
        self.trace, self.controller, self.models = trace, controller, models
        self.objective = objective
        self.fleet: dict[str, list[_Replica]] = {name: [] for name in models}
        """Starting and running; those that drain live on in `events` alone."""
        self.queue: deque[Served] = deque()
        self.queued_tokens = 0.0
        self.events: list[tuple[float, int, int, _Replica]] = []
        self.count = 0
        self.paid_s: dict[str, float] = dict.fromkeys(models, 0.0)
        self.changes = self.reversals = 0
        self.direction: dict[str, int] = {}
        self.targets: list[tuple[float, int]] = []
        self.first_ratios: deque[tuple[float, float]] = deque()
        self.token_ratios: deque[tuple[float, float]] = deque()
        self.arrived_requests = self.arrived_tokens = 0
        for name, count in initial.items():
            for _ in range(count):
                self._start(name, 0.0, 0.0)
        self.targets.append((0.0, sum(initial.values())))

    def run(self) -> Outcome:
        """To the end of the last request; decisions and pay end with the last arrival."""
        everyone = [Served(request) for request in self.trace.requests]
        end_s = self.trace.duration_s
        index, tick_s = 0, 0.0
        while True:
            arrival_s = everyone[index].request.arrival_s if index < len(everyone) else _NEVER
            event_s = self.events[0][0] if self.events else _NEVER
            decision_s = tick_s if tick_s <= end_s else _NEVER
            now_s = min(arrival_s, event_s, decision_s)
            if now_s == _NEVER:
                break
            if event_s == now_s:
                self._event(now_s)
            elif arrival_s == now_s:
                self._arrive(everyone[index], now_s)
                index += 1
            else:
                self._decide(now_s)
                tick_s += self.controller.period_s
        for replica in [one for fleet in self.fleet.values() for one in fleet]:
            self._end(replica, end_s)
        return Outcome(
            served=tuple(one for one in everyone if one.request.arrival_s >= self.from_s),
            replica_hours=sum(self.paid_s.values()) / 3600,
            price=sum(paid / 3600 * self.models[name].price_per_hour for name, paid in self.paid_s.items()),
            changes=self.changes,
            reversals=self.reversals,
            targets=tuple(self.targets),
        )

    # --- events ---------------------------------------------------------------------------------------------------

    def _start(self, pool: str, now_s: float, cold_start_s: float) -> None:
        self.count += 1
        replica = _Replica(self.count, pool, self.models[pool], now_s, now_s + cold_start_s)
        self.fleet[pool].append(replica)
        self._plan(replica, replica.ready_s)

    def _plan(self, replica: _Replica, at_s: float) -> None:
        replica.version += 1
        if at_s < _NEVER:
            heapq.heappush(self.events, (at_s, replica.number, replica.version, replica))

    def _end(self, replica: _Replica, now_s: float) -> None:
        replica.version += 1
        until_s = min(now_s, self.trace.duration_s)
        self.paid_s[replica.pool] += max(0.0, until_s - max(replica.start_s, self.from_s))

    def _event(self, now_s: float) -> None:
        _, _, version, replica = heapq.heappop(self.events)
        if version != replica.version:
            return
        replica.advance(now_s)
        first, ended = replica.settle(now_s)
        if first is not None:
            self.first_ratios.append((now_s, first.ttft_s / self.objective.ttft_limit_s(first.request.prompt_tokens)))
        self.token_ratios.extend((now_s, one.token_s / self.objective.token_s) for one in ended)
        if replica.is_draining and replica.load == 0:
            self._end(replica, now_s)
            return
        while self.queue and not replica.is_draining and replica.load < replica.model.slots:
            served = self.queue.popleft()
            self.queued_tokens -= served.request.prompt_tokens
            replica.take(served, now_s)
        self._plan(replica, replica.next_s())

    def _arrive(self, served: Served, now_s: float) -> None:
        self.arrived_requests += 1
        self.arrived_tokens += served.request.prompt_tokens
        chosen: _Replica | None = None
        best = (_NEVER, 0)
        for fleet in self.fleet.values():
            for one in fleet:
                load = len(one.prompts) + len(one.streams)
                if load < one.model.slots and one.ready_s <= now_s and (one.waiting_tokens, load) < best:
                    chosen, best = one, (one.waiting_tokens, load)
        if chosen is None:
            self.queue.append(served)
            self.queued_tokens += served.request.prompt_tokens
            return
        chosen.advance(now_s)
        chosen.take(served, now_s)
        self._plan(chosen, chosen.next_s())

    # --- decisions ------------------------------------------------------------------------------------------------

    def _decide(self, now_s: float) -> None:
        wanted = self.controller.decide(self._snapshot(now_s))
        self.arrived_requests = self.arrived_tokens = 0
        before = {name: len(fleet) for name, fleet in self.fleet.items()}
        for name, fleet in self.fleet.items():
            for _ in range(wanted[name] - len(fleet)):
                self._start(name, now_s, self.models[name].cold_start_s)
            self._shrink(name, wanted[name], now_s)
            change = len(fleet) - before[name]
            if change:
                self.changes += now_s >= self.from_s
                sign = 1 if change > 0 else -1
                self.reversals += now_s >= self.from_s and self.direction.get(name, sign) != sign
                self.direction[name] = sign
                self.targets.append((now_s, sum(len(one) for one in self.fleet.values())))

    def _shrink(self, pool: str, count: int, now_s: float) -> None:
        """Starting ones go first, then those with the least to do; streams run to their end."""
        fleet = self.fleet[pool]
        while len(fleet) > count:
            chosen = min(fleet, key=lambda one: (one.ready_s <= now_s, one.load, -one.number))
            fleet.remove(chosen)
            chosen.is_draining = True
            if chosen.load == 0:
                self._end(chosen, now_s)

    def _snapshot(self, now_s: float) -> Snapshot:
        ready = {name: [one for one in fleet if one.ready_s <= now_s] for name, fleet in self.fleet.items()}
        states = tuple(PoolState(name, len(ones), len(self.fleet[name])) for name, ones in ready.items())
        counts = Snapshot(
            now_s=now_s,
            pools=states,
            arrived_requests=self.arrived_requests,
            arrived_prompt_tokens=self.arrived_tokens,
            queued_requests=len(self.queue),
            running_requests=sum(one.load for ones in ready.values() for one in ones),
        )
        return self._with_reports(counts, ready) if self.controller.reads_reports else counts

    def _with_reports(self, counts: Snapshot, ready: dict[str, list[_Replica]]) -> Snapshot:
        for one in (one for ones in ready.values() for one in ones):
            one.advance(counts.now_s)
        pools = (
            replace(state, reports=tuple(one.report(counts.now_s) for one in ready[state.name]))
            for state in counts.pools
        )
        return replace(
            counts,
            pools=tuple(pools),
            queued_prompt_tokens=self.queued_tokens
            + sum(one.waiting_tokens for ones in ready.values() for one in ones),
            ttft_over_limit=_recent(self.first_ratios, counts.now_s, self.objective.percentile),
            token_over_limit=_recent(self.token_ratios, counts.now_s, self.objective.percentile),
        )


def _recent(ratios: deque[tuple[float, float]], now_s: float, share: float) -> float | None:
    """A percentile of the last half minute's."""
    while ratios and ratios[0][0] < now_s - 30:
        ratios.popleft()
    if not ratios:
        return None
    ordered = sorted(value for _, value in ratios)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
