"""Whether a cluster file can work, found out offline, with every problem named: field, value, what to do.

Ray's own schema comes first; it lets through unknown machine types, labels with bad characters, limits that
contradict each other, open dashboards and addresses that are none, so these are judged here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from modelyard.clusters import instances, manifests
from modelyard.clusters.files import (
    ACCELERATOR,
    CLOUDS,
    HOST_FIELDS,
    POOL,
    SITE,
    TIER,
    ZONE,
    ClusterFile,
    NodeType,
    is_address,
    section,
)
from modelyard.errors import nearest

LABELS = (POOL, SITE, TIER, ZONE)
"""What every node must say of itself; nodes with GPUs name their accelerator as well."""
TIERS = ("cloud", "edge")
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?\Z")
_DEFAULTED = ("initialization_commands", "head_setup_commands", "worker_setup_commands")
_OPEN_HOSTS = ("0.0.0.0", "::")


class Problem(NamedTuple):
    """One thing that is wrong with a file."""

    field: str
    problem: str
    todo: str
    level: Literal["error", "warning"] = "error"

    def __str__(self) -> str:
        return f"{self.level}: {self.field}: {self.problem}\n  -> {self.todo}"


def check(file: ClusterFile) -> list[Problem]:
    """All problems of a file, worst first; none when it can be used as it is."""
    found = [*manifests.problems(file)] if file.kind == "kuberay" else [*_schema(file)]
    if not any(problem.level == "error" for problem in found) or file.kind == "kuberay":
        parts: dict[str, Sequence[Callable[[ClusterFile], Iterator[Problem]]]] = {
            "local": (_addresses, _commands, _mounts),
            "kuberay": (),
        }
        for part in (*parts.get(file.kind, (_limits, _instances, _group_of_ports, _commands, _mounts)), _labels):
            found += part(file)
    found += _placeholders(file)
    return sorted(dict.fromkeys(found), key=lambda problem: problem.level != "error")


def _schema(file: ClusterFile) -> Iterator[Problem]:
    import json

    import jsonschema  # type: ignore[import-untyped]
    import ray.autoscaler

    schema = json.loads(Path(ray.autoscaler.__file__).with_name("ray-schema.json").read_text())
    for error in sorted(jsonschema.Draft7Validator(schema).iter_errors(file.data), key=str):
        where = ".".join(map(str, error.absolute_path)) or "the file"
        known = section(schema, "properties")
        extra = [key for key in file.data if key not in known] if error.validator == "additionalProperties" else []
        todo = f"correct or remove it; {nearest(extra[0], known)}" if extra else "correct it; this is Ray's own schema"
        yield Problem(where, error.message[:200], todo)


def _limits(file: ClusterFile) -> Iterator[Problem]:
    types, data = file.node_types, file.data
    if not types:
        yield Problem("available_node_types", "there are none", "describe the head and at least one pool")
    head, names = data.get("head_node_type"), [each.name for each in types]
    if head not in names:
        yield Problem("head_node_type", f"{head!r} is no node type", nearest(str(head), names))
    for each in types:
        if each.min_count > each.max_count and not each.is_head:
            problem = f"min_workers={each.min_count} is above max_workers={each.max_count}"
            yield Problem(each.where, problem, "lower min_workers or raise max_workers")
    least, most = sum(each.min_count for each in types), data.get("max_workers", 2)
    if least > most:
        todo = f"raise max_workers to {least} or more"
        yield Problem("max_workers", f"{most} is below the sum of all min_workers, {least}", todo)


def _instances(file: ClusterFile) -> Iterator[Problem]:
    table = instances.known(file.kind)
    for each in file.node_types:
        where = f"{each.where}.node_config"
        if each.instance is None:
            yield Problem(where, "names no machine type", "add InstanceType (AWS), machineType (GCP) or vmSize (Azure)")
            continue
        instance = table.get(each.instance)
        if instance is None:
            yield Problem(where, f"no machine type {each.instance!r} is known", nearest(each.instance, table))
            continue
        yield from _promises(each, instance)


def _promises(node: NodeType, instance: instances.Instance) -> Iterator[Problem]:
    gpus = instance.accelerator.count if instance.accelerator else 0
    given = int(node.resources.get("GPU", 0))
    if given != gpus:
        todo = f"set GPU to {gpus}, or take another machine type"
        yield Problem(f"{node.where}.resources.GPU", f"{given}, but {instance.name} has {gpus}", todo)
    if node.resources.get("CPU", 0) > instance.cpus:
        problem = f"{node.resources['CPU']:g}, but {instance.name} has {instance.cpus}"
        yield Problem(f"{node.where}.resources.CPU", problem, f"set it to {instance.cpus} or less")
    label = node.labels.get(ACCELERATOR)
    if label and instance.accelerator and label != instance.accelerator.name:
        problem = f"{label!r}, but {instance.name} has {instance.accelerator.name}"
        yield Problem(f"{node.where}.labels.{ACCELERATOR}", problem, f"write {instance.accelerator.name}")


def _labels(file: ClusterFile) -> Iterator[Problem]:
    for each in file.node_types:
        where = each.where if file.kind == "local" else f"{each.where}.labels"
        needed = (*LABELS, ACCELERATOR) if each.resources.get("GPU") else LABELS
        for label in needed:
            if label not in each.labels:
                yield Problem(where, f"the label {label} is missing", f"add {label}: VALUE")
        tier = each.labels.get(TIER)
        if tier is not None and tier not in TIERS:
            yield Problem(f"{where}.{TIER}", f"{tier!r} is no tier", f"write one of {', '.join(TIERS)}")
        for key, value in each.labels.items():
            if not _is_key(key) or (value and not _NAME.match(value)):
                todo = "letters, digits, '-', '_' and '.', at most 63, beginning and ending with a letter or digit"
                yield Problem(f"{where}.{key}", f"{key}={value} is no label", todo)


def _is_key(key: str) -> bool:
    prefix, _, name = key.rpartition("/")
    return bool(_NAME.match(name)) and all(_NAME.match(part) for part in prefix.split(".") if prefix)


def _addresses(file: ClusterFile) -> Iterator[Problem]:
    provider, hosts = section(file.data, "provider"), section(file.data, "metadata.hosts")
    if "coordinator_address" in provider:
        todo = "list the machines as head_ip and worker_ips, so that each gets its labels"
        yield Problem("provider.coordinator_address", "machines come from a coordinator", todo)
        return
    given = [provider.get("head_ip"), *(provider.get("worker_ips") or [])]
    if given[0] is None:
        yield Problem("provider.head_ip", "is missing", "give the address of the machine that leads")
        given = given[1:]
    for address in given:
        if not is_address(str(address)):
            yield Problem("provider", f"{address!r} is no address", "write an IP address or a host's name")
        elif given.count(address) > 1:
            yield Problem("provider", f"{address} is listed twice", "list each machine once")
        elif address not in hosts:
            todo = f"add metadata.hosts.{address}: {{pool: …, site: …, tier: …, zone: …}}"
            yield Problem("metadata.hosts", f"{address} is missing", todo)
    for address, entry in hosts.items():
        if address not in given:
            todo = nearest(str(address), map(str, given))
            yield Problem(f"metadata.hosts.{address}", "is neither head_ip nor in worker_ips", todo)
        for key in entry if isinstance(entry, Mapping) else ():
            if key not in HOST_FIELDS:
                yield Problem(f"metadata.hosts.{address}.{key}", "unknown key", nearest(str(key), HOST_FIELDS))


def _commands(file: ClusterFile) -> Iterator[Problem]:
    data = file.data
    for name, needed in (("head_start_ray_commands", "ray start --head"), ("worker_start_ray_commands", "ray start")):
        commands = " ; ".join(map(str, data.get(name) or []))
        if needed not in commands:
            yield Problem(name, f"does not run `{needed}`", "copy it from cluster.yaml")
            continue
        yield from _closed(name, commands)
        if name.startswith("worker") and "$RAY_HEAD_IP" not in commands:
            yield Problem(name, "does not join the head", "ray start --address=$RAY_HEAD_IP:6379")
        if name.startswith("head") and "--autoscaling-config" not in commands:
            todo = "add --autoscaling-config=~/ray_bootstrap_config.yaml"
            yield Problem(name, "starts no autoscaler, so no other node would come up", todo)
        if name.startswith("head") and "keep-head" not in commands:
            todo = "write `modelyard cluster keep-head -- ray start --head ...`"
            yield Problem(name, "nobody starts the head again when it dies", todo, "warning")
    setup = " ; ".join(map(str, data.get("setup_commands") or []))
    if "modelyard" not in setup and not section(data, "docker"):
        yield Problem(
            "setup_commands", "do not install modelyard", "copy them from cluster.yaml, or use docker", "warning"
        )
    for name in _DEFAULTED if file.kind in CLOUDS else ():
        if name not in data:
            todo = f"write {name}: []"
            yield Problem(name, "is left out, so Ray runs its own, which install into whatever Python they find", todo)
    image = section(data, "docker").get("image")
    if image and manifests.is_floating(image):
        yield Problem("docker.image", f"{image!r} changes under its name", "name a version or a digest")


def _closed(name: str, commands: str) -> Iterator[Problem]:
    sources_env = "node.env" in commands
    if not sources_env and "RAY_USE_TLS=1" not in commands:
        todo = "begin with `. ~/.modelyard/cluster/node.env &&`, which `modelyard certs node` writes"
        yield Problem(name, "Ray's traffic would go in plain text: TLS is off", todo)
    if not sources_env and "RAY_AUTH_MODE=token" not in commands:
        todo = "begin with `. ~/.modelyard/cluster/node.env &&`, which `modelyard certs node` writes"
        yield Problem(name, "anyone who reaches it could run code: no token is asked for", todo)
    host = re.search(r"--dashboard-host[= ](\S+)", commands)
    if host and host[1] in _OPEN_HOSTS:
        todo = "write --dashboard-host=127.0.0.1; `modelyard submit --cluster` and `ray dashboard` come through ssh"
        yield Problem(name, f"the dashboard would listen on {host[1]}, in plain HTTP", todo)


def _mounts(file: ClusterFile) -> Iterator[Problem]:
    for remote, local in section(file.data, "file_mounts").items():
        if not Path(str(local)).expanduser().exists():
            todo = "modelyard certs create" if ".modelyard/cluster" in str(local) else "make it, or correct the path"
            yield Problem(f"file_mounts.{remote}", f"{str(local)!r} is not here", todo, "warning")
    key = section(file.data, "auth").get("ssh_private_key")
    if key and not Path(str(key)).expanduser().exists():
        todo = "ssh-keygen, and copy the public key to the machines"
        yield Problem("auth.ssh_private_key", f"{str(key)!r} is not here", todo, "warning")


def _group_of_ports(file: ClusterFile) -> Iterator[Problem]:
    if file.kind != "aws":
        return
    for number, rule in enumerate(section(file.data, "provider.security_group").get("IpPermissions") or []):
        ranges = [each.get("CidrIp") for each in rule.get("IpRanges", [])]
        if "0.0.0.0/0" in ranges and rule.get("FromPort") != 22:
            where = f"provider.security_group.IpPermissions.{number}"
            yield Problem(where, f"opens port {rule.get('FromPort')} to all", "name your own addresses, or close it")
    without = [each.name for each in file.node_types if "SecurityGroupIds" not in _node_config(file, each)]
    if without and not section(file.data, "provider.security_group").get("GroupName"):
        todo = "make a group that lets only you in, and name it in provider.security_group.GroupName"
        yield Problem("provider.security_group", "Ray will open port 22 to the world", todo, "warning")


def _node_config(file: ClusterFile, node: NodeType) -> Mapping[str, Any]:
    entry: Mapping[str, Any] = section(file.data, "available_node_types").get(node.name, {})
    found: Mapping[str, Any] = section(entry, "node_config")
    return found


def _placeholders(file: ClusterFile) -> Iterator[Problem]:
    places: dict[str, list[str]] = {}
    for where, value in _leaves(file.data, ()):
        if re.search(r"\bYOUR-|\bREGISTRY/", value):
            places.setdefault(value, []).append(where)
    for value, found in places.items():
        more = f", and in {len(found) - 1} more places" if len(found) > 1 else ""
        yield Problem(found[0], f"{value!r} is a placeholder", f"put your own there{more}", "warning")
    if file.kind in CLOUDS and not file.name:
        yield Problem("cluster_name", "is empty", "give it a name")


def _leaves(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from _leaves(each, (*path, str(key)))
    elif isinstance(value, list):
        for number, each in enumerate(value):
            yield from _leaves(each, (*path, str(number)))
    elif isinstance(value, str):
        yield ".".join(path), value
