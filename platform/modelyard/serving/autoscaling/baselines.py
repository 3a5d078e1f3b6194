"""Other ways to scale, for comparison in a replay: Serve's default, a queue scaler like KEDA's, a fixed fleet.

They decide for one pool.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from modelyard.serving.autoscaling.model import ScalingConfig, Snapshot
from modelyard.serving.autoscaling.policy import LatencyPolicy


class Ours:
    """`LatencyPolicy`, once a second, on what was known a second before: inside Serve it hears of requests and replicas
    that much later.
    """

    period_s = 1.0
    reads_reports = True

    def __init__(self, config: ScalingConfig) -> None:
        self.policy = LatencyPolicy(config)
        self.before: Snapshot | None = None

    def decide(self, snapshot: Snapshot) -> dict[str, int]:
        """Replicas for each pool."""
        before, self.before = self.before, snapshot
        if before is None:
            return {pool.name: pool.target for pool in snapshot.pools}
        known = zip(before.pools, snapshot.pools, strict=True)
        pools = tuple(replace(now, reports=then.reports) for then, now in known)
        return self.policy.decide(replace(before, now_s=snapshot.now_s, pools=pools)).replicas


class Fixed:
    """Always as many."""

    period_s = 60.0
    reads_reports = False

    def __init__(self, replicas: int) -> None:
        self.replicas = replicas

    def decide(self, snapshot: Snapshot) -> dict[str, int]:
        """Replicas for each pool."""
        return {snapshot.pools[0].name: self.replicas}


class Planned:
    """A fleet planned beforehand for each second, started one cold start ahead."""

    period_s = 1.0
    reads_reports = False

    def __init__(self, replicas: Sequence[int], pool: str, cold_start_s: float) -> None:
        self.replicas, self.pool, self.ahead = replicas, pool, math.ceil(cold_start_s)

    def decide(self, snapshot: Snapshot) -> dict[str, int]:
        """Replicas for each pool: the most planned from now until a replica started now is ready."""
        now = min(int(snapshot.now_s), len(self.replicas) - 1)
        return {self.pool: max(self.replicas[now : now + self.ahead + 1])}


class ServeDefault:
    """The default policy of the installed Ray Serve: its own functions, defaults, decision cadence and metric lags.

    Ongoing requests are sampled every `look_back_period_s` * 0.2 and no less often than `metrics_interval_s`, sent
    every `metrics_interval_s`; the controller averages what it was sent over the look-back, the last sample holding
    until now, and decides every 0.1 s (`CONTROL_LOOP_INTERVAL_S`).
    """

    reads_reports = False

    def __init__(self, min_replicas: int, max_replicas: int, **settings: Any) -> None:
        from ray.serve import autoscaling_policy
        from ray.serve._private.constants import (
            CONTROL_LOOP_INTERVAL_S,
            RAY_SERVE_AUTOSCALING_METRIC_RECORD_INTERVAL_FACTOR,
        )
        from ray.serve.config import AutoscalingConfig

        self.module = autoscaling_policy
        self.period_s = CONTROL_LOOP_INTERVAL_S
        self.config = AutoscalingConfig(min_replicas=min_replicas, max_replicas=max_replicas, **settings)
        self.sample_s = min(
            self.config.look_back_period_s * RAY_SERVE_AUTOSCALING_METRIC_RECORD_INTERVAL_FACTOR,
            self.config.metrics_interval_s,
        )
        self.samples: deque[tuple[float, float]] = deque()
        self.sent: tuple[tuple[float, float], ...] = ()
        self.sample_at_s = self.send_at_s = 0.0
        self.policy_state: dict[str, Any] = {}

    def decide(self, snapshot: Snapshot) -> dict[str, int]:
        """Replicas for each pool."""
        now_s, pool = snapshot.now_s, snapshot.pools[0]
        self._measure(snapshot)
        context = _Context(pool.running, pool.target, self._mean(now_s), self.config, self.policy_state)
        desired, _ = self.module.replica_queue_length_autoscaling_policy(context)
        if pool.running == 0 and context.total_num_requests > 0:
            return {pool.name: self._bounded(desired)}
        desired = self.module._apply_scaling_factors(desired, pool.running, self.config)
        final, self.policy_state = self.module._apply_delay_logic(
            max(0, desired), pool.target, self.config, self.policy_state, _now=now_s
        )
        return {pool.name: self._bounded(final)}

    def _bounded(self, replicas: float) -> int:
        return int(max(self.config.min_replicas, min(self.config.max_replicas, math.ceil(replicas))))

    def _measure(self, snapshot: Snapshot) -> None:
        now_s = snapshot.now_s + 1e-9
        if now_s >= self.sample_at_s:
            self.samples.append((snapshot.now_s, (snapshot.running_requests or 0) + snapshot.queued_requests))
            self.sample_at_s += self.sample_s
        if now_s >= self.send_at_s:
            while self.samples and self.samples[0][0] < snapshot.now_s - self.config.look_back_period_s:
                self.samples.popleft()
            self.sent = tuple(self.samples)
            self.send_at_s += self.config.metrics_interval_s

    def _mean(self, now_s: float) -> float:
        if not self.sent or now_s <= self.sent[0][0]:
            return self.sent[-1][1] if self.sent else 0.0
        ends = [at_s for at_s, _ in self.sent[1:]] + [now_s]
        area = sum(value * (end - at_s) for (at_s, value), end in zip(self.sent, ends, strict=True))
        return area / (now_s - self.sent[0][0])


class _Context:
    """The part of Serve's `AutoscalingContext` that its default policy reads."""

    def __init__(self, running: int, target: int, requests: float, config: Any, state: dict[str, Any]) -> None:
        self.current_num_replicas, self.target_num_replicas = running, target
        self.total_num_requests, self.config, self.policy_state = requests, config, state


class QueueScaler:
    """KEDA 2 on a queue length, with the defaults of KEDA and of the HorizontalPodAutoscaler it drives.

    The metric is polled every 30 s, the autoscaler looks every 15 s and wants ceil(requests / target), ignores changes
    within 10 %, at most doubles or adds 4 in 15 s, whichever is more, and goes down to the most it wanted in the last
    300 s. (keda.sh/docs: pollingInterval; Kubernetes: horizontal pod autoscaling, default behavior.) Requests are
    those in the system, since a queue in front is empty until it is too late.
    """

    period_s = 15.0
    reads_reports = False
    poll_s = 30.0
    window_s = 300.0

    def __init__(self, min_replicas: int, max_replicas: int, target: float) -> None:
        self.bounds = (min_replicas, max_replicas)
        self.target = target
        self.poll_at_s = 0.0
        self.metric = 0.0
        self.wanted: deque[tuple[float, int]] = deque()

    def decide(self, snapshot: Snapshot) -> dict[str, int]:
        """Replicas for each pool."""
        now_s, pool = snapshot.now_s, snapshot.pools[0]
        if now_s + 1e-9 >= self.poll_at_s:
            self.metric = (snapshot.running_requests or 0) + snapshot.queued_requests
            self.poll_at_s += self.poll_s
        current = max(1, pool.target)
        wanted = math.ceil(self.metric / self.target)
        if abs(self.metric / (self.target * current) - 1) <= 0.1:
            wanted = current
        self.wanted.append((now_s, wanted))
        while self.wanted[0][0] < now_s - self.window_s:
            self.wanted.popleft()
        wanted = min(wanted, max(2 * current, current + 4))
        if wanted < current:
            wanted = min(current, max(value for _, value in self.wanted))
        return {pool.name: max(self.bounds[0], min(self.bounds[1], wanted))}
