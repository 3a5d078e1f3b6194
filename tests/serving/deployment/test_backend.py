"""What a gateway knows of the deployments when its first calls come; Serve's controller is a double here."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve import context

from modelyard.config import parse
from modelyard.serving.deployment import backend
from modelyard.serving.deployment.backend import ServeBackend
from modelyard.serving.deployment.config import GatewayApp, ModelApp
from modelyard.serving.deployment.discovery import user_config
from modelyard.serving.protocol import ServedModel


def answering(monkeypatch: pytest.MonkeyPatch, *waits_s: float) -> None:
    """A controller that knows one model, and takes so long for each answer (the last time for all later ones)."""
    app = parse(ModelApp, {"model": {"reference": "models:/gpt/1"}})
    served = ServedModel("gpt", "models:/gpt/1", "causal_lm", "openvino", 0)
    deployment = {
        "deployment_config": {"user_config": user_config(app, served)},
        "replicas": [{"state": "RUNNING", "node_id": "n"}],
        "status": "HEALTHY",
        "message": "",
        "target_num_replicas": 1,
    }
    left = list(waits_s)

    async def details() -> dict[str, Any]:
        await asyncio.sleep(left.pop(0) if len(left) > 1 else left[0])
        return {"applications": {"gpt": {"deployments": {"Model": deployment}}}}

    controller = SimpleNamespace(get_serve_instance_details=SimpleNamespace(remote=details))
    monkeypatch.setattr(context, "_get_global_client", lambda: SimpleNamespace(_controller=controller))


def gateway(tmp_path: Path) -> ServeBackend:
    settings = {"database": f"sqlite:///{tmp_path / 'gateway.db'}"}
    return ServeBackend(parse(GatewayApp, {"settings": settings, "refresh_s": 0.01}))


def test_all_calls_that_come_during_the_first_look_wait_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, 0.2)

    async def ask() -> list[list[str]]:
        served = gateway(tmp_path)
        answers = await asyncio.gather(*(served.models() for _ in range(5)))
        return [[model.name for model in models] for models in answers]

    assert asyncio.run(ask()) == [["gpt"]] * 5


def test_a_silent_controller_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_LOOK_TIMEOUT_S", 0.1)
    answering(monkeypatch, 3600.0, 0.0)

    async def ask() -> list[str]:
        served = gateway(tmp_path)
        async with asyncio.timeout(10):
            while not (models := await served.models()):
                await asyncio.sleep(0.01)
        return [model.name for model in models]

    assert asyncio.run(ask()) == ["gpt"]
