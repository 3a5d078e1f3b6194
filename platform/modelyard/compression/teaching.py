"""A teacher as a Ray Serve deployment, for the time that its students learn: on a pool of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelyard.artifacts import Registry
from modelyard.cluster import Cluster, RayCluster, connect
from modelyard.errors import CapacityError
from modelyard.tasks.distillation import Distillation, TeacherService
from modelyard.tasks.teachers import DEPLOYMENT
from modelyard.training.config import Workers

if TYPE_CHECKING:
    from ray.serve import Application


@contextmanager
def teaching(
    distillation: Distillation, registry: Registry, application: str, workers: Workers
) -> Iterator[Distillation]:
    """What workers are told: the same, with the application that runs their teacher until the end.

    A teacher that is in the workers, behind a gateway, or deployed already is left where it is.

    Raises:
        CapacityError: no node could ever hold the deployment, or the cluster not both it and the students' workers.
        NotFoundError, IntegrityError, StorageError: as for `Registry.open`.
        UnavailableError: it does not start; says why.
        WaitTimeoutError: it took longer than `service.start_timeout_s`.
    """
    service = distillation.service
    if service is None or service.application is not None:
        yield distillation
        return
    from ray import serve

    from modelyard.serving.deployment.check import check_placement
    from modelyard.serving.deployment.control import wait_for_application

    assert distillation.teacher is not None
    version = registry.resolve(distillation.teacher, kind="model")
    connect()
    check_placement(RayCluster(), "distillation.service", placement_of(service), service.replicas)
    check_room(RayCluster(), service, workers)
    was_there = is_serve_running()
    serve.start(proxy_location="Disabled")
    try:
        target = serve.RunTarget(
            _application(service, registry.store.uri, version.digest), name=application, route_prefix=None
        )
        serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
        wait_for_application(
            application, f"the teacher {application}", service.start_timeout_s, "service.start_timeout_s"
        )
        yield distillation.with_changes(service=service.with_changes(application=application).model_dump(mode="json"))
    finally:
        if was_there:
            serve.delete(application)
        else:
            serve.shutdown()


def check_room(cluster: Cluster, service: TeacherService, workers: Workers) -> None:
    """Refuse a teacher that would leave its students no CPU, for ever, on a cluster that does not grow.

    Raises:
        CapacityError: with what both need and what there is.
    """
    if cluster.node_groups():
        return
    has = sum(node.total.get("CPU", 0.0) for node in cluster.nodes() if node.is_usable)
    teacher, students = service.replicas * service.cpus, workers.min * workers.cpus
    if teacher + students > has:
        raise CapacityError(
            f"distillation.service: the teacher needs {teacher:g} CPU and its students {students:g}, "
            f"the cluster has {has:g}",
            "lower service.cpus or workers, or leave service out: each worker has a teacher of its own then",
        )


def placement_of(service: TeacherService) -> Any:
    """Where its replicas run, as a `Placement` of serving."""
    from modelyard.serving.deployment.config import Placement

    return Placement(cpus=service.cpus, gpus=service.gpus, pool=service.pool)


class TeacherReplica:
    """Loads the teacher when it is made."""

    def __init__(self, store: str, digest: str, threads: int) -> None:
        import torch

        from modelyard.artifacts.store import Store
        from modelyard.config import settings
        from modelyard.tasks import load_model

        torch.set_num_threads(threads)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        folder = Path(Store(store, settings().cache).open("model", digest))
        self._model: Any = load_model(folder)[1].float().requires_grad_(False).to(self._device)

    def likely(
        self, inputs: Sequence[Any], options: Mapping[str, Any], top: int, temperature: float
    ) -> tuple[Any, Any]:
        """Ids (..., k) int32 and log probabilities (..., k) fp32 of the likeliest answers."""
        import torch

        from modelyard.tasks.distillation import likely
        from modelyard.tasks.teachers import scores_of

        given = {name: self._tensor(value) for name, value in options.items()}
        with torch.inference_mode():
            output = self._model(*(self._tensor(value) for value in inputs), **given)
            found = likely(scores_of(output), top, temperature)
        return found.ids.int().cpu().numpy(), found.logs.cpu().numpy()

    def write(self, prompt: Any, tokens: int, seed: int) -> Any:
        """Texts (B, T + tokens) int64 that go on from prompts (B, T)."""
        import torch

        from modelyard.tasks.teachers import write

        torch.manual_seed(seed)
        return write(self._model, self._tensor(prompt), tokens).cpu().numpy()

    def _tensor(self, value: Any) -> Any:
        import numpy as np
        import torch

        if not isinstance(value, np.ndarray):
            return value
        return torch.from_numpy(value.copy()).to(self._device)  # what Ray hands out is read-only


def _application(service: TeacherService, store: str, digest: str) -> Application:
    from ray import serve

    deployment = serve.deployment(TeacherReplica).options(
        name=DEPLOYMENT,
        num_replicas=service.replicas,
        max_ongoing_requests=2,  # one is computed, one waits
        ray_actor_options={
            "num_cpus": service.cpus,
            "num_gpus": service.gpus,
            "label_selector": placement_of(service).selector,
        },
        graceful_shutdown_timeout_s=5.0,
    )
    return deployment.bind(store, digest, max(1, int(service.cpus)))


def is_serve_running() -> bool:
    """Whether Ray Serve runs on this cluster already."""
    from ray.serve.context import _get_global_client

    return _get_global_client(raise_if_no_controller_running=False) is not None
