"""The run's monitor as a plain object, and the thread that feeds it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from modelyard.training import monitor
from modelyard.training.monitor import Reporter, RunMonitor


def test_records_come_out_in_order_from_any_number_on() -> None:
    box = RunMonitor()
    box.push([{"step": 1}, {"step": 2}])
    box.push([])
    box.push([{"step": 3}])
    assert box.pull(0) == [{"step": 1}, {"step": 2}, {"step": 3}]
    assert box.pull(2) == [{"step": 3}]
    assert box.pull(3) == []


def test_a_wish_travels_back_on_every_push_until_a_new_gang_runs() -> None:
    box = RunMonitor()
    assert box.push([]) is None
    box.request("resize", "room for 4 workers")
    assert box.push([]) == box.push([]) == ("resize", "room for 4 workers")
    box.started()
    assert box.push([]) is None


def test_a_later_resize_replaces_an_earlier_one() -> None:
    box = RunMonitor()
    box.request("resize", "room for 3")
    box.request("resize", "room for 4")
    assert box.push([]) == ("resize", "room for 4")


def test_a_stop_is_never_taken_back() -> None:
    box = RunMonitor()
    box.request("resize", "room for 3")
    box.request("stop", "asked for")
    box.request("resize", "room for 4")
    box.started()
    assert box.push([]) == ("stop", "asked for")


class Handle:
    """Stands in for the actor: calls go straight to a `RunMonitor`, or fail."""

    def __init__(self, box: RunMonitor | None) -> None:
        self.push = Method(box, "push")
        self.started = Method(box, "started")


class Method:
    """One remote method of the stand-in; calling it is left to the fake `ray.get`."""

    def __init__(self, box: RunMonitor | None, name: str) -> None:
        self.box, self.name = box, name

    def remote(self, *arguments: Any) -> Callable[[], Any]:
        def call() -> Any:
            if self.box is None:
                raise monitor.ray.exceptions.GetTimeoutError("gone")
            return getattr(self.box, self.name)(*arguments)

        return call


@pytest.fixture
def fake_get(monkeypatch: pytest.MonkeyPatch) -> None:
    def get(call: Any, timeout: float) -> Any:
        return call()

    monkeypatch.setattr(monitor.ray, "get", get)


def test_the_reporter_pushes_everything_by_the_time_it_is_closed(fake_get: None) -> None:
    box = RunMonitor()
    box.request("stop", "asked for")
    reporter = Reporter(Handle(box), interval_s=60)
    for step in range(3):
        reporter.record("step", {"step": step})
    reporter.close()
    assert [(record["kind"], record["step"]) for record in box.pull(0)] == [("step", 0), ("step", 1), ("step", 2)]
    assert reporter.wish == ("stop", "asked for")


def test_a_wish_that_ended_the_last_gang_does_not_reach_the_next(fake_get: None) -> None:
    box = RunMonitor()
    box.request("resize", "room for 2 workers")
    reporter = Reporter(Handle(box), interval_s=60)
    reporter.close()
    assert reporter.wish is None


def test_a_monitor_out_of_reach_costs_the_run_nothing(fake_get: None, caplog: pytest.LogCaptureFixture) -> None:
    reporter = Reporter(Handle(None), interval_s=60)
    reporter.record("step", {"step": 1})
    reporter.close()
    assert "does not answer; 1 records were not shown" in caplog.text
