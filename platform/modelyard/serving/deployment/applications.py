"""Ray Serve applications of models and of the gateway."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from ray import serve

from modelyard import __version__
from modelyard.serving.autoscaling.model import PoolConfig, ScalingConfig
from modelyard.serving.autoscaling.serve import autoscaling_config
from modelyard.serving.deployment.config import GatewayApp, ModelApp
from modelyard.serving.deployment.discovery import MODEL, user_config
from modelyard.serving.deployment.replica import ModelReplica
from modelyard.serving.protocol import ServedModel

if TYPE_CHECKING:
    from fastapi import FastAPI
    from ray.serve import Application


def model_application(app: ModelApp, served: ServedModel) -> Application:
    """One model. `served` is what the gateway lists; its engine is the one that the replicas load."""
    placement = app.placement
    extra = {name: amount for name, amount in placement.per_replica.items() if name not in ("CPU", "GPU")}
    options: dict[str, Any] = {
        "num_cpus": placement.cpus,
        "num_gpus": placement.gpus,
        "resources": extra,
        "label_selector": placement.selector,
    }
    deployment = serve.deployment(ModelReplica).options(
        name=MODEL,
        ray_actor_options=options,
        max_ongoing_requests=app.model.max_sequences,
        max_queued_requests=app.model.max_waiting,
        graceful_shutdown_timeout_s=app.drain_timeout_s,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=2.0,
        health_check_timeout_s=10.0,
        user_config=user_config(app, served),
        max_surge_percent=100,  # the new one answers before the old one goes
        **_replicas(app),
    )
    return _versioned(deployment, loaded=app.model.model_dump(mode="json") | placement.model_dump(mode="json")).bind(
        app.model_dump(mode="json")
    )


def _versioned(deployment: Any, loaded: dict[str, Any]) -> Any:
    """The deployment with a version of its own: replicas are replaced when what they load changes, and only then.

    Serve itself gives every `serve.run` a new version, so that even another number of replicas would replace them all.
    """
    text = json.dumps([__version__, loaded], sort_keys=True)
    return deployment.options(version=hashlib.sha256(text.encode()).hexdigest()[:16], _internal=True)


def _replicas(app: ModelApp) -> dict[str, Any]:
    if app.min_replicas == app.max_replicas:
        return {"num_replicas": app.min_replicas}
    pool = PoolConfig(
        name=MODEL,
        min_replicas=app.min_replicas,
        max_replicas=app.max_replicas,
        slots=app.model.max_sequences,
        cold_start_s=app.cold_start_s,
        capacity=app.capacity,
    )
    scaling = ScalingConfig(pools=(pool,), objective=app.objective, zero_after_s=app.zero_after_s)
    return {"autoscaling_config": autoscaling_config(scaling, pool, initial_replicas=max(app.min_replicas, 1))}


class Gateway:
    """The OpenAI-compatible front door, in front of every model of the cluster."""

    def __init__(self, app: dict[str, Any]) -> None:
        self._app = GatewayApp.model_validate(app)

    def __serve_build_asgi_app__(self) -> FastAPI:
        from modelyard.serving.cascade.backend import CascadeBackend
        from modelyard.serving.cascade.counters import CascadeCollector
        from modelyard.serving.deployment.backend import ServeBackend
        from modelyard.serving.gateway import create_app

        models = ServeBackend(self._app)
        if not self._app.cascades:
            return create_app(models, self._app.settings)
        cascades = CascadeBackend(models, self._app.cascades)
        return create_app(cascades, self._app.settings, collectors=[CascadeCollector(cascades.counters)])


def gateway_application(app: GatewayApp) -> Application:
    """The gateway; its replicas find the models by themselves."""
    deployment = serve.deployment(serve.ingress()(Gateway)).options(
        name="Gateway",
        num_replicas=app.replicas,
        max_ongoing_requests=app.settings.max_in_flight,
        graceful_shutdown_timeout_s=120.0,
        graceful_shutdown_wait_loop_s=0.5,
        ray_actor_options={"num_cpus": app.cpus, "label_selector": dict(app.label_selector)},
    )
    return _versioned(deployment, loaded=app.model_dump(mode="json")).bind(app.model_dump(mode="json"))
