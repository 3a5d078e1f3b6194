"""The policy inside Ray Serve's own autoscaler, and what a replica has to tell it.

Serve pickles this module by value and everything it imports by reference, so the package must be installed where the
controller runs. A policy lives in the controller, which calls it every 0.1 s; it only computes. Serve keeps what a
policy returns as state until the deployment's config changes or the controller dies, and hands it to no later one.

A replica reports itself through the method `record_autoscaling_stats`, by `ReplicaStats.metrics`. Without it the policy
sees only how many requests there are, and keeps enough slots for them.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping
from typing import Any

from modelyard.config import parse
from modelyard.serving.autoscaling.model import (
    Decision,
    Objective,
    PoolConfig,
    PoolState,
    ReplicaReport,
    ScalingConfig,
    Snapshot,
)
from modelyard.serving.autoscaling.policy import LatencyPolicy
from modelyard.serving.protocol import EngineStats

_LOG = logging.getLogger("ray.serve")
_PUSH_S = 0.5
"""Twice within the second after which a burst should be seen."""
_LOOK_BACK_S = 1.0
"""Serve wants it above the push interval; two pushes."""
_RECENT_S = 60.0
"""Of latencies: a hundred requests for a percentile of 99 at two a second."""


def autoscaling_config(config: ScalingConfig, pool: PoolConfig, initial_replicas: int | None = None) -> dict[str, Any]:
    """Serve's `autoscaling_config` of a pool's deployment: bounds, the policy, and no delay of Serve's own.

    With one pool the policy is part of it. With several, give the application `application_policy` beside it. The
    deployment should run with `max_ongoing_requests=pool.slots`.
    """
    settings: dict[str, Any] = {
        "min_replicas": pool.min_replicas,
        "max_replicas": pool.max_replicas,
        "target_ongoing_requests": pool.slots,
        "upscale_delay_s": 0.0,
        "downscale_delay_s": 0.0,
        "downscale_to_zero_delay_s": 0.0,
        # Called deprecated, yet in 2.60 the only way to have metrics sent more often than every 10 s: nothing reads
        # the environment variables that the warning names.
        "metrics_interval_s": _PUSH_S,
        "look_back_period_s": _LOOK_BACK_S,
        "aggregation_function": "max",  # the mean of a second would hide half of a burst
    }
    if initial_replicas is not None:
        settings["initial_replicas"] = initial_replicas
    if len(config.pools) == 1:
        settings["policy"] = _policy("LatencyScaling", config)
    return settings


def application_policy(config: ScalingConfig) -> dict[str, Any]:
    """Serve's `autoscaling_policy` of an application whose deployments are the pools of one model."""
    return _policy("ApplicationScaling", config)


def _policy(name: str, config: ScalingConfig) -> dict[str, Any]:
    kwargs = {"config": config.model_dump(mode="json")}
    return {"policy_function": f"modelyard.serving.autoscaling.serve:{name}", "policy_kwargs": kwargs}


class ReplicaStats:
    """Counts what a replica does, for `record_autoscaling_stats`. Called from one event loop.

    A server calls `accepted`, `first_token` and `finished` for each request and returns `metrics(engine.stats())`.
    """

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.accepted_requests = self.accepted_tokens = self.finished_requests = 0
        self.firsts: deque[tuple[float, float]] = deque()
        self.paces: deque[tuple[float, float]] = deque()

    def accepted(self, prompt_tokens: int) -> None:
        """A request came in."""
        self.accepted_requests += 1
        self.accepted_tokens += prompt_tokens

    def first_token(self, now_s: float, seconds: float, prompt_tokens: int) -> None:
        """Its first token went out, so long after it came in."""
        self.firsts.append((now_s, seconds / self.objective.ttft_limit_s(prompt_tokens)))

    def finished(self, now_s: float, seconds_per_token: float) -> None:
        """It ended, also by an error or by being cancelled."""
        self.finished_requests += 1
        self.paces.append((now_s, seconds_per_token / self.objective.token_s))

    def metrics(self, engine: EngineStats, now_s: float) -> dict[str, float]:
        """All that the policy reads of a replica, numbers only: Serve drops a replica's stats for ever after one that
        is none.
        """
        return {
            "accepted_requests": float(self.accepted_requests),
            "accepted_prompt_tokens": float(self.accepted_tokens),
            "finished_requests": float(self.finished_requests),
            "prompt_tokens": float(engine.prompt_tokens),
            "generated_tokens": float(engine.generated_tokens),
            "running": float(engine.running),
            "waiting": float(engine.waiting),
            "cache_usage": float(engine.cache_usage),
            "ttft_over_limit": self._percentile(self.firsts, now_s),
            "token_over_limit": self._percentile(self.paces, now_s),
        }

    def _percentile(self, seen: deque[tuple[float, float]], now_s: float) -> float:
        """Of the last minute; 0 when there was nothing."""
        while seen and seen[0][0] < now_s - _RECENT_S:
            seen.popleft()
        ordered = sorted(value for _, value in seen)
        return ordered[min(len(ordered) - 1, int(self.objective.percentile * len(ordered)))] if ordered else 0.0


class Watch:
    """Turns Serve's contexts into snapshots; remembers counters to tell what arrived in between."""

    def __init__(self) -> None:
        self.counters: dict[str, tuple[float, float]] = {}
        """Requests and prompt tokens that a replica has accepted, of all that ever were: a report that is late is
        missing for a while, and its replica must not seem new when it is back.
        """
        self.accepted = [0.0, 0.0]
        """Their sums."""
        self.most = [0.0, 0.0]
        """Requests, accepted or queued, and tokens accepted, that were seen already."""
        self.ongoing = 0.0

    def snapshot(self, contexts: Mapping[str, Any]) -> Snapshot:
        """What Serve knows now; contexts by the name of the deployment."""
        now_s = max(context.current_time for context in contexts.values())
        queued = sum(context.total_queued_requests or 0.0 for context in contexts.values())
        running = sum(context.total_running_requests for context in contexts.values())
        pools, late, slow, alive = [], [0.0], [0.0], dict[str, tuple[float, float]]()
        for name, context in contexts.items():
            reports = []
            for replica_id, stats in _latest(context.raw_metrics or {}).items():
                if "accepted_requests" not in stats:
                    continue
                at_s, values = stats["accepted_requests"][0], {key: value for key, (_, value) in stats.items()}
                alive[replica_id] = (values["accepted_requests"], values["accepted_prompt_tokens"])
                late.append(values["ttft_over_limit"])
                slow.append(values["token_over_limit"])
                reports.append(
                    ReplicaReport(
                        replica_id=replica_id,
                        at_s=at_s,
                        running=values["running"],
                        waiting=values["waiting"],
                        prompt_tokens=values["prompt_tokens"],
                        generated_tokens=values["generated_tokens"],
                        finished=values["finished_requests"],
                        cache_usage=values["cache_usage"],
                    )
                )
            pools.append(PoolState(name, context.current_num_replicas, context.target_num_replicas, tuple(reports)))
        requests, tokens = self._arrived(alive, queued, queued + running)
        return Snapshot(
            now_s=now_s,
            pools=tuple(pools),
            arrived_requests=requests,
            arrived_prompt_tokens=tokens,
            queued_requests=queued,
            running_requests=running,
            ttft_over_limit=max(late) or None,
            token_over_limit=max(slow) or None,
        )

    def _arrived(
        self, alive: dict[str, tuple[float, float]], queued: float, ongoing: float
    ) -> tuple[float, float | None]:
        """New requests and their tokens. A request moves from the queue to a counter with some delay: the sum counts
        when it passes what it was at most.
        """
        grown, self.ongoing = max(0.0, ongoing - self.ongoing), ongoing
        if not alive and not self.counters:
            return grown, None  # no replica has ever reported: what the number in the system grew by, at least
        for replica_id, seen in alive.items():
            before = self.counters.get(replica_id, (0.0, 0.0))
            self.counters[replica_id] = (max(before[0], seen[0]), max(before[1], seen[1]))
            self.accepted = [
                total + max(0.0, new - old) for total, new, old in zip(self.accepted, seen, before, strict=True)
            ]
        now = [self.accepted[0] + queued, self.accepted[1]]
        arrived = max(0.0, now[0] - self.most[0])
        accepted_tokens = max(0.0, now[1] - self.most[1])
        self.most = [max(pair) for pair in zip(self.most, now, strict=True)]
        return arrived, accepted_tokens if arrived and not queued else None


def _latest(metrics: Mapping[str, Mapping[Any, Any]]) -> dict[str, dict[str, tuple[float, float]]]:
    """Of each replica, by metric: when, and the newest value."""
    replicas: dict[str, dict[str, tuple[float, float]]] = {}
    for metric, series in metrics.items():
        for replica, points in series.items():
            if points:
                newest = points[-1]
                replicas.setdefault(replica.unique_id, {})[metric] = (newest.timestamp, newest.value)
    return replicas


class LatencyScaling:
    """For `AutoscalingPolicy(policy_function=..., policy_kwargs={"config": ...})` of one deployment."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = parse(ScalingConfig, config)
        self.policy = LatencyPolicy(self.config)
        self.watch = Watch()

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """Replicas of the deployment, and why."""
        pool = self.config.pools[0].name
        before = context.target_num_replicas
        decision = self.policy.decide(self.watch.snapshot({pool: context}))
        _tell(context.deployment_name, before, decision.replicas[pool], decision)
        return decision.replicas[pool], {"reason": decision.reason, **decision.figures}


class ApplicationScaling:
    """For an application's `autoscaling_policy`: pools are its deployments; those that are no pool are left alone."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = parse(ScalingConfig, config)
        self.policy = LatencyPolicy(self.config)
        self.watch = Watch()

    def __call__(self, contexts: Mapping[Any, Any]) -> tuple[dict[Any, int], dict[Any, dict[str, Any]]]:
        """Replicas of each pool, and why; nothing until all pools are deployed."""
        ids = {deployment.name: deployment for deployment in contexts}
        pools = [pool.name for pool in self.config.pools]
        if any(name not in ids for name in pools):
            return {}, {}
        decision = self.policy.decide(self.watch.snapshot({name: contexts[ids[name]] for name in pools}))
        for name in pools:
            _tell(name, contexts[ids[name]].target_num_replicas, decision.replicas[name], decision)
        state = {"reason": decision.reason, **decision.figures}
        return {ids[name]: decision.replicas[name] for name in pools}, {ids[name]: dict(state) for name in pools}


def _tell(name: str, before: int, after: int, decision: Decision) -> None:
    if before != after:
        _LOG.info("%s: %d -> %d replicas: %s", name, before, after, decision.reason)
