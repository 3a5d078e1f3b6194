"""Whether a cluster file can work, found out offline, with every problem named: field, value, what to do.

Ray's own schema comes first; it lets through unknown machine types, labels with bad characters, limits that
contradict each other, open dashboards and addresses that are none, so these are judged here.
"""

from __future__ import annotations

import functools
import ipaddress
import json
import math
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from modelyard.clusters import instances, manifests
from modelyard.clusters.files import (
    ACCELERATOR,
    CLOUDS,
    HOST_FIELDS,
    MARKET,
    POOL,
    SITE,
    TIER,
    ZONE,
    ClusterFile,
    NodeType,
    ShapeError,
    is_address,
    listed,
    mapping,
    section,
)
from modelyard.errors import ConfigError, nearest

LABELS = (POOL, SITE, TIER, ZONE)
"""What every node must say of itself; nodes with GPUs name their accelerator as well."""
TIERS = ("cloud", "edge")
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?\Z")
_DEFAULTED = ("initialization_commands", "head_setup_commands", "worker_setup_commands")
_OWN_HOSTS = ("127.0.0.1", "::1", "localhost")
_USER = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*\Z")
_CLUSTER = re.compile(r"[A-Za-z0-9_-]+\Z")
_RESOURCE = re.compile(r"[A-Za-z_][A-Za-z0-9_.:-]*\Z")
_WORLD = {4: 8, 6: 16}
"""Networks with a shorter prefix count as everybody, by version of IP: `0.0.0.0/0`, and halves of it."""
_REGIONS = {"aws": "region", "gcp": "region", "azure": "location"}
_SECURE = {"RAY_USE_TLS": "1", "RAY_AUTH_MODE": "token"}
Part = Callable[[ClusterFile], Iterator["Problem"]]


class Problem(NamedTuple):
    """One thing that is wrong with a file."""

    field: str
    problem: str
    todo: str
    level: Literal["error", "warning"] = "error"

    def __str__(self) -> str:
        return f"{self.level}: {self.field}: {self.problem}\n  -> {self.todo}"


def check(file: ClusterFile) -> list[Problem]:
    """All problems of a file, worst first; none when it can be used as it is.

    Raises:
        ConfigError: the file refers to itself, so it has no end.
    """
    parts: dict[str, Sequence[Part]] = {
        "local": (_names, _addresses, _hosts, _commands, _mounts),
        "kuberay": (),
    }
    clouds = (_names, _limits, _instances, _markets, _zones, _group_of_ports, _commands, _mounts)
    try:
        found = [*_guarded(manifests.problems if file.kind == "kuberay" else _schema, file)]
        if not any(problem.level == "error" for problem in found) or file.kind == "kuberay":
            for part in (*parts.get(file.kind, clouds), _labels):
                found += _guarded(part, file)
        found += _placeholders(file)
    except RecursionError:
        raise ConfigError(f"{str(file.path)!r} is nested too deeply", "an alias may stand within itself") from None
    return sorted(dict.fromkeys(found), key=lambda problem: problem.level != "error")


def _guarded(part: Part, file: ClusterFile) -> Iterator[Problem]:
    """What a part finds; a field of the wrong shape ends it."""
    try:
        yield from part(file)
    except ShapeError as error:
        yield Problem(error.field, error.shape, error.todo)


@functools.cache
def _ray_schema() -> Mapping[str, Any]:
    import ray.autoscaler

    found: Mapping[str, Any] = json.loads(Path(ray.autoscaler.__file__).with_name("ray-schema.json").read_text())
    return found


def _schema(file: ClusterFile) -> Iterator[Problem]:
    import jsonschema  # type: ignore[import-untyped]

    schema = _ray_schema()
    keys = [where for where in _wrong_keys(file.data, ()) if not where.startswith("metadata.")]
    if keys:
        yield Problem(keys[0], "is a key that is no word", "put it in quotes")
        return
    for error in sorted(jsonschema.Draft7Validator(schema).iter_errors(file.data), key=str):
        where = ".".join(map(str, error.absolute_path)) or "the file"
        known = section(schema, "properties")
        extra = [key for key in file.data if key not in known] if error.validator == "additionalProperties" else []
        todo = f"correct or remove it; {nearest(extra[0], known)}" if extra else "correct it; this is Ray's own schema"
        yield Problem(where, error.message[:200], todo)


def _wrong_keys(value: Any, path: tuple[str, ...]) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, each in value.items():
            if not isinstance(key, str):
                yield ".".join((*path, str(key)))
            yield from _wrong_keys(each, (*path, str(key)))
    elif isinstance(value, list):
        for number, each in enumerate(value):
            yield from _wrong_keys(each, (*path, str(number)))


def _names(file: ClusterFile) -> Iterator[Problem]:
    if file.name and not _CLUSTER.match(file.name):
        yield Problem("cluster_name", f"{file.name!r} is no name", "letters, digits, '-' and '_' only")
    user = section(file.data, "auth").get("ssh_user")
    if user is not None and not _USER.match(str(user)):
        yield Problem("auth.ssh_user", f"{user!r} is no user's name", "a letter, then letters, digits, '_', '.', '-'")
    field = _REGIONS.get(file.kind)
    if field and not section(file.data, "provider").get(field):
        yield Problem(f"provider.{field}", "is missing", f"name the {field} to start machines in")


def _limits(file: ClusterFile) -> Iterator[Problem]:
    types, data = file.node_types, file.data
    if not types:
        yield Problem("available_node_types", "there are none", "describe the head and at least one pool")
    head, names = data.get("head_node_type"), [each.name for each in types]
    if head not in names:
        yield Problem("head_node_type", f"{head!r} is no node type", nearest(str(head), names))
    for each in types:
        for field, count in (("min_workers", each.min_count), ("max_workers", each.max_count)):
            if count < 0:
                yield Problem(f"{each.where}.{field}", f"{count} is below 0", "write 0 or more")
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


def _markets(file: ClusterFile) -> Iterator[Problem]:
    for node in file.node_types:
        where, label = f"{node.where}.node_config", node.labels.get(MARKET)
        market = "spot" if _is_spot(file.kind, _node_config(file, node), where) else "on-demand"
        if label is not None and label != market:
            todo = f"write {market}, or change the market in node_config"
            yield Problem(f"{node.where}.labels.{MARKET}", f"{label!r}, but node_config asks for {market}", todo)


def _is_spot(kind: str, config: Mapping[str, Any], where: str) -> bool:
    if kind == "aws":
        return section(config, "InstanceMarketOptions", where).get("MarketType") == "spot"
    if kind == "gcp":
        scheduling = section(config, "scheduling", where)
        return scheduling.get("provisioningModel") == "SPOT" or scheduling.get("preemptible") is True
    return str(section(config, "azure_arm_parameters", where).get("priority")).lower() == "spot"


def _zones(file: ClusterFile) -> Iterator[Problem]:
    provider = section(file.data, "provider")
    zones = [zone.strip() for zone in str(provider.get("availability_zone") or "").split(",") if zone.strip()]
    if file.kind == "azure":
        zones = [f"{provider.get('location')}-{zone}" for zone in zones]
    for node in file.node_types if zones else ():
        label = node.labels.get(ZONE)
        has_own = not {"SubnetIds", "SubnetId", "NetworkInterfaces"}.isdisjoint(_node_config(file, node))
        if label is not None and label not in zones and not has_own:
            todo = f"write one of {', '.join(zones)}, or name the node type's own subnet"
            problem = f"{label!r} is outside provider.availability_zone"
            yield Problem(f"{node.where}.labels.{ZONE}", problem, todo)


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
    given = list(map(str, listed(provider, "worker_ips", "provider")))
    if provider.get("head_ip") is None:
        yield Problem("provider.head_ip", "is missing", "give the IP address of the machine that leads")
    else:
        given = [str(provider["head_ip"]), *given]
    for address in given:
        if not is_address(address):
            todo = "write the machine's IP address: firewall rules, certificates and labels go by it"
            yield Problem("provider", f"{address!r} is no IP address", todo)
        elif given.count(address) > 1:
            yield Problem("provider", f"{address} is listed twice", "list each machine once")
        elif address not in hosts:
            todo = f"add metadata.hosts.{address}: {{pool: …, site: …, tier: …, zone: …}}"
            yield Problem("metadata.hosts", f"{address} is missing", todo)
    for address, entry in hosts.items():
        if address not in given:
            todo = nearest(str(address), given)
            yield Problem(f"metadata.hosts.{address}", "is neither head_ip nor in worker_ips", todo)
        for key in entry if isinstance(entry, Mapping) else ():
            if key not in HOST_FIELDS:
                yield Problem(f"metadata.hosts.{address}.{key}", "unknown key", nearest(str(key), HOST_FIELDS))


def _hosts(file: ClusterFile) -> Iterator[Problem]:
    for address, value in section(file.data, "metadata.hosts").items():
        where = f"metadata.hosts.{address}"
        entry = mapping(value, where)
        for name in ("cpus", "gpus"):
            amount = entry.get(name, 0)
            if isinstance(amount, bool) or not isinstance(amount, int) or amount < 0:
                yield Problem(f"{where}.{name}", f"{amount!r} is no whole number of 0 or more", "write e.g. 4")
        for name, amount in section(entry, "resources", where).items():
            if name in ("CPU", "GPU", "memory") or not _RESOURCE.match(str(name)):
                todo = "a letter, then letters, digits, '_', '.', ':', '-'; cpus and gpus have fields of their own"
                yield Problem(f"{where}.resources.{name}", f"{name!r} is no name for a resource of your own", todo)
            if isinstance(amount, bool) or not isinstance(amount, int | float) or not 0 <= amount < math.inf:
                yield Problem(f"{where}.resources.{name}", f"{amount!r} is no number of 0 or more", "write e.g. 1")


def _commands(file: ClusterFile) -> Iterator[Problem]:
    data = file.data
    for name, needed in (("head_start_ray_commands", "ray start --head"), ("worker_start_ray_commands", "ray start")):
        try:
            lines = [_words(str(line)) for line in data.get(name) or []]
        except ValueError as error:
            yield Problem(name, f"no shell can read it: {error}", "close the quotes")
            continue
        commands = " ; ".join(" ".join(words) for words in lines)
        if needed not in commands:
            yield Problem(name, f"does not run `{needed}`", "copy it from cluster.yaml")
            continue
        for words in lines:
            yield from _closed(name, words)
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


def _words(command: str) -> list[str]:
    """The words of a shell command without quotes and comments; raises ValueError when a quote stays open."""
    lexer = shlex.shlex(command.replace("\\\n", ""), posix=True, punctuation_chars=";&|()<>\n")
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t\r", True, ""
    found: list[str] = []
    is_comment = False
    for word in lexer:
        is_comment = (is_comment or word.startswith("#")) and "\n" not in word
        if is_comment:
            continue
        is_script = bool(found) and re.fullmatch(r"-[a-z]*c", found[-1]) is not None
        found += _words(word) if is_script else [word]
    return found


def _closed(name: str, words: Sequence[str]) -> Iterator[Problem]:
    todo = "begin with `. ~/.modelyard/cluster/node.env &&`, which `modelyard certs node` writes, and keep what it sets"
    given: dict[str, str] = {}
    for before, word, after in zip(["", *words], words, [*words[1:], ""], strict=False):
        if before in (".", "source") and word.rpartition("/")[2] == "node.env":
            given = dict(_SECURE)
        key, _, value = word.partition("=")
        if key in _SECURE and not (before == "export" and word == key):
            given[key] = value  # a bare name is what `unset` and `env -u` take
        if word.rpartition("/")[2] == "ray" and after == "start":
            if given.get("RAY_USE_TLS") != "1":
                yield Problem(name, "Ray's traffic would go in plain text: TLS is off", todo)
            if given.get("RAY_AUTH_MODE") != "token":
                yield Problem(name, "anyone who reaches it could run code: no token is asked for", todo)
        host = after if word == "--dashboard-host" else value if key == "--dashboard-host" else None
        if host is not None and host not in _OWN_HOSTS:
            use = "write --dashboard-host=127.0.0.1; `modelyard submit --cluster` and `ray dashboard` come through ssh"
            where = "an address known only at run time" if "$" in host else host
            yield Problem(name, f"the dashboard would listen on {where or 'all'}, in plain HTTP", use)


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
    group = section(file.data, "provider.security_group")
    for number, value in enumerate(listed(group, "IpPermissions", "provider.security_group")):
        where = f"provider.security_group.IpPermissions.{number}"
        rule = mapping(value, where)
        first, protocol = rule.get("FromPort"), str(rule.get("IpProtocol", "tcp"))
        last = rule.get("ToPort", first)
        is_ssh = protocol in ("tcp", "6") and first == last == 22
        for network in _networks(rule, where):
            try:
                parsed = ipaddress.ip_network(network, strict=False)
            except ValueError:
                yield Problem(where, f"{network!r} is no range of addresses", "write e.g. 203.0.113.0/24")
                continue
            if parsed.prefixlen < _WORLD[parsed.version] and not is_ssh:
                span = f"port {first}" if first == last else f"ports {first} to {last}"
                ports = "all ports" if protocol == "-1" or first is None else span
                yield Problem(where, f"opens {ports} to all", "name your own addresses, or close it")
    without = [each.name for each in file.node_types if "SecurityGroupIds" not in _node_config(file, each)]
    if without and not group.get("GroupName"):
        todo = "make a group that lets only you in, and name it in provider.security_group.GroupName"
        yield Problem("provider.security_group", "Ray will open port 22 to the world", todo, "warning")


def _node_config(file: ClusterFile, node: NodeType) -> Mapping[str, Any]:
    entry = section(file.data, "available_node_types").get(node.name)
    return section(entry, "node_config", node.where)


def _networks(rule: Mapping[str, Any], where: str) -> Iterator[str]:
    for key, field in (("IpRanges", "CidrIp"), ("Ipv6Ranges", "CidrIpv6")):
        for number, each in enumerate(listed(rule, key, where)):
            yield str(mapping(each, f"{where}.{key}.{number}").get(field))


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
