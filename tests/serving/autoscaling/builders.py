"""Small worlds for the autoscaling tests."""

from __future__ import annotations

from typing import Any

from modelyard.serving.autoscaling.model import (
    Capacity,
    Decision,
    Objective,
    PoolConfig,
    PoolState,
    ReplicaReport,
    ScalingConfig,
    Snapshot,
)
from modelyard.serving.autoscaling.policy import LatencyPolicy
from modelyard.serving.autoscaling.replay import ReplicaModel

CAPACITY = Capacity(prompt_token_s=0.0018, step_s=0.018, sequence_s=0.00275)
OBJECTIVE = Objective(ttft_s=5.0, ttft_per_1k_tokens_s=3.6, token_s=0.2, percentile=0.95)
MODEL = ReplicaModel(capacity=CAPACITY, slots=16, chunk_tokens=64, cold_start_s=10.0)


def pool(name: str = "pool", **changes: Any) -> PoolConfig:
    return PoolConfig(
        **{"name": name, "max_replicas": 50, "slots": 16, "cold_start_s": 10.0, "capacity": CAPACITY, **changes}
    )


def config(*pools: PoolConfig, **changes: Any) -> ScalingConfig:
    return ScalingConfig(pools=pools or (pool(),), objective=changes.pop("objective", OBJECTIVE), **changes)


def report(replica: int, at_s: float, *, running: float = 4, waiting: float = 0, name: str = "pool") -> ReplicaReport:
    """A replica that has read 500 and given out 50 tokens a second since it started at 0."""
    return ReplicaReport(f"{name}-{replica}", at_s, running, waiting, 500 * at_s, 50 * at_s, at_s)


def snapshot(
    at_s: float,
    replicas: int,
    *,
    target: int | None = None,
    requests: float = 0.0,
    prompt_tokens: float = 1000.0,
    queued: float = 0.0,
    running: float | None = None,
    **changes: Any,
) -> Snapshot:
    """One pool; `requests` of `prompt_tokens` each came since the last one."""
    state = PoolState("pool", replicas, replicas if target is None else target, changes.pop("reports", ()))
    return Snapshot(
        now_s=at_s,
        pools=(state,),
        arrived_requests=requests,
        arrived_prompt_tokens=requests * prompt_tokens,
        queued_requests=queued,
        running_requests=running if running is not None else 4.0 * replicas,
        **changes,
    )


def steady(policy: LatencyPolicy, seconds: int, rate: float, replicas: int, start_s: int = 0) -> Decision:
    """The decision after so long of the same demand; each second what was decided is there the next."""
    decision = None
    for second in range(start_s, start_s + seconds):
        decision = policy.decide(snapshot(float(second), replicas, requests=rate))
        replicas = decision.total
    assert decision is not None
    return decision
