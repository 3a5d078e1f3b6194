"""The one seam to Ray's cluster state.

Everything that decides reads a tuple of `Node` values; only `RayCluster` asks Ray for them. Tests pass a
`FakeCluster`.
"""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import yaml

from modelyard.config import settings
from modelyard.errors import ConfigError, NotFoundError, StartError

if TYPE_CHECKING:
    from ray.runtime_context import RuntimeContext

logger = logging.getLogger(__name__)

LAUNCHED_BY = Path("~/ray_bootstrap_config.yaml")
"""Where `ray up` puts the cluster's config on the head."""
LAPTOP_FILE = "laptop.json"
"""What `modelyard up` keeps of its cluster, below `MODELYARD_HOME`."""
_REACH_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Node:
    """One machine of the cluster at one moment; resources by Ray's names (`CPU`, `GPU`, `memory` in bytes)."""

    node_id: str
    total: Mapping[str, float]
    free: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=dict)
    alive: bool = True
    draining: bool = False

    @property
    def is_usable(self) -> bool:
        """Whether new work may be placed here."""
        return self.alive and not self.draining

    def matches(self, selector: Mapping[str, str]) -> bool:
        """Whether the labels satisfy a Ray label selector: `v`, `!v`, `in(a,b)`, `!in(a,b)`."""
        return all(_label_matches(self.labels.get(key), wanted) for key, wanted in selector.items())

    def fits(self, resources: Mapping[str, float], *, among: Mapping[str, float] | None = None) -> int:
        """How many copies of `resources` fit into `among` (default: what is free)."""
        pool = self.free if among is None else among
        # Ray counts in units of 0.0001, so a small tolerance keeps 0.1 * 10 from losing a copy.
        wanted = {name: amount for name, amount in resources.items() if amount > 0}
        if not wanted:
            return 1 << 30
        return min(int(pool.get(name, 0.0) / amount + 1e-6) for name, amount in wanted.items())


@dataclass(frozen=True)
class NodeGroup:
    """A kind of node that the cluster's autoscaler may launch."""

    name: str
    """The node type in the cluster's config; Ray labels its nodes with it: `ray.io/node-group`."""
    resources: Mapping[str, float]
    max_count: int
    labels: Mapping[str, str] = field(default_factory=dict)


class Cluster(Protocol):
    """What a decision may know of a cluster."""

    def nodes(self) -> tuple[Node, ...]:
        """All nodes, dead and draining ones included."""
        ...

    def node_groups(self) -> tuple[NodeGroup, ...]:
        """What an autoscaler may launch; nothing when the size is fixed."""
        ...


@dataclass(frozen=True)
class FakeCluster:
    """A cluster of plain data, for tests and dry runs."""

    members: Sequence[Node]
    groups: Sequence[NodeGroup] = ()

    def nodes(self) -> tuple[Node, ...]:
        """The nodes it was given."""
        return tuple(self.members)

    def node_groups(self) -> tuple[NodeGroup, ...]:
        """The groups it was given."""
        return tuple(self.groups)


class RayCluster:
    """The cluster this process is connected to."""

    def __init__(self, autoscaling_config: Path | None = None) -> None:
        """`autoscaling_config`: the cluster launcher's file; by default the one that `ray up` left on this head.

        Raises:
            ConfigError: it is no such file.
        """
        if autoscaling_config is None and LAUNCHED_BY.expanduser().exists():
            autoscaling_config = LAUNCHED_BY.expanduser()
        self._groups = None if autoscaling_config is None else _groups_in(autoscaling_config)

    def nodes(self) -> tuple[Node, ...]:
        """All nodes Ray knows of, with their free resources as last reported (about a second old)."""
        import ray
        from ray._private import state

        free = state.available_resources_per_node()
        draining = state.state.get_draining_nodes()
        return tuple(
            Node(
                node_id=entry["NodeID"],
                total=entry["Resources"],
                free=free.get(entry["NodeID"], {}),
                labels=entry.get("Labels") or {},
                alive=entry["Alive"],
                draining=entry["NodeID"] in draining,
            )
            for entry in ray.nodes()
        )

    def node_groups(self) -> tuple[NodeGroup, ...]:
        """Worker types of the autoscaler's config; without the launcher's file, as KubeRay reports them (no labels)."""
        if self._groups is not None:
            return self._groups
        from ray._private import state

        config = state.state.get_cluster_config()
        groups = config.node_group_configs if config is not None else ()
        return tuple(
            NodeGroup(group.name, {name: float(amount) for name, amount in group.resources.items()}, group.max_count)
            for group in groups
            if group.max_count
        )


def connect(**options: Any) -> RuntimeContext:
    """Join the Ray cluster this process belongs to, or start a local one; no-op when already connected.

    As with `ray.init`: `RAY_ADDRESS` (set inside `ray job submit`) names the cluster; without it that of
    `modelyard up`, or another one that was started on this machine, is joined; else, or with `RAY_ADDRESS=local`, one
    is started for this process, without a dashboard.

    Raises:
        NotFoundError: nothing answers at the address.
        StartError: Ray did not start.
    """
    import ray

    if not ray.is_initialized():
        _quiet_ray()
        _find_laptop()
        _check_reachable()
        _show_token()
        if os.environ.get("RAY_ADDRESS", "local") == "local" and "address" not in options:
            options = {"include_dashboard": False, **options}
        try:
            ray.init(log_to_driver=False, logging_level=logging.WARNING, **options)
        except ConnectionError:
            raise
        except Exception as error:  # Ray raises a plain one when its node does not come up in time
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise StartError(
                f"Ray did not start: {reason}",
                "try again; if it stays so, see the newest logs in /tmp/ray/session_latest/logs",
            ) from error
        logger.info("connected to Ray at %s", ray.get_runtime_context().gcs_address)
    return ray.get_runtime_context()


def connect_existing() -> RuntimeContext:
    """Join a Ray cluster that is there already: `RAY_ADDRESS`, or the one that was started on this machine.

    Raises:
        NotFoundError: there is none.
    """
    try:
        return connect(address="auto")
    except ConnectionError:
        raise NotFoundError(
            "no Ray cluster is running here", "start one (ray start --head), or set RAY_ADDRESS to its head's address"
        ) from None


def _groups_in(path: Path) -> tuple[NodeGroup, ...]:
    try:
        config = yaml.safe_load(path.read_text())
        head, types = config["head_node_type"], config["available_node_types"]
        return tuple(
            NodeGroup(name, each.get("resources", {}), count, each.get("labels") or {})
            for name, each in sorted(types.items())
            if (count := each.get("max_workers", 0 if name == head else config.get("max_workers", 0))) and name != head
        )
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"autoscaling config {str(path)!r}: {error!r}", "name the file that `ray start --autoscaling-config` got"
        ) from error


def _find_laptop() -> None:
    """Name the cluster that `modelyard up` started, if it answers and the environment names no other."""
    if "RAY_ADDRESS" in os.environ:
        return
    try:
        address = str(json.loads((settings().home / LAPTOP_FILE).read_text())["address"])
        host, _, port = address.partition(":")
        socket.create_connection((host, int(port)), timeout=1.0).close()
    except (OSError, ValueError, KeyError, TypeError):
        return
    os.environ["RAY_ADDRESS"] = address


def _quiet_ray() -> None:
    """Defaults for a fresh session; whatever the user set stays."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")


def _check_reachable() -> None:
    """Whether anything listens at `RAY_ADDRESS`; Ray itself would try for minutes."""
    address = os.environ.get("RAY_ADDRESS", "")
    host, colon, port = address.rpartition(":")
    if not (colon and port.isdigit()) or "//" in address:
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise NotFoundError(
            f"no Ray cluster answers at {address}: {error}",
            "set RAY_ADDRESS to its head's address and port, or unset it to use the one on this machine",
        ) from None


def _show_token() -> None:
    """Use the token that is there. A local cluster asks for it; others ignore it."""
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if "RAY_AUTH_MODE" not in os.environ and (os.environ.get("RAY_AUTH_TOKEN") or path.is_file()):
        from ray._raylet import Config  # type: ignore[attr-defined]

        os.environ["RAY_AUTH_MODE"] = "token"
        Config.initialize("")  # Ray read its settings when it was imported


def _label_matches(actual: str | None, wanted: str) -> bool:
    negated = wanted.startswith("!")
    body = wanted[1:] if negated else wanted
    values = {v.strip() for v in body[3:-1].split(",")} if body.startswith("in(") and body.endswith(")") else {body}
    return (actual in values) != negated
