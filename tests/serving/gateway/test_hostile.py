"""What attackers send harms nobody else: it is refused within bounds of time and memory."""

from __future__ import annotations

import contextlib
import json
import random
import resource
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from tests.serving.gateway.backends import RuleBackend
from tests.serving.gateway.running import Running, running, wait_until

from modelyard.security import KeyStore
from modelyard.serving.gateway import GatewaySettings, server

CHAT = {"model": "tiny-gpt", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}


@pytest.fixture
def gateway(keys: KeyStore, database: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    monkeypatch.setattr(server, "HEAD_TIMEOUT_S", 0.5)
    settings = GatewaySettings(database=database, body_timeout_s=0.5, max_body_bytes=2**20, max_in_flight=4)
    with running(RuleBackend(), settings) as found:
        yield found


def head(key: str, length: int | None = None, *more: str) -> bytes:
    size = "transfer-encoding: chunked" if length is None else f"content-length: {length}"
    lines = ["POST /v1/chat/completions HTTP/1.1", "host: a", f"authorization: Bearer {key}", size, *more]
    return "\r\n".join([*lines, "content-type: application/json", "", ""]).encode()


def answer(connection: socket.socket) -> bytes:
    """Everything until the gateway closes."""
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65_536):
            parts.append(part)
    return b"".join(parts)


def still_answers(gateway: Running, key: str) -> bool:
    return gateway.ask("/v1/chat/completions", CHAT, key=key).status == 200


def test_a_head_that_never_ends_is_cut_off(gateway: Running, key: str) -> None:
    with gateway.socket() as connection:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\n")
        started = time.monotonic()
        assert answer(connection) == b""
        assert time.monotonic() - started < 5
    assert still_answers(gateway, key)


def test_a_head_that_comes_byte_by_byte_gets_no_more_time(gateway: Running, key: str) -> None:
    with gateway.socket() as connection:
        started = time.monotonic()
        with contextlib.suppress(OSError):  # reset or broken pipe, as the system likes
            while time.monotonic() - started < 10:
                connection.sendall(b"x")
                time.sleep(0.02)
        assert time.monotonic() - started < 5


def test_a_body_that_never_ends_is_a_408(gateway: Running, key: str) -> None:
    with gateway.socket() as connection:
        connection.sendall(head(key, 1_000) + b'{"model"')
        reply = answer(connection)
    assert reply.startswith(b"HTTP/1.1 408")
    assert b"body_timeout_s" in reply
    assert still_answers(gateway, key)


def test_a_body_in_chunks_is_cut_at_the_limit_while_it_comes(gateway: Running, key: str) -> None:
    with gateway.socket() as connection:
        connection.sendall(head(key))
        for _ in range(10):
            connection.sendall(b"100000\r\n" + b"x" * 2**20 + b"\r\n")
        connection.sendall(b"0\r\n\r\n")
        assert answer(connection).startswith(b"HTTP/1.1 413")
    assert still_answers(gateway, key)


def test_bodies_of_10_mb_from_many_do_not_fill_the_memory(gateway: Running, key: str) -> None:
    body = json.dumps({**CHAT, "messages": [{"role": "user", "content": "x" * 10_000_000}]}).encode()
    assert gateway.ask("/v1/chat/completions", body, key=key).status == 413
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    statuses = []

    def send() -> None:
        statuses.append(gateway.ask("/v1/chat/completions", body, key=key).status)

    threads = [threading.Thread(target=send) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert statuses == [413] * 4
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 60_000, "kilobytes"


def test_a_claimed_length_of_a_terabyte_is_refused_at_once(gateway: Running, key: str) -> None:
    with gateway.socket() as connection:
        connection.sendall(head(key, 2**40))
        connection.shutdown(socket.SHUT_WR)
        reply = answer(connection)
    assert reply == b"" or reply.startswith(b"HTTP/1.1 413")
    assert still_answers(gateway, key)


@pytest.mark.parametrize(
    "lines",
    [
        [f"x-{number}: y" for number in range(500)],
        ["x-large: " + "y" * 200_000],
        ["x-large: " + "y" * 2_000_000],
    ],
    ids=["many", "large", "huge"],
)
def test_a_flood_of_headers_is_a_431(gateway: Running, key: str, lines: list[str]) -> None:
    with gateway.socket() as connection:
        with contextlib.suppress(OSError):  # closed on us in the middle, which is as good
            connection.sendall(head(key, 2, *lines) + b"{}")
        reply = answer(connection)
    was_reset = reply == b"" and len(lines) == 1  # the system drops an answer to who is still sending
    assert was_reset or reply.startswith(b"HTTP/1.1 431")
    assert still_answers(gateway, key)


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\r\n\r\n\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nhost: a\r\n\r\n",
        b"GET /v1/models/%ff%fe%00 HTTP/1.1\r\nhost: a\r\n\r\n",
        b"POST /v1/models HTTP/1.1\r\ncontent-length: -5\r\n\r\n",
        b"POST /v1/models HTTP/1.1\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\nhello",
        b"POST /v1/chat/completions HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nzzz\r\n",
        b"GET /v1/models HTTP/1.1\r\nhost: a\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nx-request-id: a\xff\nb\r\nauthorization: Bearer \xff\r\n\r\n",
        random.Random(7).randbytes(4_096),
    ],
    ids=lambda sent: repr(sent[:30]),
)
def test_what_is_no_http_is_refused_and_the_next_one_is_answered(gateway: Running, key: str, sent: bytes) -> None:
    with gateway.socket() as connection:
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        reply = answer(connection)
    assert reply == b"" or reply.startswith((b"HTTP/1.1 4", b"HTTP/1.0 4")), reply[:200]
    assert still_answers(gateway, key)


def test_calls_beyond_the_bound_of_a_replica_are_sent_away_with_a_time(gateway: Running, key: str) -> None:
    held = []
    for _ in range(4):
        connection = gateway.socket()
        connection.sendall(head(key, 1_000))  # waits for a body until the body's time is over
        held.append(connection)
    wait_until(lambda: b"modelyard_gateway_in_flight 4.0" in gateway.ask("/metrics").body)
    reply = gateway.ask("/v1/models", key=key)
    assert (reply.status, reply.code, reply.headers["retry-after"]) == (503, "overloaded", "1")
    assert gateway.ask("/healthz").status == 200
    for connection in held:
        assert answer(connection).startswith(b"HTTP/1.1 408")
        connection.close()
    assert still_answers(gateway, key)


def test_a_thousand_made_up_keys_are_a_thousand_401s(gateway: Running, key: str) -> None:
    statuses = {gateway.ask("/v1/models", key=f"my-{n:012x}-" + "A" * 43).status for n in range(300)}
    assert statuses == {401}
    assert still_answers(gateway, key)
