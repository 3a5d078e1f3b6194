"""Emptying a node: nothing new is placed on it, what runs there is told to leave, and this waits until it has left."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from modelyard.cluster import Node, RayCluster
from modelyard.clusters.laptop import NODE
from modelyard.errors import ConfigError, NotFoundError, UnavailableError, WaitTimeoutError

POLL_S = 1.0
CALL_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Load:
    """What a node still holds."""

    resources: Mapping[str, float] = field(default_factory=dict)
    """In use, by Ray's names."""
    actors: tuple[str, ...] = ()
    """Classes of the actors that live there."""

    @property
    def is_empty(self) -> bool:
        """Whether nobody would miss the node."""
        return not self.resources and not self.actors

    def __str__(self) -> str:
        held = [f"{amount:g} {name}" for name, amount in self.resources.items()]
        counts = {actor: self.actors.count(actor) for actor in dict.fromkeys(self.actors)}
        held += [f"{count} x {name}" for name, count in counts.items()]
        return ", ".join(held) or "nothing"


def find(nodes: Sequence[Node], wanted: str, addresses: Mapping[str, str]) -> Node:
    """The one node meant: by id or its beginning (6 letters or more), address, or name in `modelyard status`. Pure.

    Raises:
        NotFoundError: there is none.
        ConfigError: there are several, or it is the head, which cannot be drained.
    """
    alive = [node for node in nodes if node.alive]
    found = [
        node
        for node in alive
        if wanted in (node.labels.get(NODE), addresses.get(node.node_id))
        or (len(wanted) >= 6 and node.node_id.startswith(wanted))
    ]
    if not found:
        known = ", ".join(node.labels.get(NODE) or node.node_id[:12] for node in alive)
        raise NotFoundError(f"no node {wanted!r} is alive", f"known: {known}")
    if len(found) > 1:
        ids = ", ".join(node.node_id[:12] for node in found)
        raise ConfigError(f"{wanted!r} names {len(found)} nodes: {ids}", "name one by its id")
    if "node:__internal_head__" in found[0].total:
        raise ConfigError(f"{wanted!r} is the head, which the whole cluster needs", "drain another node")
    return found[0]


def drain(
    wanted: str,
    deadline_s: float,
    say: Callable[[str], None],
    *,
    reason: str = "drained by hand",
) -> None:
    """Drain a node and wait until it is empty.

    Ray tells the training runs and Serve replicas there as it does before a spot node is taken away: runs write a
    checkpoint and go on elsewhere, replicas are replaced before they stop.

    Args:
        wanted: as `find` takes it.
        deadline_s: seconds that what runs there may take; announced to it.
        say: gets what is left whenever it changes.
        reason: shown by Ray to those who ask.

    Raises:
        NotFoundError, ConfigError: as `find`.
        UnavailableError: Ray refused, or the node is just going.
        WaitTimeoutError: something is still there after `deadline_s`.
    """
    import ray
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason
    from ray.exceptions import RayError

    addresses = {entry["NodeID"]: entry["NodeManagerAddress"] for entry in ray.nodes()}
    shared = len(set(addresses.values())) < len(addresses)
    node = find(RayCluster().nodes(), wanted, {} if shared else addresses)
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    client = GcsClient(address=ray.get_runtime_context().gcs_address)
    until_ms = int((time.time() + deadline_s) * 1000)
    preemption = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    try:
        accepted, problem = client.drain_node(node.node_id, preemption, reason, until_ms)
    except RayError as error:
        accepted, problem = False, str(error)
    if not accepted:
        raise UnavailableError(f"Ray does not drain node {node.node_id[:12]}: {problem}", "try again in a moment")
    deadline, last = time.monotonic() + deadline_s, None
    while not (left := load(node.node_id)).is_empty:
        if str(left) != last:
            say(f"still there: {left}")
            last = str(left)
        if time.monotonic() > deadline:
            what = f"node {node.node_id[:12]} to be empty; it holds {left}, takes nothing new, and Ray ends it"
            raise WaitTimeoutError(what, deadline_s, "--deadline-s")
        time.sleep(POLL_S)


def load(node_id: str) -> Load:
    """What a node holds now; nothing once it is gone."""
    from ray.util.state import list_actors

    node = next((each for each in RayCluster().nodes() if each.node_id == node_id and each.alive), None)
    if node is None:
        return Load()
    used = {name: total - node.free.get(name, 0.0) for name, total in node.total.items() if name in ("CPU", "GPU")}
    filters = [("node_id", "=", node_id), ("state", "=", "ALIVE")]
    actors = [
        str(actor["class_name"] if isinstance(actor, dict) else actor.class_name)
        for actor in list_actors(filters=filters, timeout=int(CALL_TIMEOUT_S), raise_on_missing_output=False)
    ]
    mine = tuple(sorted(actor for actor in actors if actor not in ("ProxyActor",)))
    return Load({name: amount for name, amount in used.items() if amount > 1e-6 and node.free}, mine)
