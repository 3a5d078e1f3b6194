"""A driver finds the scheduler that runs now, from any thread, and leaves no ghost in the line."""

from __future__ import annotations

import _thread
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray

from modelyard import cluster as clusters
from modelyard.cluster import FakeCluster, Node
from modelyard.errors import WaitTimeoutError
from modelyard.scheduling import service
from modelyard.scheduling.client import lease
from modelyard.scheduling.journal import Journal
from modelyard.scheduling.ledger import Status
from modelyard.scheduling.model import Request
from modelyard.scheduling.policies import policy
from modelyard.scheduling.scheduler import Scheduler


class Actor:
    """A scheduler without Ray: what an actor's handle offers, called at once."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.is_dead = False
        self.lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        return Method(self, name)


class Method:
    def __init__(self, actor: Actor, name: str) -> None:
        self.actor, self.name = actor, name

    def remote(self, *arguments: Any) -> Any:
        if self.actor.is_dead:
            raise ray.exceptions.RayActorError
        with self.actor.lock:
            result = getattr(self.actor.scheduler, self.name)(*arguments)
            self.actor.scheduler.decide()
            return result


class World:
    """One node of 2 GPUs, and the scheduler that `connect` finds."""

    def __init__(self, folder: Path) -> None:
        self.url = f"sqlite:///{folder / 'journal.db'}"
        self.actor = self.start()

    def start(self) -> Actor:
        node = Node("n1", {"GPU": 2.0}, {"GPU": 2.0})
        self.actor = Actor(Scheduler(Journal(self.url), FakeCluster([node]), policy("fifo")))
        return self.actor

    def status(self, job_id: str) -> Status:
        return self.actor.scheduler.ledger.entry(job_id).status


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    made = World(tmp_path)
    monkeypatch.setattr(clusters, "connect", lambda: None)
    monkeypatch.setattr(service, "connect", lambda: made.actor)
    monkeypatch.setattr(ray, "get", lambda value, timeout: value)
    return made


def test_a_driver_finds_the_scheduler_that_was_stopped_and_started_anew(world: World) -> None:
    with lease(Request(job_id="a"), renew_s=0.05) as held:
        world.actor.is_dead = True
        world.start()
        world.actor.scheduler.cancel("a")
        wait_until(lambda: held.must_yield)
        assert held.reason == "it was cancelled"


def test_threads_of_one_driver_may_ask_at_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = threading.Semaphore(1)

    def connect() -> None:
        assert inside.acquire(blocking=False), "two threads joined the cluster at once"
        threading.Event().wait(0.05)
        inside.release()

    monkeypatch.setattr(clusters, "connect", connect)

    def workers(job_id: str) -> int:
        with lease(Request(job_id=job_id)) as held:
            return held.workers

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(workers, "abcd")) == [1, 1, 1, 1]


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C reaches this process, also where a shell has started it in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_a_driver_that_no_longer_waits_leaves_the_line_at_once(world: World) -> None:
    with lease(Request(job_id="a", min_workers=2, max_workers=2)):
        threading.Timer(0.3, _thread.interrupt_main).start()
        with pytest.raises(KeyboardInterrupt), lease(Request(job_id="b")):
            pass
        assert world.status("b") is Status.CANCELLED


def test_a_second_driver_that_gives_up_leaves_the_first_alone(world: World) -> None:
    with lease(Request(job_id="a"), renew_s=0.05) as held:
        with pytest.raises(WaitTimeoutError, match="another driver"), lease(Request(job_id="a"), timeout_s=0.1):
            pass
        assert world.status("a") is Status.RUNNING
        assert not held.must_yield
    assert world.status("a") is Status.DONE


def wait_until(condition: Any, timeout_s: float = 10.0) -> None:
    over = threading.Event()
    for _ in range(int(timeout_s / 0.02)):
        if condition():
            return
        over.wait(0.02)
    raise AssertionError("it did not come true")
