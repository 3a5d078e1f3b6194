"""A real gateway under uvicorn on a loopback port, in a thread of the test."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from modelyard.serving.gateway import AuditHook, CallRecord, GatewaySettings, create_app
from modelyard.serving.gateway.server import server
from modelyard.serving.protocol import Backend


class Reply(NamedTuple):
    """An HTTP answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """The `code` of an error."""
        return str(self.json()["error"]["code"])

    @property
    def code_or_ok(self) -> str:
        """The `code` of an error, or `ok`."""
        return self.code if self.status >= 400 else "ok"

    @property
    def param(self) -> str | None:
        """The `param` of an error."""
        found = self.json()["error"]["param"]
        return None if found is None else str(found)


class Running(NamedTuple):
    """A gateway that answers on `port`."""

    port: int
    records: list[CallRecord]

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self.port}"

    def ask(
        self, path: str, body: Any = None, *, key: str | None = None, method: str | None = None, **headers: str
    ) -> Reply:
        """One request: an object is sent as JSON, bytes as they are."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if key is not None:
            sent["authorization"] = f"Bearer {key}"
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
            sent.setdefault("content-type", "application/json")
        try:
            connection.request(method or ("GET" if body is None else "POST"), path, body, sent)
            answer = connection.getresponse()
            return Reply(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def socket(self) -> socket.socket:
        """A raw connection."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def record_of(self, reply: Reply) -> CallRecord:
        """The record of a call, which may be written a moment after its answer."""
        identity = reply.headers["x-request-id"]

        def found() -> list[CallRecord]:
            return [record for record in self.records if record.request_id == identity]

        wait_until(lambda: bool(found()))
        return found()[-1]


@contextlib.contextmanager
def running(backend: Backend, settings: GatewaySettings, audit: AuditHook | None = None) -> Iterator[Running]:
    """Start, and stop at the end."""
    records: list[CallRecord] = []

    async def keep(record: CallRecord) -> None:
        records.append(record)

    serving = server(create_app(backend, settings, audit=audit or keep), port=0)
    serving.config.timeout_graceful_shutdown = 2
    thread = threading.Thread(target=serving.run, daemon=True)
    thread.start()
    try:
        wait_until(lambda: serving.started)
        yield Running(serving.servers[0].sockets[0].getsockname()[1], records)
    finally:
        serving.should_exit = True
        thread.join(timeout=20)
        assert not thread.is_alive(), "the gateway did not stop"


def wait_until(holds: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Look until `holds`."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)
