"""What an autoscaler is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.scheduling.builders import job, node, snapshot

from modelyard.cluster import FakeCluster, NodeGroup, RayCluster
from modelyard.errors import CapacityError, ConfigError
from modelyard.scheduling.growth import growth, launchable
from modelyard.scheduling.journal import Journal
from modelyard.scheduling.model import Request, Snapshot
from modelyard.scheduling.policies import policy
from modelyard.scheduling.scheduler import Scheduler

A100 = NodeGroup("a100-nodes", {"GPU": 4.0}, 2, {"modelyard/pool": "a100"})
L4 = NodeGroup("l4", {"GPU": 2.0}, 3)


def asked(seen: Snapshot, *groups: NodeGroup) -> tuple[dict[str, int], dict[str, str]]:
    """Bundles by pool, and the pools that are to grow by job."""
    found = growth(seen, policy("fifo").decide(seen), groups)
    pools: dict[str, int] = {}
    for resources, labels in found.bundles:
        assert resources == {"GPU": 1.0}
        pools[labels["modelyard/pool"]] = pools.get(labels["modelyard/pool"], 0) + 1
    return pools, dict(found.pools)


def test_running_leases_are_part_of_what_is_asked_for() -> None:
    seen = snapshot([node("n", 2, "l4")], [job("runs", 2, allocation={"n": 2}), job("waits", 2, at=1)])
    assert asked(seen, L4) == ({"l4": 4}, {"waits": "l4"}), "Ray counts the whole cluster, not what is missing"


def test_a_cluster_of_fixed_size_is_asked_for_nothing() -> None:
    assert asked(snapshot([node("n", 2, "l4")], [job("waits", 4)])) == ({}, {})


def test_a_gang_is_asked_for_whole_in_one_pool_where_it_can_be_had() -> None:
    seen = snapshot([], [job("gang", 7, pools=("l4", "a100"))])
    assert asked(seen, A100, L4) == ({"a100": 7}, {"gang": "a100"}), "l4 can only ever hold six"


def test_what_can_not_be_had_beside_the_rest_is_not_asked_for() -> None:
    seen = snapshot([], [job("first", 6, pools=("l4",)), job("second", 6, pools=("l4",), at=1)])
    assert asked(seen, L4) == ({"l4": 6}, {"first": "l4"})


def test_who_waits_for_other_things_than_room_makes_nothing_grow() -> None:
    seen = snapshot([node("n", 2, "l4")], [job("held", 4, is_held=True)])
    assert asked(seen, L4) == ({}, {})


def test_a_group_without_labels_counts_to_the_pool_of_its_nodes() -> None:
    there = node("n", 2, "cheap")
    labelled = type(there)(there.node_id, there.total, there.free, {**there.labels, "ray.io/node-group": "l4"})
    added = launchable([labelled], [L4], 8)
    assert [new.labels["modelyard/pool"] for new in added] == ["cheap", "cheap"], "one of three is there already"
    assert [new.labels["modelyard/pool"] for new in launchable([], [L4], 8)] == ["l4", "l4", "l4"]


def test_a_job_that_fits_only_nodes_yet_to_be_launched_is_admitted_and_told_so(tmp_path: Path) -> None:
    cluster = FakeCluster([node("n", 2, "l4")], groups=[L4, A100])
    scheduler = Scheduler(Journal(f"sqlite:///{tmp_path / 'j.db'}"), cluster, policy("fifo"))
    scheduler.submit(Request(job_id="gang", min_workers=8, max_workers=8, pools=("a100",)))
    scheduler.decide()
    reason = scheduler.reason("gang")
    assert reason is not None
    assert "more nodes of a100 were asked for" in reason.text
    with pytest.raises(CapacityError, match="8"):
        scheduler.submit(Request(job_id="huge", min_workers=9, max_workers=9, pools=("a100",)))


def test_the_launchers_file_names_the_groups_but_not_the_head(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(
        """
        max_workers: 5
        head_node_type: head
        available_node_types:
          head: {resources: {CPU: 4}}
          l4: {resources: {GPU: 2}, max_workers: 3, labels: {modelyard/pool: cheap}}
          cpu: {resources: {CPU: 8}}
        """
    )
    groups = {group.name: group for group in RayCluster(file).node_groups()}
    assert groups["l4"] == NodeGroup("l4", {"GPU": 2}, 3, {"modelyard/pool": "cheap"})
    assert (sorted(groups), groups["cpu"].max_count) == (["cpu", "l4"], 5)
    file.write_text("just text")
    with pytest.raises(ConfigError, match=r"cluster\.yaml"):
        RayCluster(file)
