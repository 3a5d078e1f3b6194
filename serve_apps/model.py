"""One model, for `serve deploy`: `args` are those of `ModelApp`."""

from typing import Any

from ray.serve import Application

from modelyard.config import parse
from modelyard.serving.deployment.config import ModelApp
from modelyard.serving.deployment.control import model_application_of


def build(args: dict[str, Any]) -> Application:
    """The application; refused with the reason when the model cannot be served or no node could ever hold it."""
    return model_application_of(parse(ModelApp, args))
