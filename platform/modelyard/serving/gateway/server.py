"""The gateway under plain uvicorn, with the bounds that uvicorn itself does not keep.

uvicorn's fast parser waits for ever for the end of a request's head, and holds as many headers as a client sends.
Behind Ray Serve its proxy stands in this place.
"""

from __future__ import annotations

import asyncio
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from modelyard.serving.gateway.errors import CallError

HEAD_TIMEOUT_S = 10.0
"""A connection that has not sent a whole head by then is closed; between requests `KEEP_ALIVE_S` counts."""
HEAD_BYTES = 64 * 1024
"""Request line and headers together."""
HEAD_FIELDS = 100
"""Number of headers."""
KEEP_ALIVE_S = 5
MAX_CONNECTIONS = 4_096

_REFUSAL = b"HTTP/1.1 %b\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%b"


def server(app: FastAPI, *, host: str = "127.0.0.1", port: int = 8000) -> uvicorn.Server:
    """A server that is ready to `run()`; it logs no requests, the gateway does."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            host=host,
            port=port,
            http=BoundedProtocol,
            ws="none",
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            limit_concurrency=MAX_CONNECTIONS,
            timeout_graceful_shutdown=30,
            log_config=None,
        )
    )


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's protocol with a bound on the time and the size of a request's head."""

    _head_timer: asyncio.TimerHandle | None = None
    _head_bytes = 0
    _num_whole = 0
    """Requests read to their end."""
    _in_head = True
    _is_too_large = False

    def connection_made(self, transport: Any) -> None:
        """Start the clock of the first head."""
        super().connection_made(transport)
        self._start_clock()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock."""
        self._stop_clock()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count what belongs to a head that is not whole yet."""
        if self._in_head and self._head_timer is None:
            self._start_clock()  # the next request on a kept connection
        num_whole = self._num_whole
        super().data_received(data)
        if self._in_head and self._num_whole == num_whole and not self.transport.is_closing():
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_BYTES:
                self._is_too_large = True
                self.send_400_response("")

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header, up to the bound."""
        if len(self.headers) >= HEAD_FIELDS:
            self._is_too_large = True
            raise ValueError("too many headers")  # the parser stops and asks for `send_400_response`
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The head is whole."""
        self._stop_clock()
        self._in_head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The body is whole; what follows is the next head."""
        self._in_head, self._head_bytes = True, 0
        self._num_whole += 1
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP, and a head beyond the bounds."""
        status, code, text = b"400 Bad Request", "invalid_http", "this is not a valid HTTP request"
        if self._is_too_large:
            status, code = b"431 Request Header Fields Too Large", "headers_too_large"
            text = f"more than {HEAD_FIELDS} headers, or {HEAD_BYTES} bytes of them"
        body = CallError(400, code, text).body()
        self.transport.write(_REFUSAL % (status, len(body), body))
        self.transport.close()

    def _start_clock(self) -> None:
        self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self.transport.close)

    def _stop_clock(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
