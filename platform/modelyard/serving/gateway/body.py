"""Reading a request: bounded in bytes, time and nesting, refused before anything large is held."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pydantic_core
from starlette.requests import ClientDisconnect, Request

from modelyard.serving.gateway.errors import CallError, invalid
from modelyard.serving.gateway.settings import GatewaySettings

_DRAIN_BYTES = 32 * 2**20
_DRAIN_S = 2.0
_CLOSE = {"connection": "close"}


async def read(request: Request, settings: GatewaySettings) -> bytes:
    """The whole body.

    Raises:
        CallError: 413 it is larger than `max_body_bytes` (known from its length, or while it comes in), 408 it is not
            here after `body_timeout_s`, 415 it is compressed.
        ClientDisconnect: the caller left.
    """
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise CallError(415, "unsupported_media_type", "send the body uncompressed", headers=_CLOSE)
    limit, parts, size = settings.max_body_bytes, [], 0
    length = request.headers.get("content-length", "0")
    too_large = length.isdigit() and int(length) > limit
    try:
        async with asyncio.timeout(settings.body_timeout_s):
            if not too_large:
                async for part in request.stream():
                    size += len(part)
                    if size > limit:
                        too_large = True
                        break
                    parts.append(part)
    except TimeoutError:
        text = f"the body was not here after {settings.body_timeout_s:g} s (the gateway's `body_timeout_s`)"
        raise CallError(408, "request_timeout", text, headers=_CLOSE) from None
    if too_large:
        parts.clear()
        await _drain(request)
        text = f"the body is larger than {limit} bytes (the gateway's `max_body_bytes`); send less"
        raise CallError(413, "body_too_large", text, headers=_CLOSE)
    return b"".join(parts)


def parse_json(body: bytes, content_type: str, max_depth: int) -> dict[str, Any]:
    """The object in a body.

    Raises:
        CallError: 400 it is no JSON in UTF-8, no object, nested deeper than `max_depth`, or holds a number that is
            not finite; 415 it says that it is something else.
    """
    kind = content_type.partition(";")[0].strip().lower()
    if kind not in ("", "application/json"):
        raise CallError(415, "unsupported_media_type", "send application/json")
    try:
        found = pydantic_core.from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise invalid(None, f"the body is not valid JSON: {error}", "invalid_json") from None
    if not isinstance(found, dict):
        raise invalid(None, "the body must be a JSON object", "invalid_json")
    _check(found, max_depth)
    return found


def _check(found: Any, max_depth: int) -> None:
    level, depth = [found], 0
    while level:
        depth += 1
        if depth > max_depth:
            raise invalid(None, f"the body is nested deeper than {max_depth} levels (`max_json_depth`)", "invalid_json")
        below: list[Any] = []
        for value in level:
            for item in value.values() if isinstance(value, dict) else value:
                if isinstance(item, dict | list):
                    below.append(item)
                elif isinstance(item, float) and not math.isfinite(item):
                    raise invalid(None, "the body holds a number that is too large", "invalid_json")
        level = below


async def _drain(request: Request) -> None:
    """Throw away what is still coming, within bounds: a socket closed on unread data loses the answer on its way."""
    size = 0
    try:
        async with asyncio.timeout(_DRAIN_S):
            while size < _DRAIN_BYTES:
                message = await request.receive()
                size += len(message.get("body", b""))
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                if not message.get("more_body", False):
                    return
    except TimeoutError:
        return
