"""What is deployed, as Serve's controller tells: targets of the gateway, rows of `serve status`.

Each of our deployments carries, as its `user_config`, what it serves. So the controller, whose state survives the
head's processes, is the only place that knows, whoever deployed: a command, `serve deploy`, a site of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from modelyard.serving.deployment.config import ModelApp
from modelyard.serving.deployment.routing import State, Target
from modelyard.serving.protocol import ServedModel

MODEL = "Model"
"""Name of the deployment in each model's application."""
GATEWAY = "gateway"
"""Name of the gateway's application."""
_KEY = "modelyard"
_COMING = ("HEALTHY", "UPDATING", "UPSCALING", "DOWNSCALING")
"""States in which Serve starts a replica that is missing."""


@dataclass(frozen=True)
class Deployed:
    """A model's application as it is now."""

    app: ModelApp
    served: ServedModel
    status: str
    message: str
    running: int
    starting: int
    wanted: int
    nodes: tuple[str, ...]
    """Node ids of the running replicas."""

    @property
    def target(self) -> Target:
        """As the router sees it."""
        state = State.RUNNING if self.running else State.COMING if self.status in _COMING else State.DOWN
        return Target(
            application=self.app.application,
            served=self.served,
            site=self.app.placement.site,
            is_canary=self.app.is_canary,
            state=state,
        )


def user_config(app: ModelApp, served: ServedModel) -> dict[str, Any]:
    """What a model's deployment carries; JSON."""
    return {
        _KEY: {"app": app.model_dump(mode="json"), "served": {**asdict(served), "features": sorted(served.features)}}
    }


def deployed(details: Mapping[str, Any]) -> dict[str, Deployed]:
    """Our models among all applications of a cluster, by the applications' names.

    Args:
        details: what Serve's controller tells (`GET /api/serve/applications/`).
    """
    found = {}
    for name, application in details.get("applications", {}).items():
        for deployment in application.get("deployments", {}).values():
            ours = (deployment["deployment_config"].get("user_config") or {}).get(_KEY)
            if ours is None:
                continue
            replicas = [(_word(replica["state"]), replica.get("node_id") or "") for replica in deployment["replicas"]]
            states = [state for state, _ in replicas]
            found[name] = Deployed(
                app=ModelApp.model_validate(ours["app"]),
                served=ServedModel(**{**ours["served"], "features": frozenset(ours["served"]["features"])}),
                status=_word(deployment["status"]),
                message=deployment["message"] or application.get("message", ""),
                running=states.count("RUNNING"),
                starting=states.count("STARTING"),
                wanted=int(deployment["target_num_replicas"]),
                nodes=tuple(node_id for state, node_id in replicas if state == "RUNNING"),
            )
    return found


def _word(state: Any) -> str:
    """A state as a word: the controller gives enums, its HTTP API strings."""
    return str(getattr(state, "value", state))
