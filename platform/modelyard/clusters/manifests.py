"""What can be wrong with a KubeRay manifest, judged without a cluster."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from modelyard.clusters.files import MANIFESTS, ClusterFile, NodeType, quantity, section
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
    if section(spec, "authOptions").get("mode") != "token":
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
    for key in group:
        known = _HEAD if node.is_head else _GROUP
        if key not in known:
            yield Problem(f"{node.where}.{key}", "unknown key", nearest(str(key), known))
    replicas = group.get("replicas", node.min_count)
    if not node.is_head and not node.min_count <= replicas <= node.max_count:
        problem = f"{replicas} is outside minReplicas={node.min_count}..maxReplicas={node.max_count}"
        yield Problem(f"{node.where}.replicas", problem, "choose one in between")
    containers = section(group, "template.spec").get("containers") or []
    if not containers:
        yield Problem(f"{node.where}.template.spec.containers", "there are none", "add the Ray container")
    for number, container in enumerate(containers[:1]):
        yield from _container(f"{node.where}.template.spec.containers.{number}", container)


def _container(where: str, container: Mapping[str, Any]) -> Iterator[Problem]:
    from modelyard.clusters.check import Problem

    image = str(container.get("image", ""))
    if not image or is_floating(image):
        yield Problem(f"{where}.image", f"{image!r} changes under its name", "name a version or a digest")
    limits = section(container, "resources.limits")
    for name in ("cpu", "memory"):
        if name not in limits:
            todo = "set it: KubeRay tells Ray what a pod has by its limits"
            yield Problem(f"{where}.resources.limits.{name}", "is missing", todo)
    for name, amount in limits.items():
        if quantity(amount) is None:
            yield Problem(f"{where}.resources.limits.{name}", f"{amount!r} is no quantity", "write 4, 500m or 16Gi")
    given = {each.get("name") for each in container.get("env") or [] if isinstance(each, Mapping)}
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
    found = data
    for key in dotted.split("."):
        found = found[int(key)] if isinstance(found, Sequence) else found.get(key, {})
    return found if isinstance(found, Mapping) else {}
