"""The goodput policy: which job gets what, why others wait, and how the searches compare."""

from __future__ import annotations

import ctypes
import itertools
from dataclasses import replace

import numpy as np
import pytest

from modelyard.cluster import Node
from modelyard.errors import ConfigError
from modelyard.scheduling.model import Job, LinearSpeed, PoolPower, Request, Snapshot, Tenant, Wait, pool_of
from modelyard.scheduling.policies.genetic import GeneticPolicy, GeneticSearch
from modelyard.scheduling.policies.goodput import GoodputPolicy
from modelyard.scheduling.policies.integer_program import IntegerProgram
from modelyard.scheduling.policies.objective import NONE, Problem
from modelyard.scheduling.policies.particle_swarm import ParticleSwarmPolicy, ParticleSwarmSearch
from modelyard.scheduling.policies.worth import Worth
from modelyard.scheduling.simulator import GAVEL_RULES, Simulation, check
from modelyard.scheduling.traces.base import SteadyRun, Trace, TraceJob, cluster_of
from modelyard.scheduling.traces.generator import Generator

POOLS = {"fast": (1, 4), "slow": (2, 4)}
SPEED = LinearSpeed(per_worker={"fast": 4.0, "slow": 1.0}, efficiency=0.9)


def job(name: str, workers: tuple[int, int] = (1, 4), at: float = 0.0, work: float | None = 4000.0, **fields) -> Job:
    of_job = {
        key: fields.pop(key)
        for key in ("allocation", "done", "speed", "is_held", "changed_s", "restarts")
        if key in fields
    }
    request = Request(job_id=name, min_workers=workers[0], max_workers=workers[1], work=work, **fields)
    return Job(request=request, submitted_s=at, **({"speed": SPEED} | of_job))


def world(*jobs: Job, pools: dict[str, tuple[int, int]] = POOLS, nodes: tuple[Node, ...] = (), **fields) -> Snapshot:
    return Snapshot(now_s=1000.0, nodes=nodes or cluster_of(pools), jobs=jobs, **fields)


def pools_of(snapshot: Snapshot, policy: GoodputPolicy | None = None) -> dict[str, tuple[str, int]]:
    decision = (policy or GoodputPolicy()).decide(snapshot)
    check(snapshot, decision)
    return {
        name: (pool_of(snapshot.node_by_id[next(iter(held))]), sum(held.values()))
        for name, held in decision.run.items()
    }


def test_a_job_gets_the_pool_it_gains_most_from():
    picky = LinearSpeed(per_worker={"fast": 8.0, "slow": 1.0})
    even = LinearSpeed(per_worker={"fast": 1.1, "slow": 1.0})
    found = pools_of(world(job("picky", (4, 4), speed=picky), job("even", (4, 4), speed=even)))
    assert found == {"picky": ("fast", 4), "even": ("slow", 4)}


def test_the_job_with_least_work_left_goes_first():
    found = pools_of(world(job("long", (4, 4), work=9000.0), job("short", (4, 4), work=900.0), pools={"fast": (1, 4)}))
    assert found == {"short": ("fast", 4)}


def test_with_work_unknown_the_job_that_has_done_least_goes_first():
    old, new = job("old", (4, 4), work=None, done=1e6), job("new", (4, 4), work=None)
    assert list(pools_of(world(old, new, pools={"fast": (1, 4)}))) == ["new"]


def test_priority_outweighs_the_work_that_is_left():
    long, short = job("long", (4, 4), work=9000.0, priority=500), job("short", (4, 4), work=900.0)
    assert list(pools_of(world(long, short, pools={"fast": (1, 4)}))) == ["long"]


def test_elastic_jobs_share_what_one_could_use_alone():
    found = pools_of(world(job("a"), job("b"), pools={"fast": (1, 4)}))
    assert found == {"a": ("fast", 2), "b": ("fast", 2)}


def test_gpus_that_add_too_little_stay_idle():
    flat = LinearSpeed(per_worker={"fast": 4.0}, default=0.0, efficiency=0.5005)
    assert pools_of(world(job("a", speed=flat)))["a"] == ("fast", 1)


def test_a_change_that_does_not_pay_for_its_restart_is_not_made():
    held = {"slow-0000": 4}
    near = LinearSpeed(per_worker={"fast": 1.05, "slow": 1.0})
    running = job("a", (4, 4), speed=near, allocation=held, restart_s=300.0)
    assert pools_of(world(running))["a"] == ("slow", 4)
    assert pools_of(world(replace(running, speed=SPEED)))["a"] == ("fast", 4)


def test_a_job_that_was_restarted_often_is_left_in_peace():
    near = LinearSpeed(per_worker={"fast": 1.3, "slow": 1.0})
    running = job("a", (4, 4), work=4e6, speed=near, allocation={"slow-0000": 4}, restart_s=200.0)
    assert pools_of(world(running))["a"] == ("fast", 4)
    assert pools_of(world(replace(running, restarts=20)))["a"] == ("slow", 4)


def test_a_waiting_job_takes_the_place_of_one_that_has_done_more_only_if_its_start_pays():
    running = job("old", (4, 4), work=None, done=30_000.0, allocation={"fast-0000": 4}, restarts=1)
    for restart_s, runs in ((10.0, "new"), (600.0, "old")):
        new = job("new", (4, 4), work=None, restart_s=restart_s, at=900.0)
        assert list(pools_of(world(running, new, pools={"fast": (1, 4)}))) == [runs]


def test_a_job_that_cannot_take_few_workers_is_not_served_late_for_it():
    even = LinearSpeed(per_worker={"fast": 1.0}, default=0.0)
    big = job("big", (4, 8), speed=even, work=3000.0)
    small = [job(f"s{n}", (1, 8), speed=even, work=4000.0) for n in range(4)]
    assert pools_of(world(big, *small, pools={"fast": (1, 4)})) == {"big": ("fast", 4)}


def test_a_job_in_its_restart_and_one_that_must_not_stop_stay():
    held = {"fast-0000": 4}
    for stays in (
        job("old", (4, 4), work=9e9, allocation=held, changed_s=990.0, restart_s=30.0),
        job("old", (4, 4), work=9e9, allocation=held, is_preemptible=False),
    ):
        snapshot = world(stays, job("new", (4, 4), work=1.0), pools={"fast": (1, 4)})
        assert GoodputPolicy().decide(snapshot).run == {"old": held}


def test_a_gang_is_packed_by_moving_others_when_that_pays():
    small = [job(f"s{n}", (1, 1), allocation={f"fast-{n:04d}": 1}, restart_s=1.0) for n in range(2)]
    found = GoodputPolicy().decide(world(*small, job("gang", (4, 4)), pools={"fast": (2, 4)}))
    assert len(found.run["gang"]) == 1
    assert set(found.run) == {"s0", "s1", "gang"}


def test_limits_and_guarantees_of_tenants_hold():
    tenants = (Tenant(name="a", limit={"fast": 1}), Tenant(name="b", guaranteed={"fast": 4}), Tenant(name="c"))
    pool = {"fast": (1, 4)}
    assert pools_of(world(job("a", tenant="a"), pools=pool, tenants=tenants)) == {"a": ("fast", 1)}
    many = [job(f"c{n}", (1, 1), tenant="c", work=1.0) for n in range(4)]
    found = pools_of(world(*many, job("b", (4, 4), tenant="b", work=9e6), pools=pool, tenants=tenants))
    assert found == {"b": ("fast", 4)}


def test_a_power_cap_limits_what_runs_and_price_moves_work_to_the_cheap_pool():
    power = {
        "fast": PoolPower(busy_watts=400, idle_watts=50, price_per_hour=40.0),
        "slow": PoolPower(busy_watts=100, idle_watts=50, price_per_hour=1.0),
    }
    jobs = [job(f"j{n}", (1, 4)) for n in range(4)]
    capped = world(*jobs, power=power, power_cap_watts=12 * 50 + 2 * 350 + 10)
    decision = GoodputPolicy().decide(capped)
    watts = sum(
        count * (350 if pool_of(capped.node_by_id[node]) == "fast" else 50)
        for held in decision.run.values()
        for node, count in held.items()
    )
    assert 0 < watts <= 710
    cheap = GoodputPolicy(worth=Worth(price_weight=0.9))
    assert pools_of(world(job("a"), power=power))["a"][0] == "fast"
    assert pools_of(world(job("a"), power=power), cheap)["a"][0] == "slow"


def test_every_waiting_job_gets_a_reason_with_numbers():
    tenants = (Tenant(name="a", limit={"fast": 0, "slow": 0}),)
    jobs = (
        job("held", is_held=True),
        job("giant", (99, 99)),
        job("capped", tenant="a"),
        job("one", (4, 4), work=10.0, pools=("fast",)),
        job("two", (4, 4), work=9e6, pools=("fast",)),
        job("three", (4, 4), work=9e7, pools=("fast",), allocation={"fast-0000": 4}),
    )
    wait = GoodputPolicy().decide(world(*jobs, tenants=tenants)).wait
    codes = {name: reason.code for name, reason in wait.items()}
    assert codes == {
        "held": Wait.HELD,
        "giant": Wait.NEVER_FITS,
        "capped": Wait.QUOTA,
        "two": Wait.BEHIND,
        "three": Wait.PREEMPTED,
    }
    assert all(reason.remedy for reason in wait.values())
    assert "holds 8 when empty" in wait["giant"].text
    assert "fast has room for 0 of at most 4 workers" in wait["two"].text


def problem(seed: int, jobs: int = 7, columns: int = 4) -> Problem:
    dice = np.random.default_rng(seed)
    gpus = dice.choice([1.0, 2.0, 4.0], jobs * columns)
    return Problem(
        num_jobs=jobs,
        job=np.repeat(np.arange(jobs), columns),
        pool=dice.integers(0, 2, jobs * columns),
        gpus=gpus,
        value=gpus**0.5 * dice.uniform(0.5, 1.5, jobs * columns),
        capacity=np.array([5.0, 4.0]),
    )


def best_value(one: Problem) -> float:
    options = [[NONE, *range(one.first[job], one.first[job + 1])] for job in range(one.num_jobs)]
    found = (np.array(chosen) for chosen in itertools.product(*options))
    return max(one.value_of(chosen) for chosen in found if one.fits(chosen))


@pytest.mark.parametrize("seed", range(3))
def test_the_integer_program_finds_the_best_choice_and_the_searches_come_near(seed):
    one = problem(seed, jobs=5, columns=3)
    best = best_value(one)
    exact = IntegerProgram()(one)
    assert one.fits(exact)
    assert one.value_of(exact) == pytest.approx(best, rel=1e-3)
    for search, share in ((GeneticSearch(), 0.97), (ParticleSwarmSearch(), 0.85)):
        found = search(one)
        assert one.fits(found)
        assert share * best <= one.value_of(found) <= best + 1e-9


def test_a_large_program_is_rounded_to_nearly_the_optimum():
    one = replace(problem(0, jobs=300, columns=8), capacity=np.array([150.0, 120.0]))
    exact, rounded = IntegerProgram()(one), IntegerProgram(exact_columns=0)(one)
    assert one.fits(rounded)
    assert one.value_of(rounded) >= 0.995 * one.value_of(exact)


@pytest.mark.parametrize("kind", [GoodputPolicy, GeneticPolicy, ParticleSwarmPolicy])
def test_a_simulated_day_is_feasible_complete_and_the_same_each_time(kind):
    work = Generator(num_jobs=12, seed=5, is_work_known=False, median_gpu_h=0.1).trace()
    first, second = (Simulation(trace=work, policy=kind()).run() for _ in range(2))
    assert len(first.jobs) == 12
    assert [job.finished_s for job in first.jobs] == [job.finished_s for job in second.jobs]


def rigid(name: str, work: float, rates: dict[str, float]) -> TraceJob:
    request = Request(job_id=name, work=work, restart_s=0.0)
    return TraceJob(
        request=request, submitted_s=0.0, begin=SteadyRun(work, LinearSpeed(per_worker=rates, default=0.0)).begin
    )


def test_makespan_keeps_the_longest_job_on_the_fast_pool_where_jct_serves_the_short():
    jobs = [rigid("long", 36_000, {"x": 1.0, "y": 0.5})]
    jobs += [rigid(f"short{n}", 7_200, {"x": 1.0, "y": 0.5}) for n in range(4)]
    work = Trace(name="t", jobs=tuple(jobs), nodes=cluster_of({"x": (1, 1), "y": (1, 1)}))
    ends = {
        goal: Simulation(trace=work, policy=GoodputPolicy(objective=goal, round_s=360.0), rules=GAVEL_RULES).run()
        for goal in ("jct", "makespan")
    }
    assert ends["makespan"].makespan_h < ends["jct"].makespan_h
    assert ends["jct"].avg_jct_h < ends["makespan"].avg_jct_h
    assert ends["makespan"].makespan_h <= 1.1 * (36_000 + 4 * 7_200) / 1.5 / 3600


def test_an_unknown_objective_is_refused():
    with pytest.raises(ConfigError, match="known: jct, makespan"):
        GoodputPolicy(objective="speed")


def test_the_integer_program_writes_nothing_to_stdout(capfd):
    """Values for which one of HiGHS's heuristics prints a line, whatever its logging is set to."""
    rows = {  # job, pool: GPUs and value of each column
        (0, 0): {8: 0.194, 12: 0.219},
        (0, 1): {1: 0.28, 2: 0.363, 4: 0.464, 8: 0.558},
        (0, 2): {1: 0.145, 2: 0.224, 4: 0.313, 8: 0.425},
        (1, 0): {4: 0.186, 8: 0.272},
        (1, 1): {2: 0.494, 4: 0.684, 8: 0.889, 16: 1.0},
        (1, 2): {1: 0.128, 4: 0.348, 8: 0.481},
        (2, 0): {1: 0.061, 2: 0.114, 4: 0.179, 8: 0.26},
        (2, 1): {1: 0.317, 2: 0.499, 4: 0.69, 8: 0.844},
        (2, 2): {8: 0.464},
        (3, 0): {4: 0.085},
        (3, 1): {1: 0.321, 2: 0.397, 4: 0.412},
        (3, 2): {1: 0.131, 2: 0.165, 4: 0.178},
    }
    columns = [(*key, gpus, value) for key, row in rows.items() for gpus, value in row.items()]
    job, pool, gpus, value = (np.array(numbers) for numbers in zip(*columns, strict=True))
    one = Problem(num_jobs=4, job=job, pool=pool, gpus=gpus * 1.0, value=value, capacity=np.array([24.0, 16.0, 24.0]))
    IntegerProgram()(one)
    ctypes.CDLL(None).fflush(None)  # what C code has written may still be in its buffer
    assert capfd.readouterr().out == ""
