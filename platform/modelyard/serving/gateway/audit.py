"""What is told about each call, to an audit log and to the access log. Never a prompt, an answer or a secret."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, kw_only=True)
class CallRecord:
    """One call to `/v1`, when it has ended."""

    request_id: str
    at_s: float
    """Unix time of its first byte."""
    route: str
    """The route's pattern: `POST /v1/predict/{model}`; `unmatched` where there is none."""
    subject: str | None
    """Who called; None when that was not proved."""
    tenant: str | None
    site: str | None
    """Where it was answered."""
    model: str | None
    """A model the gateway knows; never what a caller made up."""
    status: int
    outcome: str
    """`ok`, `cancelled` (the caller left), or the error's code; one that came after the stream began too."""
    prompt_tokens: int
    completion_tokens: int
    first_token_s: float | None
    """From the first byte of the request to the first token of the answer."""
    duration_s: float


class AuditHook(Protocol):
    """Called once for each call, after its last byte. What it raises is logged and harms no call."""

    async def __call__(self, record: CallRecord) -> None:
        """Keep the record."""
        ...
