"""Where a gang goes, what a resize keeps, and which moves pay."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.scheduling.builders import clusters, job, node, snapshot

from modelyard.cluster import Node
from modelyard.scheduling.clearing import Resident, clear
from modelyard.scheduling.model import Request, Snapshot, Tenant, Wait
from modelyard.scheduling.placement import Moves, Room, bundles, defragment, extend, place, room_of
from modelyard.scheduling.policies import policy
from modelyard.scheduling.room import copies, demand


def room(*nodes: Node) -> Room:
    return Room(snapshot(nodes, ()).pools)


def ask(workers: int = 1, gpus: float = 1, **fields: object) -> Request:
    return job("j", workers, gpus, **fields).request


def test_a_gang_goes_to_the_tightest_node_that_holds_it_whole() -> None:
    here = room(node("a", 8), node("b", 4), node("c", 2))
    assert place(here, ask(), "a100", 3) == {"b": 3}
    assert place(here, ask(), "a100", 1) == {"c": 1}


def test_a_gang_too_large_for_a_node_stays_in_one_rack_and_else_in_one_zone() -> None:
    nodes = [node(f"n{i}", 4, rack=f"r{i // 2}", zone=f"z{i // 4}") for i in range(8)]
    assert place(room(*nodes), ask(), "a100", 8) == {"n0": 4, "n1": 4}
    here = room(*nodes)
    here.take(ask(), {"n0": 1})
    assert place(here, ask(), "a100", 7) == {"n0": 3, "n1": 4}, "the rack that already has a hole"
    assert place(here, ask(), "a100", 16) == {f"n{i}": 4 for i in range(4, 8)}, "the zone that is whole"


def test_in_a_domain_the_fewest_nodes_are_used_and_the_last_is_the_tightest() -> None:
    here = room(node("a", 8), node("b", 8), node("c", 3), node("d", 2))
    assert place(here, ask(), "a100", 10) == {"a": 8, "d": 2}
    assert place(here, ask(), "a100", 11) == {"a": 8, "c": 3}


def test_all_or_nothing() -> None:
    here = room(node("a", 4), node("b", 4))
    assert place(here, ask(), "a100", 9) is None
    assert place(here, ask(gpus=3), "a100", 3) is None, "6 GPUs are there, but no third worker fits on a node"
    assert place(here, ask(), "no-such-pool", 1) is None


def test_a_gang_spans_pools_only_if_it_may() -> None:
    here = room(node("a", 4, pool="a100"), node("b", 4, pool="l4"))
    assert place(here, ask(), ("a100", "l4"), 6) is None
    assert place(here, ask(span_pools=True, pools=("l4", "a100")), ("l4", "a100"), 6) == {"a": 2, "b": 4}
    assert place(here, ask(span_pools=True), ("l4", "a100"), 3) == {"b": 3}, "one pool is enough"


def test_two_workers_never_share_a_gpu() -> None:
    here = room(node("a", 2))
    assert place(here, ask(gpus=0.5), "a100", 3) is None
    assert place(here, ask(gpus=0.5), "a100", 2) == {"a": 2}
    assert [worker["GPU"] for worker, _ in bundles({"a": 2}, ask(gpus=0.5))] == [1.0, 1.0]


def test_what_does_not_fit_cannot_be_taken() -> None:
    here = room(node("a", 2))
    here.take(ask(), {"a": 2})
    with pytest.raises(AssertionError, match="do not fit on a: GPU"):
        here.take(ask(), {"a": 1})


def test_a_gang_that_grows_keeps_its_nodes_and_stays_near() -> None:
    nodes = [node(f"n{i}", 4, rack=f"r{i // 2}") for i in range(4)]
    here = room(*nodes)
    assert place(here, ask(), "a100", 3, held={"n2": 2}) == {"n2": 3}
    assert place(here, ask(), "a100", 6, held={"n2": 4}) == {"n2": 4, "n3": 2}
    assert place(here, ask(), "a100", 9, held={"n2": 4, "n3": 4}) == {"n0": 1, "n2": 4, "n3": 4}
    here.take(ask(), {"n2": 4})
    assert extend(here, ask(), {"n2": 4}, 3) == {"n2": 4, "n3": 3}


def test_a_gang_that_shrinks_gives_up_the_nodes_where_it_has_least() -> None:
    here = room(node("a", 4), node("b", 4), node("c", 4))
    assert place(here, ask(), "a100", 4, held={"a": 1, "b": 3, "c": 1}) == {"b": 3, "c": 1}


def test_a_lost_node_is_replaced_and_the_others_are_kept() -> None:
    here = room(node("a", 4), node("b", 4, alive=False), node("c", 8))
    assert place(here, ask(), "a100", 6, held={"a": 4, "b": 2}) == {"a": 4, "c": 2}


def test_bundles_pin_each_worker_to_its_node() -> None:
    made = bundles({"b": 1, "a": 2}, ask(gpus=2))
    assert [selector["ray.io/node-id"] for _, selector in made] == ["a", "a", "b"]
    assert {worker["GPU"] for worker, _ in made} == {2.0}


def test_only_those_are_asked_to_leave_without_whom_it_does_not_fit() -> None:
    here = room(node("a", 4), node("b", 4))
    residents = [
        Resident(job(name, count).request, {where: count}, rank=rank, cost=cost)
        for name, where, count, rank, cost in [
            ("cheap", "a", 1, 0, 1),
            ("dear", "a", 3, 1, 9),
            ("low", "b", 2, 0, 5),
            ("high", "b", 2, 7, 1),
        ]
    ]
    for one in residents:
        here.take(one.request, one.allocation)
    before = [dict(amounts) for amounts in here.free]

    def leaving(workers: int, gpus: float = 1) -> list[str] | None:
        found = clear(here, ask(workers, gpus), ("a100",), workers, residents)
        return None if found is None else [one.request.job_id for one in found]

    assert leaving(1) == ["cheap"]
    assert leaving(2) == ["low"], "cheap alone would not do, and with low it is not needed"
    assert leaving(3) == ["cheap", "low"]
    assert leaving(1, gpus=3) == ["dear"], "cheap first in order, but without use once dear leaves"
    assert leaving(1, gpus=4) == ["cheap", "dear"]
    assert leaving(9) is None
    assert here.free == before


def fragmented(**small: object) -> Snapshot:
    """Two nodes of 4 with a job of 2 on each, and a job whose one worker needs 4."""
    held = [
        job("s0", 2, work=1e6, allocation={"a": 2}, **small),
        job("s1", 2, work=1e6, allocation={"b": 2}, **small),
    ]
    return snapshot([node("a", 4), node("b", 4)], [*held, job("big", 1, gpus=4)])


def moves(seen: Snapshot) -> Moves | None:
    run = {one.job_id: one.allocation for one in seen.jobs if one.is_running}
    return defragment(seen, run, room_of(seen), seen.by_id["big"], ["a100"])


def test_a_move_is_proposed_when_a_waiting_gang_gains_more_than_the_restart_costs() -> None:
    found = moves(fragmented(restart_s=100))
    assert found is not None
    assert (found.job_id, found.moved, found.allocation) == ("big", {"s0": {"b": 2}}, {"a": 1})
    assert (found.cost_gpu_s, found.gain_gpu_s) == (200, 2400)


def test_a_move_that_costs_more_than_it_gains_is_not_proposed() -> None:
    assert moves(fragmented(restart_s=1300)) is None


def test_a_move_is_not_proposed_for_a_job_that_would_end_soon_anyway() -> None:
    seen = fragmented(restart_s=0)
    soon = dataclasses.replace(seen.jobs[0], request=dataclasses.replace(seen.jobs[0].request, work=10, restart_s=6))
    found = moves(dataclasses.replace(seen, jobs=(soon, *seen.jobs[1:])))
    assert found is not None
    assert found.gain_gpu_s == 4 * 5, "it would have to wait for 5 s only"
    assert set(found.moved) == {"s1"}, "moving the other costs 12 of those 20 GPU-seconds"


def test_jobs_that_must_not_be_moved_stay() -> None:
    assert moves(fragmented(is_preemptible=False)) is None


@pytest.mark.parametrize("name", ["fifo", "priority", "fair_share", "deadline"])
def test_a_policy_moves_a_running_job_so_that_the_next_in_line_fits_unless_told_not_to(name: str) -> None:
    seen = fragmented(restart_s=100)
    assert policy(name).decide(seen).run == {"s0": {"b": 2}, "s1": {"b": 2}, "big": {"a": 1}}
    assert policy(name, moves=False).decide(seen).wait["big"].code is Wait.FRAGMENTED
    limited = dataclasses.replace(seen, tenants=(Tenant(name="default", limit={"a100": 7}),))
    assert policy(name).decide(limited).run.keys() == {"s0", "s1"}, "its quota would not let it start"


@settings(derandomize=True, deadline=None, max_examples=60, database=None)
@given(clusters(), st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9), st.booleans()), max_size=25))
def test_the_index_always_knows_what_a_scan_would_find(
    nodes: tuple[Node, ...], events: list[tuple[int, int, bool]]
) -> None:
    here = room(*nodes)
    shapes = [ask(gpus=1), ask(gpus=2), ask(gpus=0.5), Request(job_id="c", resources={"CPU": 3.0, "GPU": 1.0})]
    held = []
    for shape, workers, gives in events:
        if gives and held:
            here.give(*held.pop(0))
        for pool in here.members:
            scanned = sum(copies(here.free[number], demand(shapes[shape])) for number in here.members[pool])
            assert here.capacity(shapes[shape], pool) == scanned
            found = place(here, shapes[shape], pool, workers)
            assert (found is not None) == (scanned >= workers)
            if found is not None:
                assert sum(found.values()) == workers
                here.take(shapes[shape], found)
                held.append((shapes[shape], found))
