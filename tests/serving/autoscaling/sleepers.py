"""Deployments that hold their calls, for Serve itself; imported on the cluster."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from ray import serve

from modelyard.serving.autoscaling.model import Objective, PoolConfig, ScalingConfig
from modelyard.serving.autoscaling.serve import ReplicaStats
from modelyard.serving.protocol import EngineStats

POOLS = ScalingConfig(
    pools=(
        PoolConfig(name="dear", min_replicas=0, max_replicas=2, slots=4, cold_start_s=3.0, price_per_hour=5.0),
        PoolConfig(name="cheap", max_replicas=2, slots=4, cold_start_s=3.0),
    )
)


class Sleeper:
    """Holds each request; counts as a model server does."""

    def __init__(self, hold_s: float = 1.0) -> None:
        self.hold_s = hold_s
        self.stats = ReplicaStats(Objective())
        self.running = self.tokens = 0

    async def __call__(self) -> None:
        self.stats.accepted(1)
        self.running += 1
        await asyncio.sleep(self.hold_s)
        self.running -= 1
        self.tokens += 1
        self.stats.finished(time.monotonic(), 0.1)

    def record_autoscaling_stats(self) -> dict[str, float]:
        engine = EngineStats(self.running, 0, 0.0, self.stats.accepted_requests, self.tokens)
        return self.stats.metrics(engine, time.monotonic())


class Reporter:
    """Claims that as many requests wait inside it as it was told."""

    def __init__(self) -> None:
        self.stats = ReplicaStats(Objective())
        self.waiting = 0

    async def __call__(self, waiting: int) -> None:
        self.stats.accepted(2000)
        self.waiting = waiting

    def record_autoscaling_stats(self) -> dict[str, float]:
        return self.stats.metrics(EngineStats(0, self.waiting, 0.0, 0, 0), time.monotonic())


class Front:
    """Sends every call to the cheap pool."""

    def __init__(self, cheap: Any, dear: Any) -> None:
        self.cheap = cheap

    async def __call__(self) -> None:
        await self.cheap.remote()


def _pool(name: str) -> Any:
    options = {"num_cpus": 0.1}
    held = serve.deployment(Sleeper).options(name=name, ray_actor_options=options, max_ongoing_requests=4)
    return held.bind(120.0)  # longer than a replica takes to start on a busy machine


application = (
    serve.deployment(Front)
    .options(ray_actor_options={"num_cpus": 0.1}, max_ongoing_requests=100)
    .bind(_pool("cheap"), _pool("dear"))
)
