"""The gateway, for `serve deploy`: `args` are those of `GatewayApp`."""

from typing import Any

from ray.serve import Application

from modelyard.config import parse
from modelyard.serving.deployment.applications import gateway_application
from modelyard.serving.deployment.config import GatewayApp


def build(args: dict[str, Any]) -> Application:
    """The application."""
    return gateway_application(parse(GatewayApp, args))
