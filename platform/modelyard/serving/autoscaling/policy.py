"""The policy: a fleet that keeps the latency objective at the demand expected when a new replica would be ready."""

from __future__ import annotations

import math
from collections import deque

from modelyard.serving.autoscaling.capacity import (
    CapacityLearner,
    Mix,
    decode_work_s,
    replicas_for,
    request_work_s,
)
from modelyard.serving.autoscaling.demand import Demand
from modelyard.serving.autoscaling.model import Capacity, Decision, PoolConfig, PoolState, ScalingConfig, Snapshot

_LEARNED = 30
"""Intervals after which the learned capacity is trusted."""
_FILL = 0.8
"""Share of the slots to fill while nothing is known but slots."""


class Averages:
    """The average request, from sums that forget."""

    memory_s = 600.0

    def __init__(self) -> None:
        self.requests, self.prompt = 1e-3, 0.5
        self.finished, self.generated = 0.1, 0.1  # a token each until there are answers: too few, so slots count first
        self.running = 0.0
        self.last: dict[str, tuple[float, float]] = {}

    def fade(self, seconds: float) -> None:
        """Time passes."""
        keep = math.exp(-seconds / self.memory_s)
        self.requests, self.prompt = self.requests * keep, self.prompt * keep
        self.finished, self.generated = self.finished * keep, self.generated * keep

    def answered(self, replica_id: str, finished: float, generated: float) -> None:
        """A replica's counters."""
        before = self.last.get(replica_id, (0.0, 0.0))
        if finished >= before[0] and generated >= before[1]:
            self.finished += finished - before[0]
            self.generated += generated - before[1]
        self.last[replica_id] = (finished, generated)

    @property
    def prompt_tokens(self) -> float:
        """Of a request."""
        return self.prompt / self.requests

    @property
    def output_tokens(self) -> float:
        """Of an answer."""
        return max(1.0, self.generated / (self.finished + self.running / 2))  # those that run gave half, about


class LatencyPolicy:
    """Decides how many replicas each pool has; call `decide` every second or more often, in the order of time.

    It sizes the fleet by a queueing model at the demand that a forecast expects by the time a new replica would be
    ready, adds what a backlog needs to be worked off, and lets a replica go only when the rest would have held, with a
    margin, all through `hold_s`. Deterministic; reads no clock and does no I/O.
    """

    def __init__(self, config: ScalingConfig) -> None:
        self.config = config
        self.pools = sorted(config.pools, key=_price_of_work)
        self.learners = {pool.name: CapacityLearner(pool.capacity) for pool in config.pools}
        slowest = max(pool.cold_start_s for pool in config.pools)
        self.demand = Demand(slowest, config.season_s)
        self.averages = Averages()
        self.held: deque[tuple[float, float]] = deque()
        """When, and how many replicas were needed then with the margin; only falling values."""
        self.standing_at_s = -math.inf
        self.multiple = (0.0, 0)
        """By `Peaks.fleet`, found at `standing_at_s` - 20 s."""
        self.start_s: float | None = None
        self.last_s = 0.0
        self.last_request_s = 0.0
        self.strain = 1.0
        """How much more the observed latency asks for than the model."""

    def decide(self, snapshot: Snapshot) -> Decision:
        """The fleet that is needed now."""
        states = {state.name: state for state in snapshot.pools}
        self._take_in(snapshot)
        first = self.pools[0]
        capacity = self.learners[first.name].capacity
        prompt, output = self.averages.prompt_tokens, self.averages.output_tokens
        work_s = max(1e-9, request_work_s(capacity, first.slots, prompt, output))
        unit = work_s / max(1e-9, request_work_s(first.capacity, first.slots, prompt, output))
        mix = Mix(prompt, output, self.demand.dispersion(work_s / unit))
        speeds = {pool.name: self._speed(pool, work_s, prompt, output) for pool in self.pools}
        ahead_s = self._next_pool(states).cold_start_s
        ready = sum(states[pool.name].running * speeds[pool.name] for pool in self.pools)
        starting = sum(states[pool.name].starting * speeds[pool.name] for pool in self.pools)

        slack_s = max(0.5, self.config.objective.ttft_limit_s(prompt) - prompt * capacity.prompt_token_s)
        load = self.demand.expected(snapshot.now_s, ahead_s, self.config.objective.percentile) * unit * self.strain
        standing = self._standing(snapshot.now_s, slack_s) * unit * self.strain

        def enough(more: float) -> float:
            modelled = replicas_for(capacity, first.slots, mix, self.config.objective, load * more)
            return max(modelled, math.ceil(standing * more))

        steady = enough(1.0)
        backlog = self._backlog(snapshot, capacity, first.slots, work_s)
        left = max(0.0, backlog + (load - ready - starting / 2) * ahead_s)  # when a replica started now is ready
        drain = (load + left / slack_s) / 1.5 if left > 0 else 0.0  # so that the last of it waits half the slack
        need = max(steady, math.ceil(drain - 1e-9), self._slots_needed(snapshot), int(self._is_wanted(snapshot)))
        current = sum(states[pool.name].target * speeds[pool.name] for pool in self.pools)
        held = self._hold(snapshot.now_s, max(need, enough(1 + self.config.margin)), current)
        wanted = max(float(need), min(current, held)) if self._is_wanted(snapshot) else 0.0
        replicas = self._share(wanted, states, speeds)
        figures = {
            "load": load,
            "steady": float(steady),
            "drain": drain,
            "standing": standing,
            "persistence": self.demand.persistence,
            "held": held,
            "wanted": wanted,
            "backlog_s": backlog,
            "work_s": work_s,
            "dispersion": mix.dispersion,
            "strain": self.strain,
        }
        return Decision(replicas, self._reason(figures, replicas, states, ahead_s), figures)

    # --- what is known ------------------------------------------------------------------------------------------

    def _take_in(self, snapshot: Snapshot) -> None:
        now_s = snapshot.now_s
        if self.start_s is None:
            self.start_s = self.last_s = self.last_request_s = now_s
        elapsed_s = max(0.0, now_s - self.last_s)
        self.last_s = now_s
        self.averages.fade(elapsed_s)
        alive: set[str] = set()
        for state in snapshot.pools:
            for report in state.reports:
                alive.add(report.replica_id)
                self.learners[state.name].observe(report)
                self.averages.answered(report.replica_id, report.finished, report.generated_tokens)
        self.averages.running = sum(one.running for state in snapshot.pools for one in state.reports)
        for learner in self.learners.values():
            learner.forget(alive)
        self.averages.last = {name: value for name, value in self.averages.last.items() if name in alive}
        requests = snapshot.arrived_requests
        prompt = snapshot.arrived_prompt_tokens
        if prompt is None:
            prompt = requests * self.averages.prompt_tokens
        elif requests > 0:
            self.averages.requests += requests
            self.averages.prompt += prompt
        first = self.pools[0]
        output_s = self.averages.output_tokens * decode_work_s(first.capacity, first.slots)
        work_s = prompt * first.capacity.prompt_token_s + requests * output_s
        self.demand.add(now_s, work_s, requests)
        if self._in_system(snapshot) > 0 or requests > 0:
            self.last_request_s = now_s
        self._feel(snapshot, elapsed_s)

    def _feel(self, snapshot: Snapshot, elapsed_s: float) -> None:
        """Slow integral control: the model is told to expect more where callers wait although it says they do not."""
        ratios = [ratio for ratio in (snapshot.ttft_over_limit, snapshot.token_over_limit) if ratio is not None]
        if not ratios or any(state.starting for state in snapshot.pools):
            return
        if max(ratios) > 1.0:
            self.strain = min(1.5, self.strain * (1 + 0.001 * min(elapsed_s, 10.0)))
        elif max(ratios) < 0.9:
            self.strain = max(1.0, self.strain * (1 - 0.0005 * min(elapsed_s, 10.0)))

    def _in_system(self, snapshot: Snapshot) -> float:
        running = snapshot.running_requests
        if running is None:
            running = sum(one.running + one.waiting for state in snapshot.pools for one in state.reports)
        return running + snapshot.queued_requests

    def _is_wanted(self, snapshot: Snapshot) -> bool:
        """Whether somebody asked lately."""
        return snapshot.now_s - self.last_request_s < self.config.zero_after_s

    def _speed(self, pool: PoolConfig, work_s: float, prompt: float, output: float) -> float:
        """Of one replica, in replicas of the first pool."""
        own_s = request_work_s(self.learners[pool.name].capacity, pool.slots, prompt, output)
        return work_s / max(1e-9, own_s)

    def _next_pool(self, states: dict[str, PoolState]) -> PoolConfig:
        """Where the next replica would start."""
        free = (pool for pool in self.pools if states[pool.name].target < pool.max_replicas)
        return next(free, self.pools[-1])

    # --- what is needed -----------------------------------------------------------------------------------------

    def _backlog(self, snapshot: Snapshot, capacity: Capacity, slots: int, work_s: float) -> float:
        """Replica-seconds of work that waits for its first token."""
        waiting = sum(one.waiting for state in snapshot.pools for one in state.reports)
        count = waiting + snapshot.queued_requests
        if snapshot.queued_prompt_tokens is None:
            return count * work_s
        output_s = self.averages.output_tokens * decode_work_s(capacity, slots)
        return snapshot.queued_prompt_tokens * capacity.prompt_token_s + count * output_s

    def _standing(self, now_s: float, slack_s: float) -> float:
        """Fleet that the swings of the last half hour call for, in configured replicas; found anew every 20 s."""
        if now_s >= self.standing_at_s:
            self.standing_at_s = now_s + 20.0
            self.multiple = self.demand.peaks.fleet(slack_s, self.config.objective.percentile)
        multiple, level = self.multiple
        return multiple * float(self.demand.peaks.levels[level])

    def _slots_needed(self, snapshot: Snapshot) -> int:
        """While the capacity of a replica is unknown, each request in the system needs a slot."""
        first = self.pools[0]
        if self.learners[first.name].intervals >= _LEARNED:
            return 0
        return math.ceil(self._in_system(snapshot) / (first.slots * _FILL) - 1e-9)

    def _hold(self, now_s: float, need: float, current: float) -> float:
        """Most replicas needed within the hold window; before so much time was seen, no fewer than there are."""
        while self.held and self.held[-1][1] <= need:
            self.held.pop()
        self.held.append((now_s, need))
        while self.held[0][0] < now_s - self.config.hold_window_s:
            self.held.popleft()
        assert self.start_s is not None
        most = self.held[0][1]
        return most if now_s - self.start_s >= self.config.hold_window_s else max(most, current)

    def _share(self, wanted: float, states: dict[str, PoolState], speeds: dict[str, float]) -> dict[str, int]:
        """Spread over the pools, cheap ones first, within bounds and price; running streams keep their replicas."""
        budget = self.config.max_price_per_hour
        left = math.inf if budget is None else budget
        replicas = {pool.name: pool.min_replicas for pool in self.pools}
        left -= sum(pool.price_per_hour * pool.min_replicas for pool in self.pools)
        open_need = wanted - sum(count * speeds[name] for name, count in replicas.items())

        def grow(pool: PoolConfig, count: int) -> int:
            nonlocal left
            more = max(0, min(count, pool.max_replicas) - replicas[pool.name])
            if pool.price_per_hour > 0 and left < math.inf:
                more = min(more, max(0, math.floor(left / pool.price_per_hour + 1e-9)))
            left -= more * pool.price_per_hour if more else 0.0
            replicas[pool.name] += more
            return more

        for pool in self.pools:
            open_need -= grow(pool, _streams_need(pool, states[pool.name])) * speeds[pool.name]
        for pool in self.pools:
            if open_need > 1e-6:
                more = math.ceil(open_need / speeds[pool.name] - 1e-6)
                open_need -= grow(pool, replicas[pool.name] + more) * speeds[pool.name]
        return replicas

    def _reason(
        self, figures: dict[str, float], replicas: dict[str, int], states: dict[str, PoolState], ahead_s: float
    ) -> str:
        total, before = sum(replicas.values()), sum(states[pool.name].target for pool in self.pools)
        expected = f"{figures['load']:.2f} replicas of work expected within {ahead_s:g} s"
        if total == 0:
            return f"nobody asked for {self.config.zero_after_s:g} s"
        if figures["drain"] > figures["steady"]:
            text = (
                f"{figures['backlog_s']:.1f} replica-seconds wait; {figures['drain']:.1f} replicas clear them in time"
            )
        elif figures["wanted"] > figures["steady"] and total == before:
            text = f"{expected}; up to {figures['held']:g} were needed in the last {self.config.hold_window_s:g} s"
        else:
            text = f"{expected}; {figures['steady']:g} keep the objective"
        if total < figures["wanted"] - 1e-6 and all(states[pool.name].target >= 0 for pool in self.pools):
            text += f"; {figures['wanted']:.1f} wanted, bounds or price allow {total}"
        return text


def _price_of_work(pool: PoolConfig) -> float:
    """Price of a unit of work by the configured capacity, for a request of as many tokens in as out."""
    return pool.price_per_hour * request_work_s(pool.capacity, pool.slots, 100, 100)


def _streams_need(pool: PoolConfig, state: PoolState) -> int:
    """Replicas that the running streams fill, by slots and by cache."""
    running = sum(report.running + report.waiting for report in state.reports)
    cache = sum(report.cache_usage for report in state.reports)
    return min(state.target, max(math.ceil(running / pool.slots - 1e-9), math.ceil(cache - 1e-9)))
