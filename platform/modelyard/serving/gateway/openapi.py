"""The OpenAPI document: bodies are read within bounds by our own code, so their schemas are added here."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from modelyard import __version__
from modelyard.serving.gateway import schemas

_DESCRIPTION = """The OpenAI API (models, chat, completions, embeddings), and `/v1/predict` for models of other tasks.

Parameters that would change an answer and are not supported are refused with `unsupported_parameter`, not dropped."""

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}
_ERRORS = {
    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
    "description": "An error; its `code` says which.",
}


def body_of(kind: type[BaseModel], *others: str) -> dict[str, Any]:
    """The `openapi_extra` of a route that reads this body, or files in a form as well."""
    content: dict[str, Any] = {
        "application/json": {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}},
    }
    for other in others:
        file = {"type": "string", "format": "binary"}
        form = {"type": "object", "properties": {"inputs": {"type": "array", "minItems": 1, "items": file}}}
        content[other] = {"schema": {**form, "required": ["inputs"], "additionalProperties": False}}
    return {"requestBody": {"required": True, "content": content}}


def answers(*, is_streamed: bool) -> dict[str, Any]:
    """What a call answers with: an object, or with `stream: true` events that hold one each."""
    whole = {"application/json": {"schema": {"type": "object"}}}
    event = {"type": "object", "required": ["data"], "properties": {"data": {"type": "string"}}}
    return {**whole, "text/event-stream": {"schema": event}} if is_streamed else whole


def describe(app: FastAPI) -> dict[str, Any]:
    """The document of `app`, made once."""
    if app.openapi_schema is not None:
        return app.openapi_schema
    document = get_openapi(
        title="Modelyard", version=__version__, description=_DESCRIPTION, routes=app.routes, openapi_version="3.1.0"
    )
    kinds = (schemas.ChatBody, schemas.CompletionBody, schemas.EmbeddingBody, schemas.PredictionBody)
    _, found = models_json_schema([(kind, "validation") for kind in kinds], ref_template="#/components/schemas/{model}")
    components = document.setdefault("components", {})
    components["schemas"] = {**found["$defs"], "Error": _ERROR}
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, methods in document["paths"].items():
        for operation in methods.values():
            if path.startswith("/v1/"):
                operation["security"] = [{"key": []}]
            operation["responses"].pop("422", None)
            operation["responses"]["default"] = _ERRORS
    app.openapi_schema = document
    return document
