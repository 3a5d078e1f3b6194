"""How many workers start, when a gang grows, and which failures are retried. No Ray is started."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision
from ray.train.v2.api.config import FailureConfig, ScalingConfig
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from modelyard.cluster import FakeCluster, Node, NodeGroup
from modelyard.errors import (
    CapacityError,
    ConfigError,
    DivergedError,
    IntegrityError,
    StorageError,
    TrainingError,
    WaitTimeoutError,
)
from modelyard.training import elastic
from modelyard.training.config import Workers
from modelyard.training.elastic import InterruptAwareFailurePolicy, RoomPolicy, check_capacity, room
from modelyard.training.interrupts import Interrupted


def node(name: str, free: float = 4, total: float = 4, **fields: Any) -> Node:
    return Node(node_id=name, total={"CPU": total, "memory": 1e10}, free={"CPU": free}, **fields)


# Room


def test_room_is_what_is_free_on_all_matching_nodes_up_to_the_maximum() -> None:
    nodes = [node("a", free=3), node("b", free=1)]
    assert room(nodes, Workers(max=8), {}) == 4
    assert room(nodes, Workers(max=2), {}) == 2
    assert room(nodes, Workers(max=8, cpus=2), {}) == 1


def test_dead_and_draining_nodes_are_no_room() -> None:
    nodes = [node("a"), node("b", alive=False), node("c", draining=True)]
    assert room(nodes, Workers(max=20), {}) == 4
    assert room(nodes, Workers(max=20), {"b": 2, "c": 2}) == 4, "not even where own workers still sit"


def test_a_place_the_run_holds_itself_is_room() -> None:
    assert room([node("a", free=1), node("b", free=0)], Workers(max=8), {"a": 3, "b": 4}) == 8


@pytest.mark.parametrize(
    ("selector", "expected"), [({"zone": "a"}, 4), ({"zone": "!a"}, 8), ({"zone": "in(a,b)"}, 8), ({"zone": "c"}, 0)]
)
def test_only_nodes_with_the_asked_labels_are_room(selector: dict[str, str], expected: int) -> None:
    nodes = [node("1", labels={"zone": "a"}), node("2", labels={"zone": "b"}), node("3")]
    assert room(nodes, Workers(max=20, label_selector=selector), {}) == expected


def test_a_pool_is_a_label() -> None:
    nodes = [node("1", labels={"modelyard/pool": "big"}), node("2")]
    assert room(nodes, Workers(max=20, pool="big"), {}) == 4


# Capacity


def refusal(nodes: Sequence[Node], workers: Workers, groups: Sequence[NodeGroup] = ()) -> str:
    with pytest.raises(CapacityError) as caught:
        check_capacity(FakeCluster(nodes, groups), workers)
    return str(caught.value)


def test_a_busy_cluster_that_could_hold_the_gang_is_not_refused() -> None:
    check_capacity(FakeCluster([node("a", free=0), node("b", free=0)]), Workers(min=8, max=8))


def test_more_workers_than_the_cluster_can_hold_are_refused_with_what_it_has() -> None:
    text = refusal([node("a"), node("b", total=2)], Workers(min=7, max=9))
    assert "workers.min=7 workers of 1 CPU each do not fit: room for 6 on 2 matching node(s)" in text
    assert "with 4 CPU; 2 CPU" in text
    assert "set workers to at most 6" in text


def test_a_worker_larger_than_every_node_is_refused_with_its_size() -> None:
    text = refusal([node("a"), node("b")], Workers(cpus=5, gpus=1))
    assert "5 CPU, 1 GPU each do not fit: room for 0" in text
    assert "add nodes" in text


def test_a_selector_that_matches_no_node_is_refused_with_the_labels_there_are() -> None:
    text = refusal([node("a", labels={"zone": "x"}), node("b", labels={"zone": "y"})], Workers(pool="h100"))
    assert "{'modelyard/pool': 'h100'}" in text
    assert "labels in this cluster: zone=x, zone=y" in text


def test_dead_nodes_hold_nothing() -> None:
    assert "room for 4 on 1" in refusal([node("a"), node("b", alive=False)], Workers(min=5, max=5))


def test_an_autoscaler_may_bring_what_is_missing_but_not_more_than_its_limits() -> None:
    groups = [NodeGroup("cpu", {"CPU": 4.0}, max_count=1)]
    check_capacity(FakeCluster([node("a")], groups), Workers(min=8, max=8))
    assert "room for 8" in refusal([node("a")], Workers(min=9, max=9), groups)
    assert "room for 0" in refusal([node("a")], Workers(gpus=1), groups)
    check_capacity(FakeCluster([], groups), Workers(pool="cpu"))


def test_memory_is_told_when_memory_is_what_is_missing() -> None:
    text = refusal([node("a")], Workers(resources={"memory": 2e10}))
    assert "1 CPU, 18.6 GiB memory each do not fit" in text
    assert "with 4 CPU, 9.31 GiB memory" in text


# RoomPolicy, stepped by hand


class Clock:
    """Stands in for the module `time`; only `sleep` and the test move it."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(elastic, "time", clock)
    return clock


class Stage:
    """A policy on a cluster that the test changes, and the sizes it has asked the workers for."""

    def __init__(self, nodes: Sequence[Node], **workers: Any) -> None:
        self.asked: list[int] = []
        self.nodes = list(nodes)
        sizes = Workers.model_validate(workers)
        scaling = ScalingConfig(num_workers=sizes.max, resources_per_worker=sizes.per_worker)
        self.policy = RoomPolicy(scaling, sizes, self.asked.append, FakeCluster(self.nodes))
        self.policy._coordinator_client = SimpleNamespace(maybe_send_resource_request=lambda *_: None)

    def leave(self) -> None:
        """The driver leaves."""
        self.policy._is_closing = lambda: True

    def start(self) -> Any:
        return self.policy.make_decision_for_non_running_worker_group()

    def watch(self, *on_nodes: str) -> Any:
        """One look at a running gang with a worker on each of these nodes."""
        workers = [SimpleNamespace(metadata=SimpleNamespace(node_id=name)) for name in on_nodes]
        state = SimpleNamespace(workers=workers, num_workers=len(workers))
        return self.policy.make_decision_for_running_worker_group(state, SimpleNamespace())


def test_a_run_starts_with_as_many_workers_as_fit(clock: Clock) -> None:
    assert Stage([node("a")], min=2, max=8).start() == ResizeDecision(4, {"CPU": 1.0})
    assert Stage([node("a")], min=2, max=3).start() == ResizeDecision(3, {"CPU": 1.0})


def test_a_run_waits_for_its_minimum_and_starts_when_there_is_room(clock: Clock) -> None:
    stage = Stage([node("a", free=1)], min=2, max=8)
    assert stage.start() == NoopDecision()
    stage.nodes.append(node("b", free=2))
    assert stage.start() == ResizeDecision(3, {"CPU": 1.0})


def test_waiting_ends_with_an_error_that_names_the_room_and_the_setting(clock: Clock) -> None:
    stage = Stage([node("a", free=1)], min=2, max=2, start_timeout_s=5)
    while clock.now < 105:
        assert stage.start() == NoopDecision()
    with pytest.raises(WaitTimeoutError) as caught:
        stage.start()
    assert 105 <= clock.now < 106
    assert "waited 5 s for room for 2 workers of 1 CPU (there is room for 1)" in str(caught.value)
    assert "workers.start_timeout_s" in str(caught.value)


def test_the_wait_is_counted_anew_after_each_start(clock: Clock) -> None:
    stage = Stage([node("a", free=1)], min=2, max=2, start_timeout_s=5)
    stage.start()
    clock.now += 4
    stage.nodes[0] = node("a", free=2)
    stage.start()
    stage.nodes[0] = node("a", free=1)
    clock.now += 4
    assert stage.start() == NoopDecision()


def test_a_running_gang_is_asked_to_grow_once_per_interval_and_never_resized_by_force(clock: Clock) -> None:
    stage = Stage([node("a", free=0)], min=1, max=8, resize_interval_s=30)
    stage.nodes.append(node("b", free=2))
    assert stage.watch("a", "a") == NoopDecision()
    assert stage.asked == [], "the interval has not passed"
    clock.now += 31
    assert [stage.watch("a", "a"), stage.watch("a", "a")] == [NoopDecision(), NoopDecision()]
    assert stage.asked == [4]


def test_a_gang_that_would_not_be_larger_is_left_alone(clock: Clock) -> None:
    full = Stage([node("a", free=4)], min=1, max=2)
    no_room = Stage([node("a", free=0)], min=1, max=8)
    clock.now += 1000
    full.watch("a", "a")
    no_room.watch("a", "a")
    assert full.asked == no_room.asked == []


def test_after_a_failure_the_places_of_the_old_gang_count_as_room_once(clock: Clock) -> None:
    stage = Stage([node("a", free=0), node("b", free=1)], min=1, max=8)
    stage.watch("a", "a", "b")
    assert stage.start() == ResizeDecision(4, {"CPU": 1.0})
    assert stage.start() == ResizeDecision(1, {"CPU": 1.0}), "their placement group has gone since"


def test_a_lost_node_takes_its_places_with_it(clock: Clock) -> None:
    stage = Stage([node("a", free=0), node("b", free=1)], min=1, max=8)
    stage.watch("a", "a", "b")
    stage.nodes[0] = node("a", alive=False)
    assert stage.start() == ResizeDecision(2, {"CPU": 1.0})


# InterruptAwareFailurePolicy


def test_no_gang_starts_for_a_driver_that_leaves() -> None:
    stage = Stage([node("a")], min=1, max=2)
    stage.leave()
    with pytest.raises(TrainingError, match="driver leaves"):
        stage.start()


class Wrapped(Exception):  # noqa: N818
    """As Ray Train hands a worker's exception over."""

    def __init__(self, inner: BaseException) -> None:
        self._base_exc = inner


def failed(*causes: BaseException) -> WorkerGroupError:
    return WorkerGroupError("it failed", {rank: Wrapped(cause) for rank, cause in enumerate(causes)})


@pytest.fixture
def policy() -> InterruptAwareFailurePolicy:
    return InterruptAwareFailurePolicy(FailureConfig(max_failures=1))


def test_interruptions_are_retried_without_end(policy: InterruptAwareFailurePolicy) -> None:
    for step in range(20):
        error = failed(Interrupted("a node is about to be taken away", step), RuntimeError("connection closed"))
        assert policy.make_decision(error) is FailureDecision.RETRY


def test_interruptions_do_not_use_up_the_retries_of_failures(policy: InterruptAwareFailurePolicy) -> None:
    for _ in range(5):
        policy.make_decision(failed(Interrupted("resize", 1)))
    assert policy.make_decision(failed(RuntimeError("bug"))) is FailureDecision.RETRY
    assert policy.make_decision(failed(RuntimeError("bug"))) is FailureDecision.RAISE


@pytest.mark.parametrize(
    "cause", [ConfigError("x"), IntegrityError("x"), DivergedError("x"), WaitTimeoutError("x", 1, "y")]
)
def test_what_a_retry_cannot_change_is_raised_at_once(policy: InterruptAwareFailurePolicy, cause: Exception) -> None:
    retried = isinstance(cause, WaitTimeoutError)  # a slow upload may be faster next time
    expected = FailureDecision.RETRY if retried else FailureDecision.RAISE
    assert policy.make_decision(failed(RuntimeError("connection closed"), cause)) is expected


def test_a_storage_error_is_retried_within_the_budget(policy: InterruptAwareFailurePolicy) -> None:
    assert policy.make_decision(failed(StorageError("unreachable"))) is FailureDecision.RETRY
    assert policy.make_decision(failed(StorageError("unreachable"))) is FailureDecision.RAISE


def test_a_gang_that_could_not_be_placed_is_tried_again_but_a_bad_wait_is_not(
    policy: InterruptAwareFailurePolicy,
) -> None:
    assert policy.make_decision(ControllerError(WorkerGroupStartupTimeoutError(2))) is FailureDecision.RETRY
    assert policy.make_decision(ControllerError(WaitTimeoutError("room", 5, "x"))) is FailureDecision.RAISE


def test_an_interruption_survives_the_way_between_processes() -> None:
    again = pickle.loads(pickle.dumps(Interrupted("resize", 7)))
    assert str(again) == "interrupted at step 7: resize"
