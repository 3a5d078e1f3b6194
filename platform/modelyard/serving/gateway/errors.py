"""What a caller is told when a call fails: every error in OpenAI's form, with the status it belongs to.

| status | code | when |
|---|---|---|
| 400 | invalid_json, invalid_value, missing_parameter, unknown_parameter, unsupported_parameter | the body |
| 401 | missing_api_key, invalid_api_key, expired_api_key, revoked_api_key, invalid_token | who calls is not proved |
| 403 | model_not_allowed, work_not_allowed | the key may not do this |
| 404, 405 | model_not_found, not_found, method_not_allowed | |
| 408, 413, 415, 431 | request_timeout, body_too_large, unsupported_media_type, headers_too_large | reading it |
| 429 | rate_limit_exceeded, insufficient_quota | with `Retry-After` when waiting helps |
| 500, 503, 504 | internal_error, overloaded, unavailable, timeout | 503 with `Retry-After` |
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

from modelyard.errors import (
    AccessError,
    InputError,
    ModelyardError,
    NotFoundError,
    OverloadedError,
    StorageError,
    UnavailableError,
    WaitTimeoutError,
)

UNAVAILABLE_RETRY_S = 5.0
"""When to come back after a part was not running: about the time a replica takes to start."""

_TYPES = {401: "authentication_error", 403: "permission_error"}


class CallError(ModelyardError):
    """A call ends with this status and this text; the text is for the caller and never logged."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        kind: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.args = (status, code, message)
        self.status, self.code, self.message, self.param = status, code, message, param
        self.kind = kind or _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
        self.headers = dict(headers or {})

    def body(self) -> bytes:
        """The error as OpenAI writes it, in UTF-8."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return json.dumps({"error": error}).encode()


class RateLimitError(CallError):
    """A limit or a quota is used up."""

    limit = ""
    """Which: `requests`, `tokens` or `quota`."""


def over_limit(
    message: str, *, kind: str, retry_after_s: float | None, headers: Mapping[str, str], is_quota: bool
) -> RateLimitError:
    """A 429; `retry_after_s` None: it can never fit. `kind`: requests or tokens."""
    wait: dict[str, str]
    if retry_after_s is None:
        advice, wait = "; it can never fit: make it smaller", {"x-should-retry": "false"}
    else:
        seconds = max(1, math.ceil(retry_after_s))
        advice, wait = f"; try again in {seconds} s", {"retry-after": str(seconds)}
        if is_quota:
            wait["x-should-retry"] = "false"  # clients that retry by themselves would wait for hours
    code = "insufficient_quota" if is_quota else "rate_limit_exceeded"
    error = RateLimitError(
        429, code, message + advice, kind="insufficient_quota" if is_quota else kind, headers={**headers, **wait}
    )
    error.limit = "quota" if is_quota else kind
    return error


def invalid(param: str | None, message: str, code: str = "invalid_value") -> CallError:
    """A 400 about one field of the body."""
    return CallError(400, code, message, param=param)


def timed_out(waited_for: str, seconds: float, setting: str) -> CallError:
    """A 504 that names the setting."""
    problem = f"waited {seconds:g} s for {waited_for}; ask for less, or have the gateway's `{setting}` raised"
    return CallError(504, "timeout", problem)


def as_call_error(error: Exception) -> CallError:
    """The answer for anything that was raised on the way. What is not ours is a 500 without its text."""
    if isinstance(error, CallError):
        return error
    text = str(error).replace("\n  -> ", "; ")
    match error:
        case OverloadedError():
            return CallError(503, "overloaded", text, headers=_retry(error.retry_after_s))
        case UnavailableError() | StorageError():
            shown = text if isinstance(error, UnavailableError) else "the gateway cannot reach its database"
            return CallError(503, "unavailable", shown, headers=_retry(UNAVAILABLE_RETRY_S))
        case WaitTimeoutError() | TimeoutError():
            return CallError(504, "timeout", text or "the model did not answer in time")
        case NotFoundError():
            return CallError(404, "model_not_found", text, param="model")
        case AccessError():
            return CallError(401, "invalid_token", text)
        case InputError():
            return CallError(400, "invalid_value", text)
    return CallError(500, "internal_error", "the gateway failed; name the request id when you report it")


def _retry(seconds: float) -> dict[str, str]:
    return {"retry-after": str(max(1, math.ceil(seconds)))}
