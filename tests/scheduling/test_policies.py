"""What each policy decides in small worlds."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
from tests.scheduling.builders import TENANTS, job, node, snapshot

from modelyard.cluster import Node
from modelyard.errors import ConfigError
from modelyard.scheduling.model import Decision, Job, LinearSpeed, PoolPower, Snapshot, Tenant, Wait
from modelyard.scheduling.policies import KNOWN, policy


def decide(name: str, seen: Snapshot, **options: object) -> Decision:
    return policy(name, **options).decide(seen)


def held(name: str, workers: int | tuple[int, int], where: dict[str, int], **fields: object) -> Job:
    return job(name, workers, allocation=where, changed_s=0.0, **fields)


# By name


def test_an_unknown_policy_lists_the_known_and_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError) as error:
        policy("prioritty")
    assert all(name in str(error.value) for name in KNOWN)
    assert "did you mean 'priority'?" in str(error.value)
    with pytest.raises(ConfigError, match="does not take sed=3\n  -> its options: seed"):
        policy("random", sed=3)


def test_policies_need_neither_ray_nor_torch() -> None:
    code = (
        "import sys; from modelyard.scheduling.policies import policy\n"
        "for name in ('fifo', 'random', 'round_robin', 'priority', 'fair_share', 'deadline'): policy(name)\n"
        "import modelyard.scheduling.admission\n"
        "print([name for name in ('ray', 'torch', 'numpy', 'scipy') if name in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert answer.stdout.strip() == "[]"


# Limits of all


@pytest.mark.parametrize("name", ["fifo", "priority", "fair_share", "deadline", "random", "round_robin"])
def test_a_limit_lowered_below_what_is_in_use_stops_the_least_needed_of_that_tenant(name: str) -> None:
    jobs = [
        held("dear", 2, {"n": 2}, tenant="t", priority=1),
        held("cheap", 2, {"n": 2}, tenant="t"),
        held("theirs", 2, {"n": 2}, tenant="other", priority=-1),
    ]
    decision = decide(name, snapshot([node("n", 8)], jobs, [Tenant(name="t", limit={"a100": 3})]))
    assert decision.run == {"dear": {"n": 2}, "theirs": {"n": 2}}
    assert decision.wait["cheap"].code is Wait.PREEMPTED
    assert decision.wait["cheap"].text.startswith("tenant 't' held 4 of now at most 3 in a100; ")


def test_an_elastic_job_shrinks_to_a_lowered_limit_and_one_that_must_stay_stays() -> None:
    elastic = held("a", (1, 4), {"n": 4}, tenant="t", work=100)
    tenants = [Tenant(name="t", limit={"a100": 3})]
    assert decide("fifo", snapshot([node("n", 8)], [elastic], tenants)).run == {"a": {"n": 3}}
    stays = held("a", 4, {"n": 4}, tenant="t", is_preemptible=False)
    assert decide("fifo", snapshot([node("n", 8)], [stays], tenants)).run == {"a": {"n": 4}}


@pytest.mark.parametrize("name", ["fifo", "priority", "fair_share", "deadline"])
def test_nobody_takes_the_watts_that_the_head_of_the_queue_waits_for(name: str) -> None:
    power = {"a100": PoolPower(busy_watts=150, idle_watts=50)}
    jobs = [held("r", 2, {"n": 2}), job("head", 3, at=1), job("small", 1, at=2)]
    seen = dataclasses.replace(snapshot([node("n", 8)], jobs), power=power, power_cap_watts=400 + 499)
    decision = decide(name, seen)
    assert decision.run == {"r": {"n": 2}}
    assert decision.wait["head"].code is Wait.POWER
    assert "draw 300 W; the power cap of 899 W leaves 299 W" in decision.wait["head"].text
    assert {"r", "head"} == decide(name, dataclasses.replace(seen, power_cap_watts=400 + 500)).run.keys()


# First come, first served


def test_fifo_starts_in_the_order_of_submission_whatever_the_priority() -> None:
    seen = snapshot([node("n", 4)], [job("second", 3, at=2, priority=9), job("first", 3, at=1)])
    decision = decide("fifo", seen)
    assert decision.run == {"first": {"n": 3}}
    assert decision.wait["second"].code is Wait.NO_ROOM


def test_a_wait_is_explained_in_numbers_with_a_remedy() -> None:
    nodes = [node("x", 8), node("y", 4)]
    seen = snapshot(nodes, [held("r", 6, {"x": 6}), job("a", 9, at=1), job("b", (8, 9), at=2)])
    why = decide("fifo", seen).wait["b"]
    assert why.text == (
        "needs 8 GPUs (8 workers with 1) together in pool a100; 6 of 12 GPUs are free in a100, most free on one node "
        "(y) is 4; behind 1 job (a)"
    )
    assert why.remedy.startswith("lower min_workers from 8 to 6")


def test_scattered_gpus_are_called_fragmented() -> None:
    jobs = [held("r", 5, {"x": 5}), held("s", 5, {"y": 5}), job("a", 1, gpus=4)]
    decision = decide("fifo", snapshot([node("x"), node("y")], jobs), moves=False)
    assert decision.wait["a"].code is Wait.FRAGMENTED


def test_a_job_behind_the_head_starts_only_if_it_ends_before_the_head_can_start() -> None:
    jobs = [held("r", 3, {"n": 3}, work=300, restart_s=0), job("head", 4, at=1)]
    fast = job("fast", 1, at=2, work=60, restart_s=30)
    slow = job("slow", 1, at=2, work=80, restart_s=30)
    assert "fast" in decide("fifo", snapshot([node("n", 4)], [*jobs, fast])).run
    why = decide("fifo", snapshot([node("n", 4)], [*jobs, slow])).wait["slow"]
    assert why.code is Wait.BEHIND
    assert "behind 1 job (head)" in why.text
    assert "fast" not in decide("fifo", snapshot([node("n", 4)], [*jobs, fast]), backfill=False).run


def test_a_job_of_any_length_may_use_what_the_head_leaves_over() -> None:
    jobs = [held("r", 3, {"n": 3}, work=300), job("head", 3, at=1), job("long", 1, at=2), job("longer", 1, at=3)]
    assert set(decide("fifo", snapshot([node("n", 4)], jobs)).run) == {"r", "long"}


def test_behind_a_head_that_waits_for_a_job_of_unknown_length_only_other_nodes_are_used() -> None:
    nodes = [node("n", 4), node("small", 2)]
    jobs = [held("r", 1, {"n": 1}), job("head", 1, gpus=4, at=1), job("short", 1, at=2, work=1), job("two", 2, at=3)]
    decision = decide("fifo", snapshot(nodes, jobs), moves=False)
    assert decision.run == {"r": {"n": 1}, "short": {"small": 1}}, "the head needs all of n, whenever r ends"


def test_a_job_of_unknown_length_might_end_at_once_so_nothing_goes_in_front_of_the_head() -> None:
    jobs = [held("known", 2, {"n": 2}, work=100), held("unknown", 2, {"n": 2}), job("head", 3, at=1)]
    decision = decide("fifo", snapshot([node("n", 5)], [*jobs, job("short", 1, at=2, work=10)]))
    assert "short" not in decision.run, "the head could start as soon as `unknown` ends"


def test_what_grows_before_the_head_ends_earlier_and_backfill_must_end_by_then() -> None:
    jobs = [job("a", (3, 5), work=300), job("head", 1, gpus=4, at=1), job("c", 1, at=2, work=80)]
    seen = snapshot([node("n", 4), node("s", 2)], jobs)
    assert decide("fifo", seen).run == {"a": {"n": 3, "s": 2}}, "a ends after 90 s, not 130; c would after 110"


def test_elastic_jobs_grow_only_after_all_that_fit_have_started() -> None:
    jobs = [job("a", (1, 8), at=1), job("b", (2, 4), at=2)]
    run = decide("fifo", snapshot([node("n", 8)], jobs)).run
    assert run == {"a": {"n": 6}, "b": {"n": 2}}


def test_a_job_over_its_tenants_limit_is_passed_over_and_told_so() -> None:
    tenants = [Tenant(name="t", limit={"a100": 2})]
    jobs = [held("r", 2, {"n": 2}, tenant="t"), job("a", 1, at=1, tenant="t"), job("b", 6, at=2)]
    decision = decide("fifo", snapshot([node("n", 8)], jobs, tenants))
    assert decision.run["b"] == {"n": 6}
    assert decision.wait["a"].code is Wait.QUOTA
    assert "tenant 't' holds 2 of at most 2 in pool a100" in decision.wait["a"].text
    assert decision.wait["a"].remedy.startswith("wait until jobs of 't' end")


def test_a_gang_above_its_tenants_limit_is_not_told_to_wait() -> None:
    tenants = [Tenant(name="t", limit={"a100": 1})]
    decision = decide("fifo", snapshot([node("n", 8)], [job("a", 2, tenant="t")], tenants))
    assert decision.wait["a"].remedy == "lower min_workers, or raise its limit: modelyard quota set t"


@pytest.mark.parametrize("name", ["fifo", "priority", "fair_share"])
def test_nobody_is_said_to_wait_behind_a_job_that_waits_for_other_pools(name: str) -> None:
    nodes = [node("n", 1), node("t", 1, "t4")]
    jobs = [held("r", 1, {"n": 1}), held("s", 1, {"t": 1})]
    jobs += [job("a", 1, at=1, pools=("a100",)), job("b", 1, at=2, pools=("t4",)), job("c", 1, at=3, pools=("t4",))]
    wait = decide(name, snapshot(nodes, jobs)).wait
    assert "behind" not in wait["b"].text
    assert "behind 1 job (b)" in wait["c"].text


def test_reasons_leave_out_pools_that_could_never_hold_a_worker() -> None:
    nodes = [node("n", 1), Node("c", {"CPU": 8}, {"CPU": 8}, {"modelyard/pool": "cpus"})]
    decision = decide("fifo", snapshot(nodes, [held("r", 1, {"n": 1}), job("a", 1, at=1)]))
    assert "are free in cpus" not in decision.wait["a"].text
    assert "are free in a100" in decision.wait["a"].text


def test_a_job_that_no_usable_node_could_hold_blocks_nobody() -> None:
    nodes = [node("a", 4), node("b", 8, draining=True)]
    decision = decide("fifo", snapshot(nodes, [job("huge", 8, at=1), job("small", 1, at=2)]))
    assert "small" in decision.run
    assert decision.wait["huge"].code is Wait.NEVER_FITS
    assert "largest pool a100 holds when empty is 4 of 8 workers" in decision.wait["huge"].text


@pytest.mark.parametrize("name", ["fifo", "priority", "fair_share", "deadline", "random", "round_robin"])
def test_a_job_whose_node_drains_moves_and_keeps_the_rest(name: str) -> None:
    nodes = [node("a", 4), node("b", 4, draining=True), node("c", 8)]
    jobs = [held("r", 6, {"a": 4, "b": 2})]
    assert decide(name, snapshot(nodes, jobs)).run == {"r": {"a": 4, "c": 2}}
    why = decide(name, snapshot([*nodes[:2], node("c", 8, alive=False), node("d", 2, pool="l4")], jobs)).wait["r"]
    assert why.code in (Wait.PREEMPTED, Wait.NEVER_FITS)


def test_a_job_that_lost_its_node_is_told_which() -> None:
    jobs = [held("r", 4, {"b": 4}), held("q", 4, {"a": 4})]
    why = decide("fifo", snapshot([node("a", 4), node("b", 4, draining=True)], jobs)).wait["r"]
    assert why.code is Wait.PREEMPTED
    assert why.text.startswith("its node b went away or drain")


# Priority


def test_the_lowest_priority_leaves_first_then_the_least_lost_work() -> None:
    jobs = [
        job("high", 1, allocation={"n": 1}, priority=2, changed_s=90.0),
        job("old", 1, allocation={"n": 1}, priority=1, changed_s=0.0),
        job("young", 1, allocation={"n": 1}, priority=1, changed_s=90.0),
        job("urgent", 1, at=95, priority=9),
    ]
    decision = decide("priority", snapshot([node("n", 3)], jobs, now=100))
    assert set(decision.wait) == {"young"}
    why = decision.wait["young"]
    assert why.code is Wait.PREEMPTED
    assert "evicted by job urgent of priority 9" in why.text


def test_nobody_of_equal_priority_and_nobody_who_must_stay_is_evicted() -> None:
    jobs = [held("same", 2, {"n": 2}, priority=5), held("fixed", 2, {"n": 2}, is_preemptible=False)]
    decision = decide("priority", snapshot([node("n", 4)], [*jobs, job("urgent", 2, priority=5)]))
    assert set(decision.run) == {"same", "fixed"}


def test_eviction_frees_a_node_where_the_worker_fits_and_not_scattered_gpus() -> None:
    jobs = [held(f"s{i}", 1, {f"n{i % 3}": 1}, priority=2 if i % 3 == 2 else 1) for i in range(9)]
    jobs += [held("fixed", 1, {"n0": 1}, is_preemptible=False)]
    nodes = [node(f"n{i}", 4) for i in range(3)]
    decision = decide("priority", snapshot(nodes, [*jobs, job("urgent", 1, gpus=4, priority=99)]))
    assert decision.run["urgent"] == {"n1": 1}, "never n0, where one must stay; n2 holds higher priorities"
    assert all(decision.run[f"s{i}"] == {f"n{i % 3}": 1} for i in (0, 2, 3, 5, 6, 8)), "nobody else is touched"
    assert len(decision.wait) == 2, "the third victim goes to what is free on n2"


def test_a_victim_without_whom_it_fits_as_well_is_spared() -> None:
    jobs = [held("little", 1, {"n": 1}, priority=0), held("large", 3, {"n": 3}, priority=1)]
    decision = decide("priority", snapshot([node("n", 4)], [*jobs, job("urgent", 3, priority=9)]))
    assert decision.run == {"little": {"n": 1}, "urgent": {"n": 3}}


def test_an_elastic_victim_is_only_shrunk_where_that_is_enough() -> None:
    jobs = [held("elastic", (1, 8), {"n": 8}), job("urgent", 3, priority=9)]
    assert decide("priority", snapshot([node("n", 8)], jobs)).run == {"elastic": {"n": 5}, "urgent": {"n": 3}}


def test_a_job_is_not_evicted_when_there_is_room_elsewhere() -> None:
    jobs = [held("low", 4, {"a": 4}), job("urgent", 4, priority=9)]
    decision = decide("priority", snapshot([node("a", 4), node("b", 4)], jobs))
    assert decision.run == {"low": {"a": 4}, "urgent": {"b": 4}}


# Fair share


def test_the_tenant_with_the_smallest_share_by_weight_goes_first() -> None:
    tenants = [Tenant(name="one"), Tenant(name="two", weight=2)]
    jobs = [job(f"{t}{i}", 1, at=i, tenant=t) for t in ("one", "two") for i in range(9)]
    run = decide("fair_share", snapshot([node("n", 9)], jobs, tenants)).run
    assert (sum(j.startswith("one") for j in run), sum(j.startswith("two") for j in run)) == (3, 6)


def test_weights_hold_at_each_level_of_the_tree() -> None:
    tenants = [Tenant(name="left"), Tenant(name="right"), *(Tenant(name=n, parent="left") for n in ("l1", "l2", "l3"))]
    jobs = [job(f"{t}-{i}", 1, at=i, tenant=t) for t in ("l1", "l2", "l3", "right") for i in range(12)]
    run = decide("fair_share", snapshot([node("n", 12)], jobs, tenants)).run
    assert [sum(j.startswith(t) for j in run) for t in ("l1", "l2", "l3", "right")] == [2, 2, 2, 6]


def test_the_dominant_resource_counts() -> None:
    tenants = [Tenant(name="gpu"), Tenant(name="cpu")]
    of_cpu = [job(f"c{i}", 1, tenant="cpu") for i in range(8)]
    heavy = [
        dataclasses.replace(j, request=dataclasses.replace(j.request, resources={"CPU": 16.0, "GPU": 1.0}))
        for j in of_cpu
    ]
    jobs = [*heavy, *(job(f"g{i}", 1, tenant="gpu") for i in range(8))]
    run = decide("fair_share", snapshot([node("n", 8)], jobs, tenants)).run
    assert sum(j.startswith("c") for j in run) == 3, "a quarter of the CPUs each, against an eighth of the GPUs"
    assert sum(j.startswith("g") for j in run) == 5


def test_a_guarantee_is_taken_back_from_who_borrowed_the_youngest_first() -> None:
    tenants = [Tenant(name="owner", guaranteed={"a100": 4}), Tenant(name="guest", guaranteed={"a100": 2})]
    guests = [held(f"g{i}", 2, {"n": 2}, at=i, tenant="guest") for i in range(4)]
    guests = [dataclasses.replace(one, changed_s=one.submitted_s) for one in guests]
    seen = snapshot([node("n", 8)], [*guests, job("mine", 4, at=9, tenant="owner")], tenants, now=10)
    decision = decide("fair_share", seen)
    assert set(decision.run) == {"g0", "g1", "mine"}
    assert decision.wait["g3"].code is Wait.PREEMPTED
    assert "tenant 'owner' took back 4 GPUs" in decision.wait["g3"].text


def test_beyond_its_guarantee_a_tenant_waits_like_everyone() -> None:
    tenants = [Tenant(name="owner", guaranteed={"a100": 4}), Tenant(name="guest")]
    seen = snapshot([node("n", 8)], [held("g", 8, {"n": 8}, tenant="guest"), job("mine", 5, tenant="owner")], tenants)
    assert set(decide("fair_share", seen).run) == {"g"}


def test_a_guest_who_holds_no_more_than_its_guarantee_is_left_alone() -> None:
    tenants = [Tenant(name="owner", guaranteed={"a100": 6}), Tenant(name="guest", guaranteed={"a100": 2})]
    jobs = [held("g", 2, {"n": 2}, tenant="guest"), held("x", 2, {"n": 2}, tenant="stranger")]
    decision = decide("fair_share", snapshot([node("n", 8)], [*jobs, job("mine", 6, tenant="owner")], tenants))
    assert set(decision.run) == {"g", "mine"}


def test_no_more_is_taken_back_than_was_borrowed() -> None:
    tenants = [Tenant(name="owner", guaranteed={"a100": 4}), Tenant(name="guest", guaranteed={"a100": 4})]
    jobs = [held("large", 4, {"n": 4}, tenant="guest"), held("small", 1, {"n": 1}, at=1, tenant="guest")]
    jobs += [held("fixed", 1, {"n": 1}, tenant="stranger", is_preemptible=False), job("mine", 4, at=2, tenant="owner")]
    decision = decide("fair_share", snapshot([node("n", 8)], jobs, tenants))
    assert set(decision.run) == {"large", "small", "fixed"}, "the guest borrowed 1, and 1 is not enough"


def test_who_has_waited_longer_than_patience_goes_before_smaller_shares() -> None:
    jobs = [held("r", 2, {"n": 2}, tenant="a"), job("old", 1, at=0, tenant="a"), job("new", 1, at=50, tenant="b")]
    seen = snapshot([node("n", 3)], jobs, TENANTS, now=100)
    assert "new" in decide("fair_share", seen).run
    assert "old" in decide("fair_share", seen, patience_s=60).run


# Deadlines


def test_the_earliest_deadline_goes_first_and_those_without_one_last() -> None:
    jobs = [job("none", 4, at=0), job("late", 4, at=1, deadline_s=900), job("soon", 4, at=2, deadline_s=500)]
    jobs = [dataclasses.replace(j, request=dataclasses.replace(j.request, work=100)) for j in jobs]
    assert set(decide("deadline", snapshot([node("n", 4)], jobs)).run) == {"soon"}


def test_at_equal_deadlines_the_least_laxity_goes_first() -> None:
    jobs = [job("easy", 4, at=0, work=100, deadline_s=900), job("tight", 4, at=1, work=3000, deadline_s=900)]
    assert set(decide("deadline", snapshot([node("n", 4)], jobs)).run) == {"tight"}


def test_a_job_gets_the_fewest_workers_that_meet_its_deadline() -> None:
    one = job("j", (1, 8), work=300, deadline_s=130, restart_s=30)
    assert decide("deadline", snapshot([node("n", 8)], [one])).run == {"j": {"n": 3}}
    quick = dataclasses.replace(one, speed=LinearSpeed({"l4": 3.0}))
    run = decide("deadline", snapshot([node("n", 8), node("m", 8, pool="l4")], [quick])).run
    assert run == {"j": {"m": 1}}, "one fast worker is enough"


def test_a_job_that_will_be_late_anyway_goes_after_those_that_can_make_it_and_says_so() -> None:
    jobs = [job("lost", 4, work=4000, deadline_s=100), job("good", 4, at=1, work=100, deadline_s=300)]
    decision = decide("deadline", snapshot([node("n", 4)], jobs))
    assert set(decision.run) == {"good"}
    assert "cannot be met: 4 workers in pool a100 would be 930 s late" in decision.wait["lost"].text


def test_a_waiting_job_is_told_when_it_must_start_at_the_latest() -> None:
    jobs = [held("r", 4, {"n": 4}, is_preemptible=False), job("j", (2, 4), work=400, deadline_s=300)]
    text = decide("deadline", snapshot([node("n", 4)], jobs)).wait["j"].text
    assert "its deadline is in 300 s and can be met with 2 workers in pool a100" in text
    assert "4 workers in pool a100 could start up to 170 s from now" in text


def test_a_running_job_that_falls_behind_gets_the_fewest_more_workers() -> None:
    late = held("j", (2, 8), {"n": 2}, work=600, deadline_s=180, restart_s=30)
    assert decide("deadline", snapshot([node("n", 8)], [late])).run == {"j": {"n": 4}}


# Baselines


def test_chance_depends_on_the_seed_alone() -> None:
    seen = snapshot([node("n", 4)], [job(f"j{i}", 1, at=i) for i in range(20)])
    runs = [frozenset(decide("random", seen, seed=seed).run) for seed in range(6)]
    assert len(set(runs)) > 3
    assert runs[0] == frozenset(decide("random", seen, seed=0).run)


def test_tenants_take_turns() -> None:
    jobs = [job(f"a{i}", 1, at=i, tenant="a") for i in range(5)] + [
        job(f"b{i}", 1, at=9 + i, tenant="b") for i in range(5)
    ]
    assert set(decide("round_robin", snapshot([node("n", 4)], jobs)).run) == {"a0", "b0", "a1", "b1"}
