"""The private parts of Ray Serve that Modelyard uses are where it expects them.

Each failure says which file to adapt after an upgrade of Ray (the version is pinned in pyproject.toml).
"""

from __future__ import annotations

import inspect
from typing import Any

from ray import serve
from ray.serve import context
from ray.serve._private.client import ServeControllerClient
from ray.serve._private.controller import ServeController
from ray.serve.schema import DeploymentDetails, ReplicaDetails

from modelyard.config import parse
from modelyard.serving.deployment.applications import gateway_application, model_application
from modelyard.serving.deployment.config import GatewayApp, ModelApp
from modelyard.serving.protocol import ServedModel

SERVED = ServedModel("gpt", "models:/gpt/1", "causal_lm", "transformers", 0)


def application(**fields: Any) -> Any:
    app = parse(ModelApp, {"model": {"reference": "models:/gpt/1", "engine": "transformers"}, **fields})
    return model_application(app, SERVED)


def version_of(app: Any) -> str:
    version: str = app._bound_deployment.version
    return version


def test_the_controller_still_tells_what_is_deployed() -> None:
    says = "adapt serving/deployment/{discovery,control,backend}.py: "
    assert hasattr(ServeController, "get_serve_instance_details"), f"{says}the controller's method is gone"
    assert hasattr(ServeControllerClient, "get_serve_details"), f"{says}the client's method is gone"
    assert "raise_if_no_controller_running" in inspect.signature(context._get_global_client).parameters, says
    wanted = {"status", "message", "deployment_config", "target_num_replicas", "replicas"}
    assert wanted <= set(DeploymentDetails.model_fields), f"{says}a deployment's details have other fields"
    assert {"state", "node_id"} <= set(ReplicaDetails.model_fields), f"{says}a replica's details have other fields"


def test_replicas_are_replaced_when_what_they_load_changes_and_only_then() -> None:
    one = application(min_replicas=1, max_replicas=1)
    assert version_of(one) == version_of(application(min_replicas=2, max_replicas=4)), "only their number differs"
    for other in (
        application(placement={"cpus": 2}),
        application(model={"reference": "models:/gpt/2", "engine": "transformers"}),
    ):
        assert version_of(one) != version_of(other)


def test_an_ingress_is_still_built_by_the_hook_that_the_gateway_implements() -> None:
    body = inspect.getsource(serve.api)
    assert "__serve_build_asgi_app__" in body, "adapt serving/deployment/applications.py: Gateway's hook has moved"
    assert version_of(gateway_application(GatewayApp()))
