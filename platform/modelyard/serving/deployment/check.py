"""Whether replicas can ever be placed: Serve itself would wait for ever and say nothing."""

from __future__ import annotations

from collections.abc import Sequence

from modelyard.cluster import Cluster, Node
from modelyard.errors import CapacityError
from modelyard.scheduling.growth import launchable
from modelyard.serving.deployment.config import Placement


def check_placement(cluster: Cluster, name: str, placement: Placement, replicas: int) -> None:
    """Refuse a deployment whose first replicas no node, idle or yet to be launched, could hold.

    Raises:
        CapacityError: the labels match nothing, or the matching nodes are too small; says what there is.
    """
    nodes = [node for node in cluster.nodes() if node.alive]
    nodes += launchable(nodes, cluster.node_groups(), replicas)
    matching = [node for node in nodes if node.matches(placement.selector)]
    needed = ", ".join(f"{amount:g} {resource}" for resource, amount in placement.per_replica.items())
    if not matching:
        raise CapacityError(
            f"{name}: no node matches the label selector {placement.selector}",
            f"labels in this cluster: {_labels(nodes) or 'none'}",
        )
    room = sum(node.fits(placement.per_replica, among=node.total) for node in matching)
    if room < replicas:
        sizes = "; ".join(sorted({_size(node, placement) for node in matching}))
        raise CapacityError(
            f"{name}: {replicas} replica(s) of {needed} never fit: {len(matching)} matching node(s) with {sizes} hold "
            f"{room}",
            f"lower min_replicas to {room}, or ask for less" if room else "ask for less per replica, or add nodes",
        )


def _labels(nodes: Sequence[Node]) -> str:
    own = {
        f"{key}={value}" for node in nodes for key, value in node.labels.items() if not key.startswith("ray.io/node")
    }
    return ", ".join(sorted(own))


def _size(node: Node, placement: Placement) -> str:
    return ", ".join(f"{node.total.get(name, 0.0):g} {name}" for name in placement.per_replica)
