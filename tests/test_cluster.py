"""What a node matches and holds, and that Ray's own view comes through."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelyard.cluster import FakeCluster, Node, NodeGroup, RayCluster, connect, connect_existing
from modelyard.errors import NotFoundError, StartError


def node(**fields: object) -> Node:
    plain: dict = {"node_id": "n", "total": {"CPU": 4}, "free": {"CPU": 4}, **fields}
    return Node(**plain)


@pytest.mark.parametrize(
    ("wanted", "zone", "matches"),
    [
        ("a", "a", True),
        ("a", "b", False),
        ("a", None, False),
        ("!a", "a", False),
        ("!a", "b", True),
        ("!a", None, True),
        ("in(a,b)", "b", True),
        ("in(a, b)", "b", True),
        ("in(a,b)", "c", False),
        ("in(a,b)", None, False),
        ("!in(a,b)", "a", False),
        ("!in(a,b)", "c", True),
        ("!in(a,b)", None, True),
        ("in", "in", True),
    ],
)
def test_a_label_condition_means_what_ray_means(wanted: str, zone: str | None, matches: bool) -> None:
    assert node(labels={"zone": zone} if zone else {}).matches({"zone": wanted}) is matches


def test_all_conditions_must_hold_and_none_holds_everywhere() -> None:
    labelled = node(labels={"zone": "a", "kind": "x"})
    assert labelled.matches({"zone": "a", "kind": "x"})
    assert not labelled.matches({"zone": "a", "kind": "y"})
    assert node().matches({})


def test_the_scarcest_resource_decides_how_often_a_worker_fits() -> None:
    two_gpus = node(free={"CPU": 16, "GPU": 2})
    assert two_gpus.fits({"CPU": 3}) == 5
    assert two_gpus.fits({"CPU": 3, "GPU": 1}) == 2
    assert two_gpus.fits({"CPU": 1, "TPU": 1}) == 0
    assert two_gpus.fits({"GPU": 0.5}) == 4


def test_what_is_free_counts_unless_another_amount_is_given() -> None:
    busy = node(free={"CPU": 1})
    assert busy.fits({"CPU": 1}) == 1
    assert busy.fits({"CPU": 1}, among=busy.total) == 4


def test_a_worker_that_needs_nothing_fits_without_bound() -> None:
    assert node(free={}).fits({"CPU": 0}) > 10**6


@settings(deadline=None)
@given(st.integers(1, 50), st.sampled_from([0.1, 0.2, 0.3, 0.25, 0.7, 1.5, 3.0]))
def test_fractions_of_a_resource_lose_no_copy(copies: int, amount: float) -> None:
    assert node(free={"GPU": sum([amount] * copies)}).fits({"GPU": amount}) == copies
    assert node(free={"GPU": copies * amount - 0.001}).fits({"GPU": amount}) == copies - 1


def test_dead_and_draining_nodes_take_no_new_work() -> None:
    assert node().is_usable
    assert not node(alive=False).is_usable
    assert not node(draining=True).is_usable


def test_a_fake_cluster_tells_what_it_was_given() -> None:
    cluster = FakeCluster([node()], groups=[NodeGroup("cpu", {"CPU": 8.0}, 2)])
    assert cluster.nodes() == (node(),)
    assert [group.max_count for group in cluster.node_groups()] == [2]


@pytest.mark.ray
def test_rays_view_of_its_nodes_comes_through(ray_cluster: str) -> None:
    (only,) = RayCluster().nodes()
    assert only.total["CPU"] == 4
    assert 0 <= only.free["CPU"] <= 4
    assert only.is_usable
    assert only.matches({"ray.io/node-id": only.node_id})
    assert RayCluster().node_groups() == ()


@pytest.mark.parametrize(
    "error", [RuntimeError("raylet died\nmore"), TimeoutError("raylet died"), OSError("raylet died")]
)
def test_a_ray_that_does_not_start_is_one_error(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def fails(**_: object) -> None:
        raise error

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", fails)
    with pytest.raises(StartError, match=r"Ray did not start: raylet died\n  -> try again"):
        connect()


def test_without_a_cluster_to_join_it_says_how_to_start_one(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def fails(**_: object) -> None:
        raise ConnectionError("no address")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", fails)
    with pytest.raises(NotFoundError, match="ray start --head"):
        connect_existing()


def test_an_address_at_which_nothing_answers_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(NotFoundError, match=r"no Ray cluster answers at 127\.0\.0\.1:1"):
        connect_existing()
