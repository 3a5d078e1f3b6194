"""`modelyard scheduler`, `pools`, `queue` and `quota` on a real cluster, as a person would type them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from modelyard.cli.main import modelyard
from modelyard.cli.pools import summarize
from modelyard.cluster import Node
from modelyard.errors import ConfigError, IntegrityError, NotFoundError
from modelyard.scheduling.journal import Journal
from modelyard.scheduling.ledger import Entry
from modelyard.scheduling.model import Request

Say = Callable[..., str]


def say(*words: str) -> str:
    """Run a command; its output. An error of ours is raised as itself."""
    found = CliRunner().invoke(modelyard, words)
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    assert found.exit_code == 0, found.output
    return found.output


@pytest.fixture
def scheduler(ray_cluster: str, tmp_path: Path) -> Iterator[str]:
    journal = f"sqlite:///{tmp_path / 'journal.db'}"
    assert "policy priority" in say("scheduler", "start", "--policy", "priority", "--journal", journal)
    yield journal
    say("scheduler", "stop")


def submit(job: str, workers: int, work: float | None = None) -> None:
    from modelyard.scheduling import service

    request = Request(job_id=job, min_workers=workers, max_workers=workers, resources={"CPU": 1.0}, work=work)
    service.call(service.required().submit, request)


def row(job: str) -> Any:
    return next(each for each in json.loads(say("queue", "--all", "--json")) if each["job"] == job)


def settled(job: str, state: str) -> Any:
    """The job's row once its state is `state`; the scheduler decides within a second or two."""
    import time

    deadline = time.monotonic() + 20
    while (found := row(job))["state"] != state or (state == "waiting" and not found["reason"]):
        assert time.monotonic() < deadline, found
        time.sleep(0.1)
    return found


@pytest.mark.ray
def test_the_queue_is_shown_explained_and_steered(scheduler: str) -> None:
    submit("first", 3)
    assert settled("first", "running")["lease"] == "3 in default"
    submit("second", 2)
    waiting = settled("second", "waiting")
    assert waiting["place"] == 1
    explained = say("queue", "explain", "second")
    assert "asks for   2 workers of 1 CPU in any pool" in explained
    assert "needs 2 CPUs" in explained
    assert "  -> " in explained, "it says what would help"
    (pool,) = json.loads(say("pools", "--json"))
    assert (pool["total"], pool["leased"], pool["held_by"]) == (4, 3, {"first": 3})
    assert "first x3" in say("pools")
    assert "priority 7" in say("queue", "priority", "second", "7")
    assert row("second")["priority"] == 7
    say("queue", "hold", "second")
    assert settled("second", "held")
    say("queue", "release", "second")
    assert settled("second", "waiting")
    say("queue", "cancel", "second")
    assert settled("second", "cancelled")
    say("queue", "cancel", "first")
    assert "must yield within" in say("queue", "explain", "first") or row("first")["reason"]
    with pytest.raises(NotFoundError, match="did you mean 'first'"):
        say("queue", "explain", "frist")


@pytest.mark.ray
def test_the_queue_says_when_a_waiting_job_is_expected_to_start(scheduler: str) -> None:
    submit("first", 4, work=4000.0)  # 4 workers make 4 units a second, once 30 s of start are over
    settled("first", "running")
    submit("second", 4)
    submit("third", 4)
    assert 1000 < settled("second", "waiting")["starts_in_s"] <= 1030
    assert settled("third", "waiting")["starts_in_s"] is None, "second does not say how long it takes"
    assert "starts     in about 17 min, if nothing new comes" in say("queue", "explain", "second")
    assert "starts     nobody knows when" in say("queue", "explain", "third")


@pytest.mark.ray
def test_quotas_are_set_shown_and_checked(scheduler: str) -> None:
    say("quota", "set", "vision", "--guaranteed", "default=2", "--limit", "default=3", "--weight", "2")
    say("quota", "set", "ocr", "--parent", "vision")
    rows = {each["tenant"]: each for each in json.loads(say("quota", "show", "--json"))}
    assert (rows["vision"]["guaranteed"], rows["vision"]["limit"]) == ({"default": 2}, {"default": 3})
    assert rows["ocr"]["parent"] == "vision"
    assert "default 3" in say("quota", "show", "vision")
    with pytest.raises(ConfigError, match=r"vision -> ocr|ocr -> vision"):
        say("quota", "set", "vision", "--parent", "ocr")
    with pytest.raises(ConfigError, match="'defualt', which is no pool; known: default"):
        say("quota", "set", "vision", "--limit", "defualt=3")
    with pytest.raises(NotFoundError, match="did you mean 'vision'"):
        say("quota", "show", "visoin")
    found = CliRunner().invoke(modelyard, ["quota", "set", "x", "--limit", "a100:8"])
    assert found.exit_code == 2
    assert "is not POOL=GPUS" in found.output


@pytest.mark.ray
def test_a_damaged_journal_is_refused_with_the_command_that_repairs_it(ray_cluster: str, tmp_path: Path) -> None:
    import sqlalchemy as sql

    url = f"sqlite:///{tmp_path / 'journal.db'}"
    journal = Journal(url)
    journal.append(("tenant_removed", {"name": "a"}), ("tenant_removed", {"name": "b"}))
    with sql.create_engine(url).begin() as connection:
        connection.execute(sql.text("UPDATE scheduler_events SET body = '{}' WHERE line = 2"))
    with pytest.raises(IntegrityError, match="line 2") as caught:
        say("scheduler", "start", "--journal", url)
    command = caught.value.todo.partition("modelyard ")[2].split()
    assert "1 lines dropped, 1 left" in say(*command, "--yes")


@pytest.mark.ray
def test_without_a_scheduler_the_commands_say_how_to_start_one(ray_cluster: str) -> None:
    with pytest.raises(NotFoundError) as caught:
        say("queue")
    assert "modelyard scheduler start" in caught.value.todo
    assert "4" in say("pools")


def test_pools_count_free_used_leased_and_broken_accelerators() -> None:
    label = {"modelyard/pool": "a100"}
    nodes = (
        Node("n1", {"GPU": 8, "CPU": 64}, {"GPU": 3}, label),
        Node("n2", {"GPU": 8, "CPU": 64}, {}, label, alive=False),
        Node("n3", {"CPU": 16}, {"CPU": 16}),
    )
    entry = Entry(Request(job_id="llm", max_workers=4, resources={"GPU": 1, "CPU": 2}), 0.0, allocation={"n1": 4})
    gpus, cpus = summarize(nodes, {"llm": entry})
    assert gpus == {
        "pool": "a100", "nodes": 1, "unit": "GPU", "total": 8, "leased": 4, "in_use": 5, "free": 3, "broken": 8,
        "held_by": {"llm": 4},
    }  # fmt: skip
    assert (cpus["pool"], cpus["unit"], cpus["free"], cpus["held_by"]) == ("default", "CPU", 16, {})


def test_what_is_leased_is_not_free_though_its_workers_have_not_started() -> None:
    node = Node("n1", {"GPU": 8}, {"GPU": 8})
    entry = Entry(Request(job_id="llm", max_workers=6), 0.0, allocation={"n1": 6})
    assert summarize((node,), {"llm": entry})[0]["free"] == 2
