"""The scheduler grants only what is free, forgets nothing over a restart, and takes back what the dead held."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from modelyard.cluster import FakeCluster, Node
from modelyard.errors import CapacityError, ConfigError, IntegrityError, NotFoundError
from modelyard.scheduling.journal import Event, Journal
from modelyard.scheduling.ledger import Ledger, Status
from modelyard.scheduling.measured import Report
from modelyard.scheduling.model import Allocation, Decision, LinearSpeed, Reason, Request, Snapshot, Tenant, Wait
from modelyard.scheduling.scheduler import Scheduler, Timing


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Wanted:
    """A policy that decides what the test told it to; all other jobs keep what they have."""

    name = "wanted"

    def __init__(self) -> None:
        self.run: dict[str, Allocation] = {}

    def decide(self, snapshot: Snapshot) -> Decision:
        run = {job.job_id: job.allocation for job in snapshot.jobs if job.is_running}
        run = {**run, **{j: a for j, a in self.run.items() if j in snapshot.by_id}}
        run = {job: allocation for job, allocation in run.items() if allocation}
        wait = {j: Reason(Wait.NO_ROOM, "the test says so") for j in snapshot.by_id if j not in run}
        return Decision(run, wait)


class Live(FakeCluster):
    """A cluster the test can change."""


def node(name: str, gpus: float = 4, free: float | None = None, *, alive: bool = True) -> Node:
    free = gpus if free is None else free
    return Node(name, {"GPU": gpus}, {"GPU": free}, {"modelyard/pool": "a"}, alive=alive)


class World:
    """A scheduler over two nodes of 4 GPUs."""

    def __init__(self, folder: Path) -> None:
        self.url = f"sqlite:///{folder / 'journal.db'}"
        self.clock, self.policy = Clock(), Wanted()
        self.cluster = Live([node("n1"), node("n2")])
        self.scheduler = self.started()

    def started(self) -> Scheduler:
        journal = Journal(self.url, clock=self.clock)
        timing = Timing(lease_ttl_s=10, yield_timeout_s=60)
        return Scheduler(journal, self.cluster, self.policy, timing=timing, clock=self.clock)

    def restart(self) -> None:
        self.scheduler = self.started()

    def nodes(self, *nodes: Node) -> None:
        self.cluster = Live(nodes)
        self.scheduler._cluster = self.cluster

    def submit(self, job: str, workers: int = 2, **options: Any) -> None:
        self.scheduler.submit(Request(job_id=job, min_workers=1, max_workers=workers, **options))

    def decide(self, **run: Mapping[str, int]) -> list[str]:
        self.policy.run = dict(run)
        return self.scheduler.decide()

    def status(self, job: str) -> Status:
        return self.scheduler.answer(job).status


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_job_gets_what_the_policy_chose(world: World) -> None:
    world.submit("a")
    assert world.decide(a={"n1": 2}) == ["a"]
    answer = world.scheduler.renew("a")
    assert (answer.status, answer.allocation, answer.epoch, answer.must_yield) == (Status.RUNNING, {"n1": 2}, 1, False)


def test_room_is_never_granted_twice_whatever_the_policy_says(world: World) -> None:
    world.submit("a", 3)
    world.submit("b", 2)
    assert world.decide(a={"n1": 3}, b={"n1": 2}) == ["a"]
    assert world.status("b") is Status.WAITING
    assert "chosen for it" in world.scheduler.answer("b").reason


def test_what_others_use_on_a_node_is_not_granted(world: World) -> None:
    world.nodes(node("n1", free=1), node("n2"))
    world.submit("a")
    assert world.decide(a={"n1": 2}) == []
    assert world.decide(a={"n2": 2}) == ["a"]


def test_what_a_lease_itself_uses_is_not_counted_twice(world: World) -> None:
    world.submit("a")
    world.submit("b")
    world.decide(a={"n1": 2})
    world.nodes(node("n1", free=2), node("n2"))  # a's workers have started
    assert world.decide(b={"n1": 2}) == ["b"]


def test_a_resize_asks_for_the_lease_and_grants_the_new_one_when_it_is_back(world: World) -> None:
    world.submit("a", 8)
    world.decide(a={"n1": 2})
    assert world.decide(a={"n1": 4}) == []
    answer = world.scheduler.renew("a")
    assert (answer.must_yield, answer.reason) == (True, "to go on with 4 workers instead of 2")
    world.scheduler.give_back("a", 1, Status.WAITING, done=7)
    assert world.decide(a={"n1": 4}) == ["a"]
    assert world.scheduler.renew("a").epoch == 2
    assert world.scheduler.snapshot().by_id["a"].done == 7


def test_a_wish_that_is_gone_is_taken_back(world: World) -> None:
    world.submit("a", 8)
    world.decide(a={"n1": 2})
    world.decide(a={"n1": 4})
    world.decide(a={"n1": 2})
    assert not world.scheduler.renew("a").must_yield


def test_a_preempted_job_that_does_not_yield_in_time_loses_its_lease(world: World) -> None:
    world.submit("a")
    world.decide(a={"n1": 2})
    world.decide(a={})
    for _ in range(7):
        world.clock.now += 9
        world.scheduler.renew("a")
        world.decide(a={})
    assert world.status("a") is Status.WAITING
    assert world.scheduler.ledger.held("n1") == {}


def test_a_driver_that_is_not_heard_loses_its_lease_and_its_place(world: World) -> None:
    world.submit("running")
    world.submit("waiting")
    world.decide(running={"n1": 2})
    world.clock.now += 11
    world.decide()
    assert world.status("running") is Status.LOST
    assert world.status("waiting") is Status.CANCELLED
    assert world.scheduler.ledger.held("n1") == {}


def test_a_job_on_a_node_that_died_is_told_to_yield(world: World) -> None:
    world.submit("a")
    world.decide(a={"n1": 1, "n2": 1})
    world.nodes(node("n1"), node("n2", alive=False))
    world.decide()
    assert "n2 is gone" in world.scheduler.renew("a").reason


def test_nothing_is_forgotten_over_a_restart(world: World) -> None:
    world.scheduler.set_tenant(Tenant(name="vision", guaranteed={"a": 4}))
    world.submit("a", tenant="vision")
    world.submit("b", tenant="vision")
    world.submit("c", tenant="vision")
    world.decide(a={"n1": 2})
    world.scheduler.hold("b")
    world.scheduler.set_priority("c", 9)
    before = world.scheduler.ledger
    world.clock.now += 100
    world.restart()
    waiting = {job: world.scheduler.reason(job) for job in "bc"}
    assert {reason and reason.code for reason in waiting.values()} == {Wait.UNDECIDED}, "also before the first round"
    assert world.scheduler.reason("a") is None
    assert world.scheduler.ledger.entries == before.entries
    assert world.scheduler.ledger.tenants == before.tenants
    world.decide()
    assert world.status("a") is Status.RUNNING  # its driver has a new chance to be heard
    assert world.decide(b={"n1": 3}) == []  # n1 still holds a's two


def test_giving_back_twice_or_late_changes_nothing(world: World) -> None:
    world.submit("a")
    world.decide(a={"n1": 2})
    world.scheduler.give_back("a", 1, Status.WAITING)
    world.decide(a={"n2": 2})
    world.scheduler.give_back("a", 1, Status.DONE)
    assert world.status("a") is Status.RUNNING


def test_a_cancelled_job_ends_when_it_gives_back(world: World) -> None:
    world.submit("a")
    world.decide(a={"n1": 2})
    world.scheduler.cancel("a")
    world.decide()
    assert world.scheduler.renew("a").reason == "it was cancelled"
    world.scheduler.give_back("a", 1, Status.WAITING)
    assert world.status("a") is Status.CANCELLED


def test_a_running_job_on_hold_is_asked_back_and_waits_until_it_is_released(world: World) -> None:
    world.submit("a")
    world.decide(a={"n1": 2})
    world.scheduler.hold("a")
    world.decide(a={"n1": 2})
    assert world.scheduler.renew("a").reason == "it was put on hold"
    world.scheduler.give_back("a", 1, Status.WAITING)
    assert world.decide(a={"n1": 2}) == [], "whatever the policy says"
    world.scheduler.hold("a", is_held=False)
    assert world.decide(a={"n1": 2}) == ["a"]


def test_submitting_the_same_again_only_asks_and_another_request_is_refused(world: World) -> None:
    world.submit("a", 2)
    world.decide(a={"n1": 2})
    world.submit("a", 2)
    assert world.status("a") is Status.RUNNING
    with pytest.raises(ConfigError, match="another request"):
        world.submit("a", 3)


def test_a_job_that_is_over_may_be_submitted_again(world: World) -> None:
    world.submit("a")
    world.decide(a={"n1": 2})
    world.scheduler.give_back("a", 1, Status.FAILED)
    world.submit("a")
    assert world.decide(a={"n1": 2}) == ["a"]
    assert world.scheduler.renew("a").epoch == 2


def test_a_job_submitted_again_starts_without_the_progress_of_the_one_before(world: World) -> None:
    world.submit("a")
    world.decide(a={"n1": 2})
    world.scheduler.renew("a", Report(done=5, step_s=1.0, global_batch=8))
    world.scheduler.give_back("a", 1, Status.DONE)
    world.submit("a")
    job = world.scheduler.snapshot().by_id["a"]
    assert (job.done, job.speed) == (0, LinearSpeed())


def test_a_job_that_can_never_fit_is_refused(world: World) -> None:
    with pytest.raises(CapacityError):
        world.scheduler.submit(Request(job_id="big", min_workers=9, max_workers=9))


@pytest.mark.parametrize("call", ["renew", "cancel", "hold", "reason"])
def test_an_unknown_job_is_named(world: World, call: str) -> None:
    world.submit("train-a")
    method: Callable[[str], Any] = getattr(world.scheduler, call)
    with pytest.raises(NotFoundError, match="did you mean 'train-a'"):
        method("train-b")


def test_a_priority_outside_the_band_is_refused(world: World) -> None:
    world.submit("a")
    with pytest.raises(ConfigError, match=r"-1000\.\.1000"):
        world.scheduler.set_priority("a", 5000)


def test_a_quota_cycle_is_refused_and_changes_nothing(world: World) -> None:
    world.scheduler.set_tenant(Tenant(name="x"))
    world.scheduler.set_tenant(Tenant(name="y", parent="x"))
    with pytest.raises(ConfigError, match="x -> y -> x"):
        world.scheduler.set_tenant(Tenant(name="x", parent="y"))
    assert world.scheduler.ledger.tenants["x"].parent is None


def test_the_ledger_refuses_what_contradicts_it(world: World) -> None:
    world.submit("a")
    world.decide(a={"n1": 2})
    ledger = Ledger()
    ledger.apply(Event(0, "submitted", {"request": dataclasses.asdict(world.scheduler.ledger.entry("a").request)}))
    for kind, body in [
        ("granted", {"job": "a", "epoch": 2, "allocation": {"n1": 1}}),
        ("granted", {"job": "a", "epoch": 1, "allocation": {}}),
        ("returned", {"job": "a", "epoch": 0, "status": "done"}),
        ("invented", {}),
    ]:
        with pytest.raises(IntegrityError):
            ledger.apply(Event(1, kind, body))


def test_gpu_seconds_are_counted_per_lease(world: World) -> None:
    world.submit("a")
    world.decide(a={"n1": 2})
    for _ in range(4):
        world.clock.now += 5
        world.scheduler.renew("a")
    world.scheduler.give_back("a", 1, Status.WAITING)
    assert world.scheduler.snapshot().by_id["a"].attained_gpu_s == 40


def test_step_times_become_the_speed_that_the_policy_sees(world: World) -> None:
    world.submit("a", 4)
    world.decide(a={"n1": 1})
    for _ in range(3):
        world.scheduler.renew("a", Report(done=5, step_s=2.0, global_batch=8))
    speed = world.scheduler.snapshot().by_id["a"].speed
    assert speed.goodput("a", 1, 1) == pytest.approx(0.5, rel=0.05)
    assert 0.5 < speed.goodput("a", 4, 1) <= 2.1, "more workers are faster, at most in proportion"
    assert speed.goodput("a", 9, 1) == 0, "no worker without a sample"
    assert world.scheduler.snapshot().by_id["a"].done == 5


def test_what_a_job_measured_outlives_the_scheduler(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.submit("a")
    world.decide(a={"n1": 2})
    world.scheduler.renew("a", Report(1.0, step_s=0.5, sync_s=0.1, global_batch=64))
    before = world.scheduler.snapshot().by_id["a"].speed.goodput("a", 2, 1)
    assert before == pytest.approx(2.0, rel=0.05)
    world.restart()
    assert world.scheduler.snapshot().by_id["a"].speed.goodput("a", 2, 1) == before
    lines = world.scheduler._journal.length
    world.scheduler.renew("a", Report(2.0, step_s=0.5, sync_s=0.1, global_batch=64))
    assert world.scheduler._journal.length == lines, "what is no news is not written again"


def test_a_long_journal_becomes_one_line_that_says_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from modelyard.scheduling import scheduler as module

    monkeypatch.setattr(module, "COMPACT_LINES", 40)
    monkeypatch.setattr(module, "KEEP_OVER", 5)
    world = World(tmp_path)
    world.scheduler.set_tenant(Tenant(name="team", limit={"a": 8.0}))
    world.submit("stays", tenant="team", priority=3)
    world.decide(stays={"n1": 2})
    world.scheduler.renew("stays", Report(1.0, step_s=0.5, sync_s=0.1, global_batch=64))
    for number in range(30):
        world.submit(f"short-{number}", tenant="team")
        world.scheduler.cancel(f"short-{number}")
    assert world.scheduler._journal.length < 41
    entry = world.scheduler.ledger.entry("stays")
    over = [job for job in world.scheduler.ledger.entries if job != "stays"]
    assert (entry.status, entry.allocation, entry.request.priority) == (Status.RUNNING, {"n1": 2}, 3)
    assert over[-1] == "short-29"
    entries, tenants = world.scheduler.ledger.entries, world.scheduler.ledger.tenants
    world.restart()
    assert (world.scheduler.ledger.entries, world.scheduler.ledger.tenants) == (entries, tenants)
    world.scheduler.give_back("stays", entry.epoch, Status.DONE)
    assert world.scheduler.ledger.entry("stays").status is Status.DONE


def test_a_changed_line_in_place_of_many_is_found(tmp_path: Path) -> None:
    import sqlalchemy as sql

    journal = Journal(f"sqlite:///{tmp_path / 'j.db'}")
    journal.append(("held", {"job": "a", "is_held": True}))
    journal.compact({"entries": [], "tenants": []})
    journal.append(("tenant_removed", {"name": "x"}))
    assert [event.kind for event in Journal(journal.url).read()] == ["state", "tenant_removed"]
    with sql.create_engine(journal.url).begin() as connection:
        connection.execute(
            sql.text("update scheduler_events set body = replace(body, 'tenants', 'tenantz') where line = 2")
        )
    with pytest.raises(IntegrityError, match=r"line 2 \(state\) was changed"):
        Journal(journal.url).read()


def test_a_quota_for_a_pool_that_is_none_is_refused(tmp_path: Path) -> None:
    world = World(tmp_path)
    with pytest.raises(ConfigError, match=r"names 'aa', which is no pool; known: a"):
        world.scheduler.set_tenant(Tenant(name="team", limit={"aa": 8.0}))


def test_two_drivers_of_one_job_never_hold_its_lease_together(world: World) -> None:
    request = Request(job_id="a", min_workers=2, max_workers=2)
    world.scheduler.submit(request, "first")
    world.decide(a={"n1": 2})
    answer = world.scheduler.submit(request, "second")
    assert (answer.status, dict(answer.allocation), answer.has_other_driver) == (Status.WAITING, {}, True)
    assert "another driver" in answer.reason
    assert world.scheduler.renew("a", driver="first").status is Status.RUNNING


def test_a_second_driver_goes_on_with_the_job_of_one_that_died(world: World) -> None:
    request = Request(job_id="a", min_workers=2, max_workers=2)
    world.scheduler.submit(request, "first")
    world.decide(a={"n1": 2})
    world.clock.now += 14.0
    world.scheduler.submit(request, "second")
    world.clock.now += 2.0
    assert world.decide(a={"n2": 2}) == ["a"], "from its place in line"
    world.scheduler = world.started()
    answer = world.scheduler.renew("a", driver="second")
    assert (answer.status, answer.epoch) == (Status.RUNNING, 2)
    assert world.scheduler.renew("a", driver="first").has_other_driver, "it was only slow"


def test_time_spent_deciding_is_not_a_drivers_silence(world: World) -> None:
    world.submit("a", 2)
    world.decide(a={"n1": 2})
    decide = world.policy.decide

    def slow(snapshot: Snapshot) -> Decision:
        world.clock.now += 60.0
        return decide(snapshot)

    world.policy.decide = slow  # type: ignore[method-assign]
    world.scheduler.decide()
    world.scheduler.decide()
    assert world.status("a") is Status.RUNNING


def test_the_same_run_with_a_later_deadline_is_the_same_job(world: World) -> None:
    first = Request(job_id="a", deadline_s=2000.0)
    world.scheduler.submit(first)
    assert world.scheduler.submit(dataclasses.replace(first, deadline_s=2005.0)).status is Status.WAITING


def test_what_is_over_can_be_neither_held_nor_reprioritized(world: World) -> None:
    world.submit("a")
    assert world.scheduler.cancel("a") is Status.WAITING
    assert world.scheduler.cancel("a") is Status.CANCELLED
    with pytest.raises(ConfigError, match="is over: cancelled"):
        world.scheduler.hold("a")
    with pytest.raises(ConfigError, match="is over: cancelled"):
        world.scheduler.set_priority("a", 3)


def test_a_tenant_is_removed_only_when_it_is_there_and_has_no_jobs(world: World) -> None:
    world.scheduler.set_tenant(Tenant(name="team", limit={"a": 2}))
    world.scheduler.submit(Request(job_id="a", tenant="team"))
    with pytest.raises(NotFoundError, match="did you mean 'team'"):
        world.scheduler.remove_tenant("tema")
    with pytest.raises(ConfigError, match="1 jobs in the queue, among them 'a'"):
        world.scheduler.remove_tenant("team")
    world.scheduler.cancel("a")
    world.scheduler.remove_tenant("team")
    assert world.scheduler.ledger.tenants == {}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("min_workers", 1.0),
        ("max_workers", 2.5),
        ("priority", 1.5),
        ("work", float("nan")),
        ("work", -1.0),
        ("restart_s", float("inf")),
        ("deadline_s", float("nan")),
        ("resources", {"GPU": 1.0, "CPU": float("nan")}),
        ("resources", {"GPU": float("inf")}),
        ("resources", {"GPU": 1e-9}),
        ("pools", "a100"),
        ("job_id", ""),
        ("job_id", "a\nb"),
        ("tenant", "x" * 201),
    ],
)
def test_a_request_that_would_break_a_round_is_refused_when_it_is_built(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field):
        Request(**{"job_id": "a", field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "value"), [("lease_ttl_s", -5.0), ("lease_ttl_s", float("nan")), ("yield_timeout_s", 0.0)]
)
def test_times_that_would_end_every_lease_are_refused(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=field):
        Timing(**{field: value})


@pytest.mark.parametrize(("field", "value"), [("weight", float("inf")), ("limit", {"a": float("inf")})])
def test_endless_quotas_are_refused(world: World, field: str, value: object) -> None:
    with pytest.raises(ConfigError, match="finite"):
        world.scheduler.set_tenant(Tenant(**{"name": "team", field: value}))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="tenant"):
        Tenant(name="")
