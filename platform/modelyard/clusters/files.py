"""Cluster files as plain data: `ray up` files of AWS, Google Cloud, Azure and own machines, and KubeRay manifests."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from modelyard import config_file
from modelyard.errors import ConfigError, nearest

Kind = Literal["aws", "gcp", "azure", "local", "kuberay"]
CLOUDS = ("aws", "gcp", "azure")
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
    node_types: tuple[NodeType, ...]
    warnings: tuple[str, ...] = field(default=())


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
        raise ConfigError(
            f"{str(path)!r}: provider.type is {kind!r}", f"known: aws, azure, gcp, local; {nearest(str(kind), CLOUDS)}"
        )
    types = _machines(data) if kind == "local" else _node_types(data, kind)
    return ClusterFile(path, kind, str(data.get("cluster_name", "")), data, tuple(types))


def section(data: Mapping[str, Any], dotted: str) -> Any:
    """The value at a dotted field; an empty mapping where the way there ends."""
    found: Any = data
    for key in dotted.split("."):
        found = found.get(key) if isinstance(found, Mapping) else None
    return {} if found is None else found


def host_labels(entry: Mapping[str, Any]) -> dict[str, str]:
    """The labels of one machine of `metadata.hosts`."""
    names = {"pool": POOL, "site": SITE, "tier": TIER, "zone": ZONE, "accelerator": ACCELERATOR}
    given = {label: str(entry[name]) for name, label in names.items() if entry.get(name) is not None}
    return {**given, **{str(key): str(value) for key, value in section(entry, "labels").items()}}


def host_flags(file: ClusterFile, addresses: set[str]) -> list[str]:
    """What `ray start` should be told on the machine that has one of these addresses.

    Raises:
        ConfigError: the file lists no such machine.
    """
    hosts = section(file.data, "metadata.hosts")
    address = next((each for each in hosts if each in addresses), None)
    if address is None:
        raise ConfigError(
            f"{str(file.path)!r}: metadata.hosts has none of this machine's addresses: {', '.join(sorted(addresses))}",
            "add this machine there, by the address that the others reach it at",
        )
    entry = hosts[address]
    flags = [f"--node-ip-address={address}"]
    labels = ",".join(f"{key}={value}" for key, value in sorted(host_labels(entry).items()))
    flags += [f"--labels={labels}"] if labels else []
    flags += [f"--num-cpus={entry['cpus']}"] if "cpus" in entry else []
    flags += [f"--num-gpus={entry['gpus']}"] if "gpus" in entry else []
    if custom := section(entry, "resources"):
        flags.append("--resources={" + ",".join(f'"{name}":{amount}' for name, amount in custom.items()) + "}")
    return flags


def is_address(text: str) -> bool:
    """Whether this is an IP address or could be a host's name."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        looks_numeric = re.fullmatch(r"[0-9.]+", text) is not None
        label = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
        return not looks_numeric and re.fullmatch(rf"{label}(?:\.{label})*", text) is not None
    return True


def quantity(text: str | float) -> float | None:
    """A Kubernetes quantity (`500m`, `16Gi`) as a number; None when it is none."""
    match = _QUANTITY.match(str(text))
    try:
        return float(match[1]) * _UNITS.get(match[2] or "", 1.0) if match else None
    except ValueError:
        return None


def instance_of(kind: str, node_config: Mapping[str, Any]) -> str | None:
    """The machine type in a provider's `node_config`."""
    holder = section(node_config, "azure_arm_parameters") if kind == "azure" else node_config
    found = holder.get(_INSTANCE_KEYS.get(kind, ""))
    return None if found is None else str(found)


def _node_types(data: Mapping[str, Any], kind: str) -> Iterator[NodeType]:
    head = data.get("head_node_type")
    for name, entry in section(data, "available_node_types").items():
        if not isinstance(entry, Mapping):
            continue  # named by the schema check
        highest = data.get("max_workers", 0) if name != head else 0
        yield NodeType(
            name=str(name),
            where=f"available_node_types.{name}",
            min_count=_whole(entry.get("min_workers"), 0),
            max_count=_whole(entry.get("max_workers"), _whole(highest, 0)),
            resources=_numbers(section(entry, "resources")),
            labels={str(key): str(value) for key, value in section(entry, "labels").items()},
            instance=instance_of(kind, section(entry, "node_config")),
            is_head=name == head,
        )


def _machines(data: Mapping[str, Any]) -> Iterator[NodeType]:
    head = section(data, "provider").get("head_ip")
    hosts = section(data, "metadata.hosts")
    for address in [head, *(section(data, "provider").get("worker_ips") or [])]:
        entry = section(hosts, "") if not isinstance(hosts.get(address), Mapping) else hosts[address]
        resources = {"CPU": entry.get("cpus"), "GPU": entry.get("gpus"), **section(entry, "resources")}
        yield NodeType(
            name=str(address),
            where=f"metadata.hosts.{address}",
            min_count=1,
            max_count=1,
            resources=_numbers(resources),
            labels=host_labels(entry),
            is_head=address == head,
        )


def _read_manifest(path: Path, data: Mapping[str, Any]) -> ClusterFile:
    kind = str(data.get("kind"))
    if kind not in MANIFESTS or not str(data.get("apiVersion", "")).startswith("ray.io/"):
        raise ConfigError(
            f"{str(path)!r}: {data.get('apiVersion')} {kind} is no cluster",
            "give one of ray.io/v1: " + ", ".join(MANIFESTS),
        )
    where = MANIFESTS[kind]
    spec = section(data, where)
    groups = [(f"{where}.headGroupSpec", section(spec, "headGroupSpec"), True)]
    workers = spec.get("workerGroupSpecs") or []
    groups += [
        (f"{where}.workerGroupSpecs.{number}", group, False)
        for number, group in enumerate(workers)
        if isinstance(group, Mapping)
    ]
    types = tuple(_group(place, group, is_head) for place, group, is_head in groups)
    return ClusterFile(path, "kuberay", str(section(data, "metadata").get("name", "")), data, types)


def _group(where: str, group: Mapping[str, Any], is_head: bool) -> NodeType:
    containers = section(group, "template.spec").get("containers") or [{}]
    limits = section(containers[0], "resources.limits")
    resources: dict[str, Any] = {"CPU": limits.get("cpu"), "GPU": limits.get("nvidia.com/gpu")}
    start = section(group, "rayStartParams")
    resources |= {"CPU": start["num-cpus"]} if "num-cpus" in start else {}
    return NodeType(
        name="head" if is_head else str(group.get("groupName", where.rpartition(".")[2])),
        where=where,
        min_count=1 if is_head else _whole(group.get("minReplicas"), 0),
        max_count=1 if is_head else _whole(group.get("maxReplicas"), 0),
        resources={name: amount for name, each in resources.items() if each is not None and (amount := quantity(each))},
        labels={str(key): str(value) for key, value in section(group, "labels").items()},
        is_head=is_head,
    )


def _numbers(resources: Mapping[str, Any]) -> dict[str, float]:
    return {str(name): float(amount) for name, amount in resources.items() if isinstance(amount, int | float)}


def _whole(value: Any, default: int) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else default
