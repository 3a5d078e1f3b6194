"""What can be wrong with a KubeRay manifest, judged without a cluster."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from modelyard.clusters.files import MANIFESTS, ClusterFile, NodeType, listed, mapping, quantity, section
from modelyard.errors import nearest

if TYPE_CHECKING:
    from modelyard.clusters.check import Problem

_SPEC = frozenset(
    {
        "authOptions",
        "autoscalerOptions",
        "enableInTreeAutoscaling",
        "gcsFaultToleranceOptions",
        "headGroupSpec",
        "headServiceAnnotations",
        "managedBy",
        "networkPolicy",
        "rayVersion",
        "suspend",
        "upgradeStrategy",
        "workerGroupSpecs",
    }
)
_HEAD = frozenset({"enableIngress", "headService", "labels", "rayStartParams", "resources", "serviceType", "template"})
_GROUP = frozenset(
    {
        "groupName",
        "idleTimeoutSeconds",
        "labels",
        "maxReplicas",
        "minReplicas",
        "numOfHosts",
        "rayStartParams",
        "replicas",
        "resources",
        "scaleStrategy",
        "suspend",
        "template",
    }
)
_NAME = re.compile(r"[a-z](?:[a-z0-9-]{0,61}[a-z0-9])?\Z")
_TLS = ("RAY_USE_TLS", "RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT")


def problems(file: ClusterFile) -> Iterator[Problem]:
    """What is wrong with a RayCluster, RayJob or RayService beyond its labels."""
    from modelyard.clusters.check import Problem

    where = MANIFESTS[file.data["kind"]]
    spec = section(file.data, where)
    for key in spec:
        if key not in _SPEC:
            yield Problem(f"{where}.{key}", "unknown key", nearest(str(key), _SPEC))
    yield from _versions(where, spec)
    meta = section(file.data, "metadata")
    if not _NAME.match(str(meta.get("name") or "")) and not ("generateName" in meta and "name" not in meta):
        todo = "a small letter, then small letters, digits and '-', at most 63"
        yield Problem("metadata.name", f"{file.name!r} is no name for Kubernetes", todo)
    if section(spec, "authOptions", where).get("mode") != "token":
        todo = "authOptions: {mode: token}; KubeRay makes the token"
        yield Problem(f"{where}.authOptions.mode", "anyone who reaches a pod could run code: it is not token", todo)
    names = [node.name for node in file.node_types]
    for node in file.node_types:
        if names.count(node.name) > 1:
            yield Problem(f"{node.where}.groupName", f"{node.name!r} is there twice", "give each group its own name")
        yield from _group(file, node)
    if file.data["kind"] == "RayService":
        yield from _serve(file)
    if file.data["kind"] == "RayJob" and not section(file.data, "spec").get("entrypoint"):
        yield Problem("spec.entrypoint", "is missing", "entrypoint: python jobs/train.py --config FILE")


def is_floating(image: str) -> bool:
    """Whether an image's name may mean other bytes tomorrow."""
    tag = image.rpartition("/")[2].partition(":")[2]
    return "@sha256:" not in image and tag in ("", "latest")


def _versions(where: str, spec: Mapping[str, Any]) -> Iterator[Problem]:
    import importlib.metadata

    from modelyard.clusters.check import Problem

    version, installed = spec.get("rayVersion"), importlib.metadata.version("ray")
    if version != installed:
        yield Problem(f"{where}.rayVersion", f"{version!r}, but Modelyard is on {installed}", f"write {installed}")


def _group(file: ClusterFile, node: NodeType) -> Iterator[Problem]:
    from modelyard.clusters.check import Problem

    group = _at(file.data, node.where)
    if node.is_head:
        yield from _exposed(node.where, group)
    yield from _start_params(f"{node.where}.rayStartParams", section(group, "rayStartParams", node.where))
    for key in group:
        known = _HEAD if node.is_head else _GROUP
        if key not in known:
            yield Problem(f"{node.where}.{key}", "unknown key", nearest(str(key), known))
    for name in ("replicas", "minReplicas", "maxReplicas") if not node.is_head else ():
        count = group.get(name, 0)
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            yield Problem(f"{node.where}.{name}", f"{count!r} is no whole number of 0 or more", "write e.g. 2")
    replicas = group.get("replicas", node.min_count)
    if not node.is_head and isinstance(replicas, int) and not node.min_count <= replicas <= node.max_count:
        problem = f"{replicas} is outside minReplicas={node.min_count}..maxReplicas={node.max_count}"
        yield Problem(f"{node.where}.replicas", problem, "choose one in between")
    containers = listed(section(group, "template.spec", node.where), "containers", f"{node.where}.template.spec")
    if not containers:
        yield Problem(f"{node.where}.template.spec.containers", "there are none", "add the Ray container")
    for number, container in enumerate(containers[:1]):
        place = f"{node.where}.template.spec.containers.{number}"
        yield from _container(place, mapping(container, place))


def _exposed(where: str, head: Mapping[str, Any]) -> Iterator[Problem]:
    from modelyard.clusters.check import Problem

    kinds = {
        f"{where}.serviceType": head.get("serviceType"),
        f"{where}.headService.spec.type": section(head, "headService.spec", where).get("type"),
    }
    for field, kind in kinds.items():
        if kind not in (None, "ClusterIP"):
            todo = "write ClusterIP, and reach it by kubectl port-forward or the gateway"
            yield Problem(field, f"{kind!r} opens the head's ports beyond the cluster", todo)
    if head.get("enableIngress"):
        yield Problem(f"{where}.enableIngress", "puts the dashboard on the ingress, in plain HTTP", "remove it")


def _start_params(where: str, params: Mapping[str, Any]) -> Iterator[Problem]:
    from modelyard.clusters.check import Problem

    for name, value in params.items():
        if not isinstance(value, str):
            yield Problem(f"{where}.{name}", f"{value!r} is no string, and KubeRay takes strings", "put it in quotes")
        elif name in ("num-cpus", "num-gpus") and not re.fullmatch("[0-9]+", value):
            yield Problem(f"{where}.{name}", f"{value!r} is no whole number of 0 or more", 'write e.g. "4"')


def _container(where: str, container: Mapping[str, Any]) -> Iterator[Problem]:
    from modelyard.clusters.check import Problem

    image = str(container.get("image", ""))
    if not image or is_floating(image):
        yield Problem(f"{where}.image", f"{image!r} changes under its name", "name a version or a digest")
    limits = section(container, "resources.limits", where)
    for name in ("cpu", "memory"):
        if name not in limits:
            todo = "set it: KubeRay tells Ray what a pod has by its limits"
            yield Problem(f"{where}.resources.limits.{name}", "is missing", todo)
    for name, amount in limits.items():
        if quantity(amount) is None:
            yield Problem(f"{where}.resources.limits.{name}", f"{amount!r} is no quantity", "write 4, 500m or 16Gi")
    for name, amount in section(container, "resources.requests", where).items():
        asked, most = quantity(amount), quantity(limits.get(name, ""))
        if asked is None:
            yield Problem(f"{where}.resources.requests.{name}", f"{amount!r} is no quantity", "write 4, 500m or 16Gi")
        elif most is not None and asked > most:
            todo = "ask for no more than the limit"
            yield Problem(f"{where}.resources.requests.{name}", f"{amount} is above the limit {limits[name]}", todo)
    env = [mapping(each, f"{where}.env.{number}") for number, each in enumerate(listed(container, "env", where))]
    given = {str(each.get("name")): each for each in env if each.get("value") or each.get("valueFrom")}
    if "RAY_USE_TLS" in given and given["RAY_USE_TLS"].get("value") != "1":
        problem = f"Ray's traffic would go in plain text: RAY_USE_TLS is {given['RAY_USE_TLS'].get('value')!r}"
        yield Problem(f"{where}.env", problem, 'write value: "1"')
    if missing := [name for name in _TLS if name not in given]:
        todo = "add them as in deploy/kuberay/raycluster.yaml"
        yield Problem(f"{where}.env", f"Ray's traffic would go in plain text: no {', '.join(missing)}", todo)


def _serve(file: ClusterFile) -> Iterator[Problem]:
    import pydantic
    import yaml
    from ray.serve.schema import ServeDeploySchema

    from modelyard.clusters.check import Problem

    text = section(file.data, "spec").get("serveConfigV2")
    try:
        ServeDeploySchema.model_validate(yaml.safe_load(str(text)) if text else {})
    except (pydantic.ValidationError, yaml.YAMLError, TypeError) as error:
        first = str(error).splitlines()
        yield Problem("spec.serveConfigV2", " ".join(first[:3])[:200], "correct it; `serve deploy` reads the same")


def _at(data: Any, dotted: str) -> Mapping[str, Any]:
    """The group that a node type was read from; its shape is known."""
    found = data
    for key in dotted.split("."):
        found = found[int(key)] if isinstance(found, list) else found.get(key, {})
    return mapping(found, dotted)
