"""The policy as Ray Serve calls it: from contexts and a replica's own numbers to replicas."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from tests.serving.autoscaling.builders import config, pool
from tests.serving.autoscaling.sleepers import POOLS, Reporter, Sleeper

from modelyard.serving.autoscaling.model import Objective, PoolConfig, ScalingConfig
from modelyard.serving.autoscaling.serve import (
    ApplicationScaling,
    LatencyScaling,
    ReplicaStats,
    Watch,
    application_policy,
    autoscaling_config,
)
from modelyard.serving.protocol import EngineStats


@dataclass(frozen=True)
class Deployment:
    """Like Serve's DeploymentID."""

    name: str


@dataclass(frozen=True)
class Replica:
    """Like Serve's ReplicaID."""

    unique_id: str


def context(at_s: float, replicas: int, *, queued: float = 0, busy: float = 0, **metrics: float) -> Any:
    """Serve's context; `metrics` are what replica `r0` reported last."""
    newest = {name: [SimpleNamespace(timestamp=at_s, value=value)] for name, value in metrics.items()}
    return SimpleNamespace(
        current_time=at_s,
        deployment_name="pool",
        current_num_replicas=replicas,
        target_num_replicas=replicas,
        total_queued_requests=queued,
        total_running_requests=busy,
        raw_metrics={name: {Replica("r0"): points} for name, points in newest.items()},
    )


def stats(accepted: int, engine: EngineStats | None = None) -> dict[str, float]:
    one = ReplicaStats(Objective())
    for _ in range(accepted):
        one.accepted(100)
    return one.metrics(engine or EngineStats(0, 0, 0.0, 0, 0), 0.0)


def test_a_burst_in_the_queue_is_answered_at_the_next_call() -> None:
    scaling = LatencyScaling(config(pool(max_replicas=20)).model_dump(mode="json"))
    assert scaling(context(0.0, 1))[0] == 1
    assert scaling(context(0.1, 1, queued=100, busy=16))[0] >= 100 / 16


def test_requests_are_counted_once_on_their_way_from_the_queue_to_a_replica() -> None:
    watch = Watch()
    arrived = [
        watch.snapshot({"pool": context(0.0, 1, **stats(0))}).arrived_requests,
        watch.snapshot({"pool": context(1.0, 1, queued=5, **stats(0))}).arrived_requests,
        watch.snapshot({"pool": context(2.0, 1, queued=0, **stats(2))}).arrived_requests,
        watch.snapshot({"pool": context(3.0, 1, queued=0, **stats(7))}).arrived_requests,
        watch.snapshot({"pool": context(4.0, 0)}).arrived_requests,
        watch.snapshot({"pool": context(5.0, 1, queued=3)}).arrived_requests,
    ]
    assert arrived == [0, 5, 0, 2, 0, 3]


def test_a_report_that_is_missing_for_a_while_brings_no_arrivals_when_it_is_back() -> None:
    watch = Watch()
    seen = [context(0.0, 1, **stats(5)), context(1.0, 1), context(2.0, 1, **stats(5)), context(3.0, 1, **stats(6))]
    arrived = [watch.snapshot({"pool": one}).arrived_requests for one in seen]
    assert arrived == [5, 0, 0, 1]


def test_without_reports_of_replicas_the_policy_keeps_slots_for_what_is_there() -> None:
    scaling = LatencyScaling(config(pool(slots=4, max_replicas=20)).model_dump(mode="json"))
    replicas, state = scaling(context(0.0, 2, busy=8))
    assert replicas == 3
    assert isinstance(state["reason"], str)


def test_a_replica_reports_numbers_only_and_forgets_old_latencies() -> None:
    one = ReplicaStats(Objective(ttft_s=2.0, ttft_per_1k_tokens_s=0.0))
    one.accepted(10)
    one.first_token(0.0, 3.0, 10)
    one.finished(1.0, 0.1)
    now = one.metrics(EngineStats(1, 2, 0.5, 10, 5), 1.0)
    assert all(isinstance(value, float) for value in now.values())
    assert (now["ttft_over_limit"], now["token_over_limit"], now["waiting"]) == (1.5, 0.5, 2.0)
    assert one.metrics(EngineStats(1, 2, 0.5, 10, 5), 90.0)["ttft_over_limit"] == 0.0


def test_pools_of_an_application_are_decided_together_and_others_left_alone() -> None:
    both = config(pool("cheap", max_replicas=2), pool("dear", price_per_hour=5.0, min_replicas=0))
    scaling = ApplicationScaling(both.model_dump(mode="json"))
    ids = {name: Deployment(name) for name in ("cheap", "dear", "gateway")}
    quiet = {ids[name]: context(0.0, count) for name, count in (("cheap", 1), ("dear", 0), ("gateway", 1))}
    assert scaling(quiet)[0] == {ids["cheap"]: 1, ids["dear"]: 0}
    busy = {**quiet, ids["cheap"]: context(0.1, 1, queued=100)}
    replicas, states = scaling(busy)
    assert replicas[ids["cheap"]] == 2
    assert replicas[ids["dear"]] > 1
    assert set(states) == {ids["cheap"], ids["dear"]}
    assert scaling({ids["cheap"]: quiet[ids["cheap"]]}) == ({}, {})


def test_serve_takes_the_options_as_they_are_and_builds_the_policy_from_them() -> None:
    one = pool(min_replicas=0, max_replicas=5, slots=8)
    with pytest.warns(DeprecationWarning, match="metrics_interval_s"):
        taken = AutoscalingConfig(**autoscaling_config(config(one), one))
    built = taken.policy.get_policy()(**taken.policy.policy_kwargs)
    assert built(context(0.0, 1, queued=50))[0] == 5
    assert (taken.min_replicas, taken.max_replicas, taken.upscale_delay_s, taken.downscale_delay_s) == (0, 5, 0, 0)
    several = config(pool("a"), pool("b"))
    assert "policy" not in autoscaling_config(several, several.pools[0])
    assert AutoscalingPolicy(**application_policy(several)).policy_kwargs["config"]["pools"][1]["name"] == "b"


# --- a real deployment ----------------------------------------------------------------------------------------------


@pytest.fixture
def real_serve(ray_cluster: str) -> Iterator[None]:
    from ray import serve

    serve.start(proxy_location="Disabled")
    try:
        yield
    finally:
        serve.shutdown()


def until(what: Callable[[], bool], timeout_s: float) -> float:
    """Seconds until it was so."""
    began = time.monotonic()
    while not what():
        assert time.monotonic() - began < timeout_s, f"not within {timeout_s} s"
        time.sleep(0.05)
    return time.monotonic() - began


@pytest.mark.ray
def test_a_real_deployment_grows_within_two_seconds_of_a_burst_and_shrinks_without_flapping(real_serve: None) -> None:
    from ray import serve

    one = PoolConfig(name="sleeper", max_replicas=3, slots=4, cold_start_s=2.0)
    scaling = ScalingConfig(pools=(one,), hold_s=6.0, objective=Objective(percentile=0.5))  # no fear of the next burst
    options = autoscaling_config(scaling, one)
    deployment = serve.deployment(Sleeper).options(
        name="sleeper", ray_actor_options={"num_cpus": 0.1}, max_ongoing_requests=4, autoscaling_config=options
    )
    handle = serve.run(deployment.bind(), name="burst", route_prefix=None)
    handle.remote().result(timeout_s=60)

    def states() -> dict[str, int]:
        counted = serve.status().applications["burst"].deployments["sleeper"].replica_states
        return {str(getattr(name, "value", name)): count for name, count in counted.items()}

    calls = [handle.remote() for _ in range(60)]
    assert until(lambda: sum(states().values()) == 3, 10) < 2.0
    until(lambda: states().get("RUNNING") == 3, 60)
    for call in calls:
        call.result(timeout_s=60)
    seen = [3]

    def shrunk() -> bool:
        running = states().get("RUNNING", 0) + states().get("STARTING", 0)
        if running != seen[-1]:
            seen.append(running)
        return running == 1

    until(shrunk, 180)
    assert seen == sorted(seen, reverse=True)


@pytest.mark.ray
def test_a_real_application_fills_its_cheap_pool_before_the_dear_one_starts(real_serve: None) -> None:
    from ray import serve
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    deployments = [{"name": one.name, "autoscaling_config": autoscaling_config(POOLS, one)} for one in POOLS.pools]
    application = {
        "name": "pools",
        "import_path": "tests.serving.autoscaling.sleepers:application",
        "route_prefix": None,
        "autoscaling_policy": application_policy(POOLS),
        "deployments": deployments,
    }
    _get_global_client().deploy_apps(ServeDeploySchema(applications=[application]))  # what the REST call does

    def states(name: str) -> dict[str, int]:
        counted = serve.status().applications["pools"].deployments[name].replica_states
        return {str(getattr(state, "value", state)): count for state, count in counted.items()}

    until(lambda: serve.status().applications["pools"].status == "RUNNING", 110)
    assert (states("cheap"), states("dear")) == ({"RUNNING": 1}, {})
    handle = serve.get_app_handle("pools")
    calls = [handle.remote() for _ in range(5)]  # one more than a replica's slots
    until(lambda: states("cheap") == {"RUNNING": 2}, 110)
    assert states("dear") == {}
    calls += [handle.remote() for _ in range(60)]
    until(lambda: states("dear").get("RUNNING", 0) >= 1, 110)
    assert states("cheap") == {"RUNNING": 2}
    for call in calls:
        call.cancel()


@pytest.mark.ray
def test_a_real_deployment_grows_by_what_its_replicas_report_alone(real_serve: None) -> None:
    from ray import serve

    one = PoolConfig(name="reporter", max_replicas=3, slots=4, cold_start_s=2.0)
    deployment = serve.deployment(Reporter).options(
        name="reporter",
        ray_actor_options={"num_cpus": 0.1},
        autoscaling_config=autoscaling_config(ScalingConfig(pools=(one,)), one),
    )
    handle = serve.run(deployment.bind(), name="reports", route_prefix=None)

    def replicas() -> int:
        return sum(serve.status().applications["reports"].deployments["reporter"].replica_states.values())

    handle.remote(0).result(timeout_s=60)
    assert replicas() == 1
    handle.remote(50).result(timeout_s=60)  # done at once: Serve itself sees no request
    until(lambda: replicas() == 3, 60)
