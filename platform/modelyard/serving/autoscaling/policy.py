"""The policy: a fleet that keeps the latency objective at the demand expected when a new replica would be ready."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

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
_LEAST_SLACK_S = 0.5
"""Where the objective leaves no time to wait: a backlog cannot be cleared in none."""


class Averages:
    """The average request, from sums that forget."""

    memory_s = 600.0
    """Some thousand requests at a few a second: lengths are heavy-tailed."""

    def __init__(self) -> None:
        self.requests, self.prompt = 1e-3, 0.5
        self.finished, self.generated = 0.1, 0.1  # a token each until there are answers: too few, so slots count first
        self.running = 0.0
        self.last: dict[str, tuple[float, float]] = {}
        """Of all replicas that ever were: one whose report is late is not new when it is back."""

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


class Hold:
    """The largest fleet that was needed of late."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.start_s: float | None = None
        self.needed: deque[tuple[float, float]] = deque()
        """When, and the fleet needed then; only falling values."""

    def most(self, now_s: float, need: float, current: float) -> float:
        """Within the hold, now included; before so much time was seen, no less than `current`."""
        self.start_s = now_s if self.start_s is None else self.start_s
        while self.needed and self.needed[-1][1] <= need:
            self.needed.pop()
        self.needed.append((now_s, need))
        while self.needed[0][0] < now_s - self.seconds:
            self.needed.popleft()
        most = self.needed[0][1]
        return most if now_s - self.start_s >= self.seconds else max(most, current)


@dataclass(frozen=True)
class _Moment:
    """What is known at a decision. Work and fleets are in replicas of the first pool, as learned."""

    snapshot: Snapshot
    states: dict[str, PoolState]
    speeds: dict[str, float]
    """Of a replica of each pool."""
    capacity: Capacity
    mix: Mix
    work_s: float
    """Of the average request."""
    ahead_s: float
    """Cold start of the pool that grows next."""
    slack_s: float
    """What a request may wait before its prompt is read."""
    load: float
    """Expected until a replica started now is ready."""

    def fleet(self, count: Callable[[PoolState], int]) -> float:
        """Sum over the pools."""
        return sum(count(self.states[name]) * speed for name, speed in self.speeds.items())


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
        self.hold = Hold(config.hold_window_s)
        self.last_s: float | None = None
        self.last_request_s = 0.0
        self.strain = 1.0
        """How much more the observed latency asks for than the model."""

    def decide(self, snapshot: Snapshot) -> Decision:
        """The fleet that is needed now."""
        self._take_in(snapshot)
        now = self._moment(snapshot)
        steady, backlog = self._steady(now, 1.0), self._backlog(now)
        drain = self._drain(now, backlog)
        is_wanted = snapshot.now_s - self.last_request_s < self.config.zero_after_s
        need = max(steady, math.ceil(drain - 1e-9), self._slots_needed(snapshot), int(is_wanted))
        roomy = max(need, self._steady(now, 1 + self.config.margin))
        current = now.fleet(lambda state: state.target)
        held = self.hold.most(snapshot.now_s, float(roomy), current)
        wanted = max(float(need), min(current, held)) if is_wanted else 0.0
        replicas = self._share(wanted, now)
        figures = {
            "load": now.load,
            "steady": float(steady),
            "drain": drain,
            "held": held,
            "wanted": wanted,
            "backlog_s": backlog,
            "work_s": now.work_s,
            "dispersion": now.mix.dispersion,
            "strain": self.strain,
        }
        return Decision(replicas, self._reason(figures, replicas, now), figures)

    def _moment(self, snapshot: Snapshot) -> _Moment:
        first, states = self.pools[0], {state.name: state for state in snapshot.pools}
        capacity, objective = self.learners[first.name].capacity, self.config.objective
        prompt, output = self.averages.prompt_tokens, self.averages.output_tokens
        work_s = max(1e-9, request_work_s(capacity, first.slots, prompt, output))
        configured_s = max(1e-9, request_work_s(first.capacity, first.slots, prompt, output))
        growing = (pool for pool in self.pools if states[pool.name].target < pool.max_replicas)
        ahead_s = next(growing, self.pools[-1]).cold_start_s
        expected = self.demand.expected(snapshot.now_s, ahead_s, objective.percentile)
        return _Moment(
            snapshot=snapshot,
            states=states,
            speeds={pool.name: self._speed(pool, work_s, prompt, output) for pool in self.pools},
            capacity=capacity,
            mix=Mix(prompt, output, self.demand.dispersion(configured_s)),
            work_s=work_s,
            ahead_s=ahead_s,
            slack_s=max(_LEAST_SLACK_S, objective.ttft_limit_s(prompt) - prompt * capacity.prompt_token_s),
            load=expected * work_s / configured_s * self.strain,
        )

    # --- what is known ------------------------------------------------------------------------------------------

    def _take_in(self, snapshot: Snapshot) -> None:
        now_s = snapshot.now_s
        if self.last_s is None:
            self.last_s = self.last_request_s = now_s
        elapsed_s = max(0.0, now_s - self.last_s)
        self.last_s = now_s
        self.averages.fade(elapsed_s)
        self._hear(snapshot)
        requests, prompt = snapshot.arrived_requests, snapshot.arrived_prompt_tokens
        if prompt is None:
            prompt = requests * self.averages.prompt_tokens
        elif requests > 0:
            self.averages.requests += requests
            self.averages.prompt += prompt
        first, output = self.pools[0], self.averages.output_tokens
        self.demand.add(
            now_s,
            prompt * first.capacity.prompt_token_s + requests * output * decode_work_s(first.capacity, first.slots),
        )
        if self._in_system(snapshot) > 0 or requests > 0:
            self.last_request_s = now_s
        self._feel(snapshot, elapsed_s)

    def _hear(self, snapshot: Snapshot) -> None:
        """The replicas' reports."""
        alive: set[str] = set()
        for state in snapshot.pools:
            for report in state.reports:
                alive.add(report.replica_id)
                self.learners[state.name].observe(report)
                self.averages.answered(report.replica_id, report.finished, report.generated_tokens)
        self.averages.running = sum(one.running for state in snapshot.pools for one in state.reports)
        for learner in self.learners.values():
            learner.forget(alive)

    def _feel(self, snapshot: Snapshot, elapsed_s: float) -> None:
        """Slow integral control: the model is told to expect more where callers wait although it says they do not.

        By a fifth in three minutes, since a cold start lies between a change and its effect, back at half that speed,
        and by half at most: what is further off is a wrong capacity, which the learner corrects.
        """
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

    def _speed(self, pool: PoolConfig, work_s: float, prompt: float, output: float) -> float:
        """Of one replica, in replicas of the first pool."""
        own_s = request_work_s(self.learners[pool.name].capacity, pool.slots, prompt, output)
        return work_s / max(1e-9, own_s)

    # --- what is needed -----------------------------------------------------------------------------------------

    def _steady(self, now: _Moment, more: float) -> int:
        """Fleet that keeps the objective at the expected load times `more`."""
        most = 1 + math.ceil(sum(pool.max_replicas * now.speeds[pool.name] for pool in self.pools))
        return replicas_for(now.capacity, self.pools[0].slots, now.mix, self.config.objective, now.load * more, most)

    def _backlog(self, now: _Moment) -> float:
        """Replica-seconds of work that waits for its first token."""
        waiting = sum(one.waiting for state in now.states.values() for one in state.reports)
        count = waiting + now.snapshot.queued_requests
        if now.snapshot.queued_prompt_tokens is None:
            return count * now.work_s
        output_s = now.mix.output_tokens * decode_work_s(now.capacity, self.pools[0].slots)
        return now.snapshot.queued_prompt_tokens * now.capacity.prompt_token_s + count * output_s

    def _drain(self, now: _Moment, backlog: float) -> float:
        """Fleet behind whose backlog nobody waits too long (backlog / fleet, first come, first served), at the time
        when a replica started now is ready; those that start already are taken to be ready half-way.
        """
        there = now.fleet(lambda state: state.running) + now.fleet(lambda state: state.starting) / 2
        return max(0.0, backlog + (now.load - there) * now.ahead_s) / now.slack_s

    def _slots_needed(self, snapshot: Snapshot) -> int:
        """While the capacity of a replica is unknown, each request in the system needs a slot."""
        first = self.pools[0]
        if self.learners[first.name].intervals >= _LEARNED:
            return 0
        return math.ceil(self._in_system(snapshot) / (first.slots * _FILL) - 1e-9)

    def _share(self, wanted: float, now: _Moment) -> dict[str, int]:
        """Spread over the pools, cheap ones first, within bounds and price; running streams keep their replicas."""
        budget = self.config.max_price_per_hour
        left = math.inf if budget is None else budget
        replicas = {pool.name: pool.min_replicas for pool in self.pools}
        left -= sum(pool.price_per_hour * pool.min_replicas for pool in self.pools)
        open_need = wanted - sum(count * now.speeds[name] for name, count in replicas.items())

        def grow(pool: PoolConfig, count: int) -> int:
            nonlocal left
            more = max(0, min(count, pool.max_replicas) - replicas[pool.name])
            if pool.price_per_hour > 0 and left < math.inf:
                more = min(more, max(0, math.floor(left / pool.price_per_hour + 1e-9)))
            left -= more * pool.price_per_hour if more else 0.0
            replicas[pool.name] += more
            return more

        for pool in self.pools:
            open_need -= grow(pool, _streams_need(pool, now.states[pool.name])) * now.speeds[pool.name]
        for pool in self.pools:
            if open_need > 1e-6:
                more = math.ceil(open_need / now.speeds[pool.name] - 1e-6)
                open_need -= grow(pool, replicas[pool.name] + more) * now.speeds[pool.name]
        return replicas

    def _reason(self, figures: dict[str, float], replicas: dict[str, int], now: _Moment) -> str:
        total, before = sum(replicas.values()), sum(state.target for state in now.states.values())
        expected = f"{figures['load']:.2f} replicas of work expected within {now.ahead_s:g} s"
        if total == 0:
            return f"nobody asked for {self.config.zero_after_s:g} s"
        if figures["drain"] > figures["steady"]:
            text = (
                f"{figures['backlog_s']:.1f} replica-seconds wait; {figures['drain']:.1f} replicas clear them in time"
            )
        elif figures["wanted"] > figures["steady"] and total == before:
            text = f"{expected}; up to {figures['held']:g} were needed in the last {self.hold.seconds:g} s"
        else:
            text = f"{expected}; {figures['steady']:g} keep the objective"
        if total < figures["wanted"] - 1e-6:
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
