"""Cluster files as plain data: `ray up` files of AWS, Google Cloud, Azure and own machines, and KubeRay manifests."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from modelyard import config_file
from modelyard.errors import ConfigError, nearest

Kind = Literal["aws", "gcp", "azure", "local", "kuberay"]
CLOUDS = ("aws", "gcp", "azure")
API_VERSION = "ray.io/v1"
MANIFESTS = {"RayCluster": "spec", "RayJob": "spec.rayClusterSpec", "RayService": "spec.rayClusterConfig"}
POOL, SITE, TIER = "modelyard/pool", "modelyard/site", "modelyard/tier"
ZONE, ACCELERATOR, MARKET = "ray.io/availability-zone", "ray.io/accelerator-type", "ray.io/market-type"
HOST_FIELDS = ("pool", "site", "tier", "zone", "accelerator", "cpus", "gpus", "resources", "labels")
_INSTANCE_KEYS = {"aws": "InstanceType", "gcp": "machineType", "azure": "vmSize"}
_QUANTITY = re.compile(r"([0-9.]+)(m|Ki|Mi|Gi|Ti|k|M|G|T)?\Z")
_UNITS = {
    "m": 1e-3,
    "Ki": 2.0**10,
    "Mi": 2.0**20,
    "Gi": 2.0**30,
    "Ti": 2.0**40,
    "k": 1e3,
    "M": 1e6,
    "G": 1e9,
    "T": 1e12,
}


@dataclass(frozen=True)
class NodeType:
    """A kind of node that a file describes; one machine, when the file lists machines."""

    name: str
    where: str
    """The dotted field of the file it stands in."""
    min_count: int
    max_count: int
    resources: Mapping[str, float]
    """By Ray's names; `memory` in bytes."""
    labels: Mapping[str, str]
    instance: str | None = None
    is_head: bool = False

    @property
    def pool(self) -> str:
        """Value of the label `modelyard/pool`."""
        return self.labels.get(POOL, "default")

    @property
    def is_spot(self) -> bool:
        """Whether the cloud may take its nodes back at any time."""
        return self.labels.get(MARKET) == "spot"


@dataclass(frozen=True)
class ClusterFile:
    """One file, read."""

    path: Path
    kind: Kind
    name: str
    data: Mapping[str, Any]

    @cached_property
    def node_types(self) -> tuple[NodeType, ...]:
        """What the file describes.

        Raises:
            ShapeError: a field that leads there is no mapping, or no list.
        """
        if self.kind == "kuberay":
            return tuple(_groups(self.data))
        return tuple(_machines(self.data) if self.kind == "local" else _node_types(self.data, self.kind))


class ShapeError(ConfigError):
    """A field holds something of another shape than it must."""

    def __init__(self, field: str, problem: str, todo: str) -> None:
        super().__init__(f"{field}: {problem}", todo)
        self.args = (field, problem, todo)
        self.field, self.shape = field, problem


def read(path: Path) -> ClusterFile:
    """Read a file of any kind.

    Raises:
        ConfigError: it is not there, is not YAML, or is not a cluster file.
    """
    data = config_file.read(path)
    if "apiVersion" in data or "kind" in data:
        return _read_manifest(path, data)
    provider = data.get("provider")
    if not isinstance(provider, Mapping) or "type" not in provider:
        raise ConfigError(
            f"{str(path)!r}: provider.type is missing",
            "give a `ray up` file (provider: {type: aws}), or a KubeRay manifest (kind: RayCluster)",
        )
    kind = provider["type"]
    if kind not in (*CLOUDS, "local"):
        raise ConfigError(f"{str(path)!r}: provider.type is {kind!r}", nearest(str(kind), (*CLOUDS, "local")))
    return ClusterFile(path, kind, str(data.get("cluster_name") or ""), data)


def section(data: Any, dotted: str, where: str = "") -> Mapping[str, Any]:
    """The mapping at a dotted field; an empty one where the way there ends.

    Args:
        data: what holds it; itself checked.
        dotted: the way there; empty for `data` itself.
        where: where `data` stands in its file, for the error.

    Raises:
        ShapeError: something on the way is no mapping.
    """
    found, place = mapping(data, where or "the file"), where
    for key in dotted.split(".") if dotted else ():
        place = f"{place}.{key}" if place else key
        found = mapping(found.get(key), place)
    return found


def mapping(value: Any, where: str) -> Mapping[str, Any]:
    """The value as a mapping, empty for None; raises ShapeError when it is something else."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ShapeError(where, f"holds {str(value)[:60]!r}, which is no section", "write `key: value` pairs there")
    return value


def listed(holder: Mapping[str, Any], key: str, where: str) -> list[Any]:
    """The list at a key of what stands at `where`, empty where there is none; raises ShapeError for another shape."""
    value = holder.get(key)
    if value is None:
        return []
    if not isinstance(value, list):
        raise ShapeError(f"{where}.{key}", f"holds {str(value)[:60]!r}, which is no list", "write a list there")
    return value


def host_labels(entry: Mapping[str, Any], where: str = "metadata.hosts") -> dict[str, str]:
    """The labels of one machine of `metadata.hosts`."""
    names = {"pool": POOL, "site": SITE, "tier": TIER, "zone": ZONE, "accelerator": ACCELERATOR}
    given = {label: str(entry[name]) for name, label in names.items() if entry.get(name) is not None}
    return {**given, **{str(key): str(value) for key, value in section(entry, "labels", where).items()}}


def host_flags(file: ClusterFile, addresses: set[str]) -> list[str]:
    """What `ray start` should be told on the machine that has one of these addresses.

    Raises:
        ConfigError: the file lists no such machine.
    """
    hosts = section(file.data, "metadata.hosts")
    address = next((each for each in hosts if str(each) in addresses), None)
    if address is None:
        raise ConfigError(
            f"{str(file.path)!r}: metadata.hosts has none of this machine's addresses: {', '.join(sorted(addresses))}",
            "add this machine there, by the address that the others reach it at",
        )
    where = f"metadata.hosts.{address}"
    entry = mapping(hosts[address], where)
    flags = [f"--node-ip-address={address}"]
    labels = ",".join(f"{key}={value}" for key, value in sorted(host_labels(entry, where).items()))
    flags += [f"--labels={labels}"] if labels else []
    flags += [f"--num-cpus={entry['cpus']}"] if "cpus" in entry else []
    flags += [f"--num-gpus={entry['gpus']}"] if "gpus" in entry else []
    if custom := section(entry, "resources", where):
        flags.append("--resources={" + ",".join(f'"{name}":{amount}' for name, amount in custom.items()) + "}")
    return flags


def is_address(text: str) -> bool:
    """Whether this is an IP address."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def quantity(text: str | float) -> float | None:
    """A Kubernetes quantity (`500m`, `16Gi`) as a number; None when it is none."""
    match = _QUANTITY.match(str(text))
    try:
        return float(match[1]) * _UNITS.get(match[2] or "", 1.0) if match else None
    except ValueError:
        return None


def instance_of(kind: str, node_config: Mapping[str, Any], where: str = "node_config") -> str | None:
    """The machine type in a provider's `node_config`."""
    holder = section(node_config, "azure_arm_parameters", where) if kind == "azure" else node_config
    found = holder.get(_INSTANCE_KEYS.get(kind, ""))
    return None if found is None else str(found)


def _node_types(data: Mapping[str, Any], kind: str) -> Iterator[NodeType]:
    head = data.get("head_node_type")
    for name, value in section(data, "available_node_types").items():
        where = f"available_node_types.{name}"
        entry = mapping(value, where)
        highest = data.get("max_workers", 0) if name != head else 0
        yield NodeType(
            name=str(name),
            where=where,
            min_count=_whole(entry.get("min_workers"), 0),
            max_count=_whole(entry.get("max_workers"), _whole(highest, 0)),
            resources=_numbers(section(entry, "resources", where)),
            labels={str(key): str(value) for key, value in section(entry, "labels", where).items()},
            instance=instance_of(kind, section(entry, "node_config", where), f"{where}.node_config"),
            is_head=name == head,
        )


def _machines(data: Mapping[str, Any]) -> Iterator[NodeType]:
    provider, hosts = section(data, "provider"), section(data, "metadata.hosts")
    head = provider.get("head_ip")
    for address in map(str, [head, *listed(provider, "worker_ips", "provider")]):
        where = f"metadata.hosts.{address}"
        entry = mapping(hosts.get(address), where)
        resources = {"CPU": entry.get("cpus"), "GPU": entry.get("gpus"), **section(entry, "resources", where)}
        yield NodeType(
            name=address,
            where=where,
            min_count=1,
            max_count=1,
            resources=_numbers(resources),
            labels=host_labels(entry, where),
            is_head=address == str(head),
        )


def _read_manifest(path: Path, data: Mapping[str, Any]) -> ClusterFile:
    kind = str(data.get("kind"))
    if kind not in MANIFESTS or data.get("apiVersion") != API_VERSION:
        raise ConfigError(
            f"{str(path)!r}: {data.get('apiVersion')} {kind} is no cluster",
            f"give one of {API_VERSION}: " + ", ".join(MANIFESTS),
        )
    return ClusterFile(path, "kuberay", str(section(data, "metadata").get("name") or ""), data)


def _groups(data: Mapping[str, Any]) -> Iterator[NodeType]:
    where = MANIFESTS[data["kind"]]
    spec = section(data, where)
    yield _group(f"{where}.headGroupSpec", section(spec, "headGroupSpec", where), is_head=True)
    for number, group in enumerate(listed(spec, "workerGroupSpecs", where)):
        place = f"{where}.workerGroupSpecs.{number}"
        yield _group(place, mapping(group, place), is_head=False)


def _group(where: str, group: Mapping[str, Any], is_head: bool) -> NodeType:
    pod = f"{where}.template.spec"
    containers = listed(section(group, "template.spec", where), "containers", pod) or [{}]
    limits = section(containers[0], "resources.limits", f"{pod}.containers.0")
    resources: dict[str, Any] = {"CPU": limits.get("cpu"), "GPU": limits.get("nvidia.com/gpu")}
    start = section(group, "rayStartParams", where)
    resources |= {"CPU": start["num-cpus"]} if "num-cpus" in start else {}
    return NodeType(
        name="head" if is_head else str(group.get("groupName", where.rpartition(".")[2])),
        where=where,
        min_count=1 if is_head else _whole(group.get("minReplicas"), 0),
        max_count=1 if is_head else _whole(group.get("maxReplicas"), 0),
        resources={name: amount for name, each in resources.items() if each is not None and (amount := quantity(each))},
        labels={str(key): str(value) for key, value in section(group, "labels", where).items()},
        is_head=is_head,
    )


def _numbers(resources: Mapping[str, Any]) -> dict[str, float]:
    return {str(name): float(amount) for name, amount in resources.items() if isinstance(amount, int | float)}


def _whole(value: Any, default: int) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else default
