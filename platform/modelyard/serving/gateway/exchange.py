"""What surrounds every request: its id, its answer when something was raised, and its record when it has ended."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
import traceback
import uuid
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from modelyard.errors import OverloadedError
from modelyard.security import Caller
from modelyard.serving.gateway.audit import AuditHook, CallRecord
from modelyard.serving.gateway.errors import CallError, RateLimitError, as_call_error
from modelyard.serving.gateway.metrics import Metrics

SITE_HEADER = "x-modelyard-site"
_KEY = "modelyard.exchange"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_QUIET = ("/healthz", "/readyz", "/metrics")
_log = logging.getLogger("modelyard.gateway")
_access = logging.getLogger("modelyard.gateway.access")


@dataclass
class Exchange:
    """One request as it is answered; filled in on the way."""

    request_id: str
    at_s: float = field(default_factory=time.time)
    started_s: float = field(default_factory=time.perf_counter)
    caller: Caller | None = None
    model: str | None = None
    site: str | None = None
    status: int = 0
    outcome: str = "ok"
    prompt_tokens: int = 0
    completion_tokens: int = 0
    first_token_s: float | None = None

    def answered_at(self, site: str) -> None:
        """The backend says where."""
        self.site = site

    def elapsed_s(self) -> float:
        """Since the first byte of the request."""
        return time.perf_counter() - self.started_s


def exchange_of(request: Request) -> Exchange:
    """The exchange that `Front` began."""
    found = request.scope[_KEY]
    assert isinstance(found, Exchange)
    return found


class Front:
    """The outermost layer. An error that comes after an answer has begun is the answer's own to tell."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        metrics: Metrics,
        audit: AuditHook | None,
        max_in_flight: int,
        site: str | None,
        proxy_sends_id: bool = False,
    ) -> None:
        """Wrap `app`. `proxy_sends_id`: the given request id goes back to the caller without us."""
        self._app, self._metrics, self._audit, self._site = app, metrics, audit, site
        self._proxy_sends_id = proxy_sends_id
        self._max_in_flight, self._in_flight = max_in_flight, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        exchange = Exchange(given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex, site=self._site)
        scope[_KEY] = exchange

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                is_sent = self._proxy_sends_id and given == exchange.request_id
                added = {} if is_sent else {"x-request-id": exchange.request_id}
                if exchange.site is not None:
                    added[SITE_HEADER] = exchange.site
                message["headers"] = [
                    *message.get("headers", ()),
                    *((name.encode(), value.encode("latin-1", "replace")) for name, value in added.items()),
                ]
            await send(message)

        is_work = scope["path"] not in _QUIET
        self._in_flight += is_work
        self._metrics.in_flight.set(self._in_flight)
        try:
            await self._answer(exchange, is_work, scope, receive, sending)
        finally:
            self._in_flight -= is_work
            self._metrics.in_flight.set(self._in_flight)
            if is_work:
                await self._keep(self._record(exchange, scope))

    async def _answer(self, exchange: Exchange, is_work: bool, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if is_work and self._in_flight > self._max_in_flight:
                raise OverloadedError(f"this gateway answers {self._max_in_flight} calls at once already", 1.0)
            await self._app(scope, receive, send)
        except ClientDisconnect:
            exchange.outcome = "cancelled"
        except asyncio.CancelledError:
            exchange.outcome = "cancelled"
            raise
        except Exception as error:  # noqa: BLE001  (whatever it was, its caller gets an answer)
            problem = told(error, exchange)
            if exchange.status == 0:
                self._count_refusal(problem)
                await send_error(send, problem)

    def _count_refusal(self, problem: CallError) -> None:
        if isinstance(problem, RateLimitError):
            self._metrics.refusals.labels(problem.limit).inc()

    def _record(self, exchange: Exchange, scope: Scope) -> CallRecord:
        route = getattr(scope.get("route"), "path", None)
        caller = exchange.caller
        return CallRecord(
            request_id=exchange.request_id,
            at_s=exchange.at_s,
            route="unmatched" if route is None else f"{scope['method']} {route}",
            subject=caller.subject if caller else None,
            tenant=caller.tenant if caller else None,
            site=exchange.site,
            model=exchange.model,
            status=exchange.status,
            outcome=exchange.outcome,
            prompt_tokens=exchange.prompt_tokens,
            completion_tokens=exchange.completion_tokens,
            first_token_s=exchange.first_token_s,
            duration_s=exchange.elapsed_s(),
        )

    async def _keep(self, record: CallRecord) -> None:
        self._metrics.count(record)
        if _access.isEnabledFor(logging.INFO):
            _access.info(json.dumps(_rounded(record)))
        if self._audit is not None and "/v1/" in record.route:
            try:
                await self._audit(record)
            except Exception as error:  # noqa: BLE001  (a full disk is for an alert to tell, not for the caller)
                self._metrics.audit_failures.inc()
                _log.error("the audit hook failed for request %s: %s", record.request_id, type(error).__name__)


def told(error: Exception, exchange: Exchange) -> CallError:
    """The error as the caller gets it. One of our own making is logged by where it arose, without its text."""
    problem = as_call_error(error)
    exchange.outcome = problem.code
    if problem.code == "internal_error":
        frames = traceback.extract_tb(error.__traceback__)[-6:]
        where = " < ".join(f"{frame.filename}:{frame.lineno}" for frame in reversed(frames))
        _log.error("request %s failed: %s at %s", exchange.request_id, type(error).__name__, where)
    elif problem.status in (503, 504):
        _log.warning("request %s: %s (%s)", exchange.request_id, problem.code, type(error).__name__)
    return problem


async def send_error(send: Send, problem: CallError) -> None:
    """The whole answer of a failed call."""
    headers = {"content-type": "application/json", **problem.headers}
    await send_whole(send, problem.status, headers, problem.body())


async def send_whole(send: Send, status: int, headers: dict[str, str], body: bytes) -> None:
    """A whole answer."""
    pairs = [(name.encode(), value.encode("latin-1", "replace")) for name, value in headers.items()]
    pairs.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})


def _rounded(record: CallRecord) -> dict[str, Any]:
    return {key: round(value, 6) if isinstance(value, float) else value for key, value in vars(record).items()}
