"""What Ray's autoscaler is asked for, so that the pool grows that a waiting gang needs.

Ray's `request_resources` names what the whole cluster should be able to hold at once, not what is missing: leases
that run are part of it, and keep their nodes from being taken away as idle.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from modelyard.cluster import Node, NodeGroup
from modelyard.scheduling.model import POOL_LABEL, Decision, Snapshot, Wait, pool_of
from modelyard.scheduling.placement import place, room_of

GROUP_LABEL = "ray.io/node-group"
Bundle = tuple[Mapping[str, float], Mapping[str, str]]
"""Resources and label selector of one worker."""
_FOR_ROOM = (Wait.NO_ROOM, Wait.FRAGMENTED, Wait.BEHIND, Wait.NEVER_FITS, Wait.PREEMPTED)
"""Reasons to wait that more nodes would end."""


@dataclass(frozen=True)
class Growth:
    """What to ask for."""

    bundles: tuple[Bundle, ...] = ()
    pools: Mapping[str, str] = field(default_factory=dict)
    """Waiting job to the pool that should get nodes for it."""


def launchable(nodes: Sequence[Node], groups: Sequence[NodeGroup], most: int) -> tuple[Node, ...]:
    """Nodes that could still be launched, at most `most` of each group, as if they were there and empty.

    A group's pool is that of its labels, else that of its nodes of now or before, else the group's own name.
    """
    pools = {node.labels[GROUP_LABEL]: pool_of(node) for node in nodes if GROUP_LABEL in node.labels}
    alive = Counter(node.labels.get(GROUP_LABEL) for node in nodes if node.alive)
    found = []
    for group in groups:
        labels = {POOL_LABEL: pools.get(group.name, group.name), **group.labels}
        for number in range(min(group.max_count - alive[group.name], most)):
            name = f"{group.name}+{number}"
            found.append(Node(node_id=name, total=group.resources, free=group.resources, labels=labels))
    return tuple(found)


def growth(snapshot: Snapshot, decision: Decision, groups: Sequence[NodeGroup]) -> Growth:
    """What the autoscaler should make room for: all that is to run, and the smallest gang of each job without room.

    Gangs are placed one after the other onto the nodes there are and those that could be launched, so that what is
    asked for can be had. Nothing for a cluster of a fixed size.
    """
    if not groups:
        return Growth()
    waiting = [job for job in snapshot.jobs if (reason := decision.wait.get(job.job_id)) and reason.code in _FOR_ROOM]
    added = launchable(snapshot.nodes, groups, sum(job.request.min_workers for job in waiting))
    larger = dataclasses.replace(snapshot, nodes=(*snapshot.nodes, *added))
    room = room_of(larger, decision)
    allocations = dict(decision.run)
    for job in waiting:
        pools = [pool for pool in job.request.pools or tuple(room.members) if pool in room.members]
        if (found := place(room, job.request, pools, job.request.min_workers)) is not None:
            room.take(job.request, found)
            allocations[job.job_id] = found
    bundles = [
        (dict(snapshot.by_id[job_id].request.resources), {POOL_LABEL: pool_of(larger.node_by_id[node_id])})
        for job_id, allocation in allocations.items()
        for node_id, workers in sorted(allocation.items())
        for _ in range(workers)
    ]
    asked = {
        job.job_id: pool_of(larger.node_by_id[min(allocations[job.job_id])])
        for job in waiting
        if job.job_id in allocations and not set(allocations[job.job_id]) <= set(snapshot.node_by_id)
    }
    return Growth(tuple(bundles), asked)
