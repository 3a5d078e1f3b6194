"""The gateway as an application: `create_app(backend, settings)`, for uvicorn or as the ingress of Ray Serve."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from importlib import resources
from typing import Any

from fastapi import FastAPI
from prometheus_client.registry import Collector
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from modelyard import __version__
from modelyard.security import KeyStore
from modelyard.serving.gateway import openapi, schemas
from modelyard.serving.gateway.audit import AuditHook
from modelyard.serving.gateway.authentication import Authentication
from modelyard.serving.gateway.budgets import Budgets
from modelyard.serving.gateway.calls import Calls
from modelyard.serving.gateway.errors import CallError, as_call_error
from modelyard.serving.gateway.exchange import Front, exchange_of, send_error
from modelyard.serving.gateway.metrics import CONTENT_TYPE, Metrics
from modelyard.serving.gateway.settings import GatewaySettings
from modelyard.serving.gateway.usage_store import UsageStore
from modelyard.serving.protocol import Backend

Work = Callable[[Request, Send], Awaitable[None]]

_PAGE = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/docs": ("docs.html", "text/html; charset=utf-8"),
    "/page/app.js": ("app.js", "text/javascript; charset=utf-8"),
    "/page/docs.js": ("docs.js", "text/javascript; charset=utf-8"),
    "/page/style.css": ("style.css", "text/css; charset=utf-8"),
}
_PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",
}


def create_app(
    backend: Backend,
    settings: GatewaySettings | None = None,
    *,
    audit: AuditHook | None = None,
    collectors: Sequence[Collector] = (),
) -> FastAPI:
    """The gateway in front of `backend`. Opens the database, so it is called where it will run.

    As an ingress of Ray Serve the application is built in its replica::

        @serve.deployment
        @serve.ingress(lambda: create_app(ServeBackend(), settings))
        class Gateway: ...

    Args:
        backend: answers the calls.
        settings: its bounds; the defaults when None.
        audit: called once for each call under `/v1`.
        collectors: more Prometheus metrics for `/metrics`.

    Raises:
        StorageError: the database cannot be reached or written.
    """
    settings = settings or GatewaySettings()
    metrics = Metrics()
    for collector in collectors:
        metrics.registry.register(collector)
    keys = budgets = None
    if not settings.open_access:
        keys = KeyStore(settings.database)
        budgets = Budgets(UsageStore(settings.database))
    authentication = Authentication(keys, settings)
    calls = Calls(backend, settings, authentication, budgets, metrics)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None, None]:
        flushing = asyncio.ensure_future(budgets.run()) if budgets is not None else None
        try:
            yield
        finally:
            if flushing is not None and budgets is not None:
                flushing.cancel()
                await budgets.close()
            authentication.close()

    app = FastAPI(title="Modelyard", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.openapi = lambda: openapi.describe(app)  # type: ignore[method-assign]
    app.add_exception_handler(HTTPException, _not_routed)
    app.add_middleware(
        Front,
        metrics=metrics,
        audit=audit,
        max_in_flight=settings.max_in_flight,
        site=settings.site,
        proxy_sends_id=_is_in_serve(),
    )
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-request-id"],
            expose_headers=["x-request-id", "retry-after"],
        )
    _add_api(app, calls)
    _add_operations(app, calls, keys, metrics if settings.expose_metrics else None)
    for path, (name, kind) in _PAGE.items():
        _add_page(app, path, resources.files(__package__).joinpath("page", name).read_bytes(), kind)
    return app


def _is_in_serve() -> bool:
    """Whether this is a replica of Ray Serve, whose proxy gives every request an id and sends it back by itself."""
    if "ray.serve" not in sys.modules:
        return False
    from ray import serve
    from ray.serve.exceptions import RayServeException

    try:
        serve.get_replica_context()
    except RayServeException:
        return False
    return True


class _Answer(Response):
    """A response that is made, from the reading of the body to the last byte, when it is sent."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._work(Request(scope, receive), send)


def _add_api(app: FastAPI, calls: Calls) -> None:
    chat, completion = openapi.body_of(schemas.ChatBody), openapi.body_of(schemas.CompletionBody)

    def add(method: str, path: str, summary: str, work: Work, extra: dict[str, Any] | None = None) -> None:
        async def endpoint() -> Response:
            return _Answer(work)

        name = f"{method.lower()}{path}".translate(str.maketrans("/{}", "___"))
        app.add_api_route(
            path,
            endpoint,
            methods=[method],
            summary=summary,
            operation_id=name,
            openapi_extra=extra,
            response_class=Response,
            responses={200: {"content": openapi.answers(is_streamed=extra in (chat, completion))}},
        )

    named = {"parameters": [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]}
    prediction = {**named, **openapi.body_of(schemas.PredictionBody, "multipart/form-data")}
    add("GET", "/v1/models", "The models this key may use", calls.list_models)
    add("GET", "/v1/models/{model}", "One model", calls.show_model, named)
    add("POST", "/v1/chat/completions", "Answer a chat", calls.chat, chat)
    add("POST", "/v1/completions", "Continue texts", calls.complete, completion)
    add("POST", "/v1/embeddings", "Vectors of texts", calls.embed, openapi.body_of(schemas.EmbeddingBody))
    add("POST", "/v1/predict/{model}", "Ask a model of another task", calls.predict, prediction)


def _add_operations(app: FastAPI, calls: Calls, keys: KeyStore | None, metrics: Metrics | None) -> None:
    @app.get("/healthz", summary="Whether this process answers", response_class=Response)
    async def healthz() -> Response:
        return Response(b'{"status":"ok"}', media_type="application/json")

    @app.get("/readyz", summary="Whether calls can be answered now", response_class=Response)
    async def readyz(request: Request) -> Response:
        try:
            if not await calls.catalogue.models():
                raise CallError(503, "unavailable", "no model is served", headers={"retry-after": "5"})
            if keys is not None:
                await asyncio.to_thread(keys.quota, "")
        except Exception as error:  # noqa: BLE001  (not ready, whatever the reason)
            problem = as_call_error(error)
            return Response(problem.body(), 503, {"retry-after": "5"}, "application/json")
        return Response(b'{"status":"ready"}', media_type="application/json")

    if metrics is not None:

        @app.get("/metrics", summary="Prometheus metrics", response_class=Response)
        async def scrape() -> Response:
            return Response(metrics.text(), headers={"content-type": CONTENT_TYPE})


def _add_page(app: FastAPI, path: str, content: bytes, kind: str) -> None:
    @app.get(path, include_in_schema=False)
    async def page() -> Response:
        return Response(content, headers={**_PAGE_HEADERS, "content-type": kind})


async def _not_routed(request: Request, error: Exception) -> Response:
    """The 404 and 405 of the router, in OpenAI's form."""
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
    text = {404: "there is no such path; see /docs", 405: "this path takes another method; see /docs"}
    problem = CallError(
        error.status_code, code, text.get(error.status_code, str(error.detail)), headers=dict(error.headers or {})
    )
    exchange_of(request).outcome = code

    async def answer(_: Request, send: Send) -> None:
        await send_error(send, problem)

    return _Answer(answer)
