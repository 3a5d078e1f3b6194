"""What a replica can do, learned from its own counters, and how long callers wait for a fleet of them."""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass

import numpy as np

from modelyard.serving.autoscaling.model import Capacity, Objective, ReplicaReport


@dataclass(frozen=True)
class Mix:
    """The average request, and how uneven the load is."""

    prompt_tokens: float
    output_tokens: float
    dispersion: float = 2.0
    """Variance of the work that arrives in a time, over its mean and the mean work of one request. 1 + the squared
    coefficient of variation of the work for Poisson arrivals, more for bursty ones."""


def request_work_s(capacity: Capacity, slots: int, prompt_tokens: float, output_tokens: float) -> float:
    """Seconds of a full replica that a request takes: its part of the steps it is in."""
    return prompt_tokens * capacity.prompt_token_s + output_tokens * decode_work_s(capacity, slots)


def decode_work_s(capacity: Capacity, slots: int) -> float:
    """Seconds of a full replica that one generated token takes."""
    return capacity.sequence_s + capacity.step_s / slots


def seconds_per_token(capacity: Capacity, mix: Mix, requests_per_s: float) -> float:
    """Mean seconds between a sequence's tokens on a replica that gets so many requests; inf when it cannot hold them.

    The batch b settles where it gives out as many tokens as are asked for: rate * output = b * (share of the time not
    spent on prompts) / (step_s + b * sequence_s).
    """
    reading = requests_per_s * mix.prompt_tokens * capacity.prompt_token_s
    free = 1 - reading - requests_per_s * mix.output_tokens * capacity.sequence_s
    if free <= 0:
        return math.inf
    batch = requests_per_s * mix.output_tokens * capacity.step_s / free
    return (capacity.step_s + batch * capacity.sequence_s) / (1 - reading)


def erlang_c(servers: int, load: float) -> float:
    """Probability that an arrival has to wait (Erlang 1917), `load` in servers."""
    if load >= servers:
        return 1.0
    blocked = 1.0
    for count in range(1, servers + 1):
        blocked = load * blocked / (count + load * blocked)
    return blocked / (1 - load / servers * (1 - blocked))


def wait_exceeds(servers: int, load: float, work_s: float, dispersion: float, limit_s: float) -> float:
    """P(wait > `limit_s`) with so many servers: M/M/n's exponential tail, its rate scaled for general work and
    arrivals (Allen-Cunneen; Whitt, "Approximations for the GI/G/m queue", 1993).
    """
    if load >= servers:
        return 1.0
    rate = 2 * (servers - load) / (work_s * dispersion)
    return erlang_c(servers, load) * math.exp(-rate * max(0.0, limit_s))


def replicas_for(capacity: Capacity, slots: int, mix: Mix, objective: Objective, load: float, most: int) -> int:
    """Least whole number of replicas that keeps the objective at this load (replica-seconds of work per second), at
    most `most`. By bisection: more replicas are never worse.
    """
    if load <= 0:
        return 0
    work_s = max(request_work_s(capacity, slots, mix.prompt_tokens, mix.output_tokens), 1e-9)
    slack_s = objective.ttft_limit_s(mix.prompt_tokens) - mix.prompt_tokens * capacity.prompt_token_s
    is_alone_slow = seconds_per_token(capacity, mix, 0.0) > objective.token_s  # no fleet would help

    def keeps(count: int) -> bool:
        if wait_exceeds(count, load, work_s, mix.dispersion, slack_s) > 1 - objective.percentile:
            return False
        return is_alone_slow or seconds_per_token(capacity, mix, load / work_s / count) <= objective.token_s

    low = max(1, math.ceil(min(load, most)))
    return bisect_left(range(low, most), True, key=keeps) + low


class CapacityLearner:
    """Fits `Capacity` to the counters of busy replicas by recursive least squares with forgetting (Ljung 1999).

    Between two reports of a replica that never ran dry, the seconds went into prompt tokens, steps and generated
    tokens; steps are generated tokens over the mean batch. Intervals at whose ends it was idle are left out.
    """

    forgetting = 0.999
    """A memory of a thousand intervals: the machine does not change, its neighbours do."""
    noise = 0.1
    """Variance of an interval's seconds over their square: the batch is known at its ends only."""
    min_interval_s = 5.0
    """Some dozen steps, so that what is half done at the ends weighs little."""

    def __init__(self, prior: Capacity) -> None:
        self.scale = np.array([prior.prompt_token_s, prior.step_s, prior.sequence_s]) + 1e-9
        self.theta = np.ones(3)
        self.covariance = np.eye(3)
        self.intervals = 0
        self.last: dict[str, ReplicaReport] = {}

    @property
    def capacity(self) -> Capacity:
        """As known now."""
        prompt_token_s, step_s, sequence_s = (float(value) for value in self.theta * self.scale)
        return Capacity(prompt_token_s=prompt_token_s, step_s=max(step_s, 1e-9), sequence_s=sequence_s)

    def observe(self, report: ReplicaReport) -> None:
        """Take in what a replica says; reports of one replica in the order of their time."""
        before = self.last.get(report.replica_id)
        if before is not None and report.at_s - before.at_s < self.min_interval_s:
            return
        self.last[report.replica_id] = report
        if before is None or report.generated_tokens < before.generated_tokens:
            return
        if not all(one.running >= 1 or one.waiting >= 1 for one in (before, report)):
            return
        generated = report.generated_tokens - before.generated_tokens
        batch = max(1.0, (before.running + report.running) / 2)
        parts = np.array([report.prompt_tokens - before.prompt_tokens, generated / batch, generated])
        self._fit(parts * self.scale, report.at_s - before.at_s)

    def forget(self, replica_ids: set[str]) -> None:
        """Drop all but these: the others are gone."""
        self.last = {name: report for name, report in self.last.items() if name in replica_ids}

    def _fit(self, parts: np.ndarray, seconds: float) -> None:
        """One equation parts . theta = seconds, weighted to one second so that long intervals do not shout."""
        row, value = parts / seconds, 1.0
        if not row.any():
            return
        gain = self.covariance @ row / (self.noise + row @ self.covariance @ row)
        self.theta = np.clip(self.theta + gain * (value - row @ self.theta), 0.05, 20.0)
        self.covariance = (self.covariance - np.outer(gain, row @ self.covariance)) / self.forgetting
        trace = float(np.trace(self.covariance))
        if trace > 3.0:  # no news in some direction: do not let its doubt grow without end
            self.covariance *= 3.0 / trace
        self.intervals += 1

    def state(self) -> dict[str, object]:
        """As JSON, for `restore`."""
        return {"theta": self.theta.tolist(), "covariance": self.covariance.tolist(), "intervals": self.intervals}

    def restore(self, state: dict[str, object]) -> None:
        """Go on from a `state`."""
        self.theta = np.array(state["theta"], dtype=float)
        self.covariance = np.array(state["covariance"], dtype=float)
        self.intervals = int(str(state["intervals"]))
