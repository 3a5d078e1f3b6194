"""A run on a lease trains on what it is given, makes way when asked, and goes on with what comes next."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from modelyard.cluster import FakeCluster, Node
from modelyard.errors import ConfigError, LeaseLostError
from modelyard.scheduling.client import Lease
from modelyard.scheduling.ledger import Status
from modelyard.scheduling.model import Request
from modelyard.scheduling.scheduler import Answer
from modelyard.training.elastic import room
from modelyard.training.leased import LeasedNodes, Selectors, check_lease, request_of, train_on


class Given(Lease):
    """A lease whose scheduler is a list of answers."""

    def __init__(self, *answers: Answer) -> None:
        super().__init__(Request(job_id="run", max_workers=4), service=object())
        self._answer, *self.rest = answers

    def say(self, answer: Answer) -> None:
        self._answer = answer

    def give_way(self, timeout_s: float | None = None) -> None:
        self._answer = self.rest.pop(0)


def running(must_yield: bool = False, **allocation: int) -> Answer:
    return Answer(Status.RUNNING, 1, allocation, must_yield, None, "to move" if must_yield else "")


def test_each_attempt_gets_one_selector_per_worker_of_its_allocation() -> None:
    lease, seen = Given(running(a=2), running(a=1, b=1)), []

    def fit(selectors: Selectors | None) -> str | None:
        seen.append([labels["ray.io/node-id"] for labels in selectors or ()])
        return "done" if len(seen) == 2 else None

    assert train_on(lease, fit, lambda reason: None) == "done"
    assert seen == [["a", "a"], ["a", "b"]]


def test_a_fit_is_asked_to_stop_when_the_lease_must_be_given_back() -> None:
    lease, asked = Given(running(a=1), running(b=1)), []

    def fit(selectors: Selectors | None) -> str | None:
        if lease.allocation == {"b": 1}:
            return "done"
        lease.say(running(must_yield=True, a=1))
        deadline = time.monotonic() + 10
        while not asked and time.monotonic() < deadline:
            time.sleep(0.01)
        return None

    assert train_on(lease, fit, asked.append) == "done"
    assert asked == ["to move"]


def test_a_lease_that_was_taken_ends_the_run() -> None:
    lease = Given(running(a=1))

    def fit(selectors: Selectors | None) -> None:
        lease.say(Answer(Status.LOST, 1))

    with pytest.raises(LeaseLostError, match="run the same command"):
        train_on(lease, fit, lambda reason: None)


def test_without_a_scheduler_nothing_is_pinned() -> None:
    assert train_on(Lease(Request(job_id="run"), None), lambda selectors: selectors is None, print) is True


def test_a_lease_shows_exactly_its_workers_room(token_config: Callable[..., Any]) -> None:
    nodes = [Node(name, {"CPU": 8}, {"CPU": 0}) for name in ("a", "b")] + [Node("c", {"CPU": 8}, {}, alive=False)]
    workers = token_config(workers={"min": 1, "max": 8}).workers
    leased = LeasedNodes(FakeCluster(nodes), workers.per_worker, {"a": 2, "c": 3})
    assert room(leased.nodes(), workers, {}) == 2


def test_a_config_becomes_a_request(token_config: Callable[..., Any]) -> None:
    lease = {"tenant": "vision", "priority": 3, "pools": "a100", "deadline_s": 60}
    config = token_config(lease=lease, workers={"min": 1, "max": 3, "cpus": 2})
    request = request_of(config, "run-1", now_s=100.0)
    assert (request.job_id, request.tenant, request.priority, request.pools) == ("run-1", "vision", 3, ("a100",))
    assert (request.min_workers, request.max_workers, dict(request.resources)) == (1, 3, {"CPU": 2})
    assert (request.deadline_s, request.work) == (160.0, config.training.max_steps)
    assert request_of(token_config(lease={"pools": "any"}), "run-1", 0.0).pools == ()


def test_a_pool_that_the_lease_excludes_is_refused(token_config: Callable[..., Any]) -> None:
    config = token_config(lease={"pools": ["l4"]}, workers={"min": 1, "max": 1, "pool": "a100"})
    with pytest.raises(ConfigError, match=r"not among lease\.pools"):
        check_lease(config)
