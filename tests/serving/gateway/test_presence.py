"""When a caller leaves, the work for them stops and their place is free, whatever they were waiting for."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Iterator

import pytest
from starlette.requests import ClientDisconnect
from tests.serving.gateway.backends import RuleBackend
from tests.serving.gateway.running import Running, running, wait_until

from modelyard.security import KeyStore
from modelyard.serving.gateway import GatewaySettings, streams
from modelyard.serving.protocol import Piece, Usage

CHAT = {"model": "tiny-gpt", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2_000}


@pytest.fixture(scope="module")
def slow() -> RuleBackend:
    return RuleBackend(delay_s=0.02)


@pytest.fixture(scope="module")
def gateway(slow: RuleBackend, keys: KeyStore, database: str) -> Iterator[Running]:
    with running(slow, GatewaySettings(database=database)) as found:
        yield found


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {**CHAT, "stream": True}),
        ("/v1/chat/completions", CHAT),
        ("/v1/completions", {"model": "tiny-gpt", "prompt": ["a", "b", "c"], "max_tokens": 2_000, "stream": True}),
        ("/v1/completions", {"model": "tiny-gpt", "prompt": ["a", "b", "c"], "max_tokens": 2_000}),
        ("/v1/embeddings", {"model": "minilm", "input": "slow"}),
        ("/v1/predict/minilm", {"inputs": [[1, 2]]}),
    ],
    ids=["stream", "whole", "streams of three", "three", "embedding", "prediction"],
)
def test_the_backend_is_cancelled_when_the_caller_leaves(
    gateway: Running, slow: RuleBackend, keys: KeyStore, path: str, body: dict[str, object]
) -> None:
    key, sent = keys.create(tenant="t"), json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {key}\r\ncontent-length: {len(sent)}\r\n"
    slow.delay_s = 0.02 if "completions" in path else 20.0
    before, seen = slow.begun, len(gateway.records)
    with gateway.socket() as connection:
        connection.sendall(f"{head}content-type: application/json\r\n\r\n".encode() + sent)
        expected = 3 if "prompt" in body else 1
        wait_until(lambda: slow.begun == before + expected)
        assert slow.running == expected
        if body.get("stream"):
            assert connection.recv(100)
    wait_until(lambda: slow.running == 0, 2)
    wait_until(lambda: len(gateway.records) == seen + 1)
    assert gateway.records[-1].outcome == "cancelled"


def test_a_cancelled_stream_is_counted_by_what_was_sent(gateway: Running, slow: RuleBackend, keys: KeyStore) -> None:
    slow.delay_s = 0.005
    key, sent = keys.create(tenant="t"), json.dumps({**CHAT, "stream": True}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {key}\r\n"
    with gateway.socket() as connection:
        connection.sendall(f"{head}content-length: {len(sent)}\r\n\r\n".encode() + sent)
        received = b""
        while received.count(b'"content"') < 12:
            received += connection.recv(65_536)
    wait_until(lambda: slow.running == 0 and gateway.records[-1].outcome == "cancelled")
    assert gateway.records[-1].prompt_tokens == 2
    assert 10 <= gateway.records[-1].completion_tokens < 200


def test_work_that_ends_first_gives_its_result_and_its_error() -> None:
    async def never() -> dict[str, str]:
        await asyncio.Event().wait()
        return {}

    async def fails() -> None:
        raise ValueError("broken")

    async def scenario() -> None:
        assert await streams.until_gone(never, asyncio.sleep(0, "done")) == "done"  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="broken"):
            await streams.until_gone(never, fails())  # type: ignore[arg-type]

    asyncio.run(scenario())


def test_a_caller_who_is_gone_ends_the_work_before_we_go_on() -> None:
    ended = []

    async def work() -> None:
        try:
            await asyncio.sleep(30)
        finally:
            await asyncio.sleep(0.01)
            ended.append(True)

    async def gone() -> dict[str, str]:
        await asyncio.sleep(0.01)
        return {"type": "http.disconnect"}

    with pytest.raises(ClientDisconnect):
        asyncio.run(streams.until_gone(gone, work()))  # type: ignore[arg-type]
    assert ended == [True]


def test_a_stream_is_closed_at_the_end_of_its_block_not_when_it_is_collected() -> None:
    closed = []

    async def endless() -> AsyncGenerator[int, None]:
        try:
            while True:
                yield 1
        finally:
            closed.append(True)

    async def scenario() -> None:
        numbers = endless()
        async with streams.closing(numbers) as held:
            await anext(held)
        assert closed == [True]

    asyncio.run(scenario())


def test_one_of_several_joined_calls_that_fails_closes_the_others() -> None:
    closed = []

    async def call(number: int, error: Exception | None) -> AsyncGenerator[Piece, None]:
        try:
            yield Piece(0, "", usage=Usage(1, 0))
            if error is not None:
                raise error
            while True:
                await asyncio.sleep(0)
                yield Piece(0, "x")
        finally:
            closed.append(number)

    async def scenario() -> None:
        calls = [call(0, None), call(1, ValueError("broken")), call(2, None)]
        async with streams.closing(streams.joined(calls, 1)) as pieces:
            async for _ in pieces:
                pass

    with pytest.raises(ValueError, match="broken"):
        asyncio.run(scenario())
    assert sorted(closed) == [0, 1, 2]
