"""Many callers at once over real HTTP, on a gateway process with a real model: nothing is mixed up, lost or leaked.

Short in the suite; by hand for longer, with the figures printed:

    LOAD_S=30 LOAD_REQUESTS=5000 pytest tests/serving/gateway/test_load.py -s
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from safetensors.torch import load_file, save_file
from tests.serving.gateway.process import Process, serving
from tests.serving.models import register, tiny_llama

from modelyard.security import KeyStore
from modelyard.tasks.generation import load_tokenizer

pytestmark = pytest.mark.slow
LOAD_S = float(os.environ.get("LOAD_S", "3"))
"""For each number of streams."""
LOAD_REQUESTS = int(os.environ.get("LOAD_REQUESTS", "800"))
"""In the test of memory."""
FREE_S = 1.0
"""A caller's place must be free again so soon after it left."""
PROMPTS = [f"{word} models answer {number}" for number in range(4) for word in ("The", "quick", "fox", "jumps", "over")]
MODEL = "tiny-transformers"
CONTEXT = 1_024
LONG = 900
"""Tokens of an answer that nobody waits for."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Process, str]]:
    """The process and a key with limits that are far away, so that they are counted."""
    folder = tmp_path_factory.mktemp("load")
    database = f"sqlite:///{folder / 'gateway.db'}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODELYARD_HOME", str(folder / "home"))
        patch.setenv("MODELYARD_STORE", str(folder / "home" / "store"))
        patch.setenv("MODELYARD_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        patch.setenv("HF_HUB_OFFLINE", "1")
        register(never_ending(tiny_llama(folder / "tiny", max_position_embeddings=CONTEXT)), "tiny")
        keys = KeyStore(database)
        key = keys.create(tenant="load", requests_per_minute=10**6, tokens_per_minute=10**9)
        keys.close()
        with serving(database, "tiny=transformers", log=folder / "log.txt") as process:
            yield process, key


def never_ending(folder: Path) -> Path:
    """The model without a chance for its end-of-sequence token, so that answers are as long as they are asked for."""
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][load_tokenizer(folder).eos_token_id] = 0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


class Client:
    """Asks the process; keeps what came back."""

    def __init__(self, process: Process, key: str, session: aiohttp.ClientSession) -> None:
        self._url, self._session = process.url, session
        self._headers = {"authorization": f"Bearer {key}"}
        self.statuses: Counter[int] = Counter()
        self.first_s: list[float] = []
        self.tokens = 0

    async def stream(self, number: int) -> str:
        """A greedy answer, piece by piece; its length follows from the number."""
        text, began, first = "", time.perf_counter(), None
        async with self.asking(body_of(number)) as events:
            async for event in events:
                if event.get("usage"):
                    self.tokens += event["usage"]["completion_tokens"]
                for choice in event["choices"]:
                    if choice["text"] and first is None:
                        first = time.perf_counter() - began
                    text += choice["text"]
        self.first_s.append(first or 0.0)
        return text

    def asking(self, body: dict[str, Any]) -> _Events:
        """The events of a streamed completion."""
        return _Events(self, body)

    async def post(self, path: str, body: Any) -> int:
        """The status of a whole answer."""
        async with self._session.post(f"{self._url}{path}", json=body, headers=self._headers) as answer:
            await answer.read()
        self.statuses[answer.status] += 1
        return answer.status

    async def stats(self) -> dict[str, Any]:
        """See `process.py`."""
        async with self._session.get(f"{self._url}/stats") as answer:
            found: dict[str, Any] = await answer.json()
            return found

    async def is_idle(self) -> bool:
        """Whether the engine holds no sequence."""
        engine = (await self.stats())["engines"][MODEL]
        return engine["running"] == 0 and engine["waiting"] == 0 and engine["cache_usage"] == 0


class _Events:
    def __init__(self, client: Client, body: dict[str, Any]) -> None:
        self._client = client
        self._request = client._session.post(f"{client._url}/v1/completions", json=body, headers=client._headers)

    async def __aenter__(self) -> AsyncIterator[dict[str, Any]]:
        self._answer = await self._request.__aenter__()
        self._client.statuses[self._answer.status] += 1
        assert self._answer.status == 200, await self._answer.text()
        return self._events()

    async def __aexit__(self, *_: object) -> None:
        self._answer.close()  # the connection too, when it is in the middle of an answer

    async def _events(self) -> AsyncIterator[dict[str, Any]]:
        async for line in self._answer.content:
            if line.startswith(b"data: {"):
                yield json.loads(line[6:])


def body_of(number: int, **changes: Any) -> dict[str, Any]:
    number %= len(PROMPTS)
    return {
        "model": MODEL,
        "prompt": PROMPTS[number],
        "max_tokens": 6 + number * 7 % 40,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        **changes,
    }


def run(served: tuple[Process, str], work: Callable[[Client], Coroutine[Any, Any, None]]) -> Client:
    async def main() -> Client:
        connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=60)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            client = Client(*served, session)
            await work(client)
            return client

    return asyncio.run(main())


async def until_idle(client: Client, seconds: float) -> float:
    """Seconds until the engine is idle."""
    began = time.perf_counter()
    while not await client.is_idle():
        assert time.perf_counter() - began < seconds, await client.stats()
        await asyncio.sleep(0.02)
    return time.perf_counter() - began


@pytest.fixture(scope="module")
def alone(served: tuple[Process, str]) -> list[str]:
    """The answers when nobody else asks."""
    answers: list[str] = []

    async def one_by_one(client: Client) -> None:
        answers.extend([await client.stream(number) for number in range(len(PROMPTS))])

    run(served, one_by_one)
    assert len(set(answers)) > len(PROMPTS) // 2, "the answers tell the streams apart"
    return answers


@pytest.mark.parametrize("streams", [16, 64])
def test_each_of_many_streams_is_the_answer_it_would_be_alone(
    served: tuple[Process, str], alone: list[str], streams: int
) -> None:
    numbers = itertools.count()
    wrong: list[tuple[int, str]] = []

    async def load(client: Client) -> None:
        end = time.monotonic() + LOAD_S

        async def caller() -> None:
            while True:
                number = next(numbers) % len(PROMPTS)
                answer = await client.stream(number)
                if answer != alone[number]:
                    wrong.append((number, answer))
                if time.monotonic() > end:
                    return

        await asyncio.gather(*(caller() for _ in range(streams)))
        await until_idle(client, FREE_S)

    began = time.monotonic()
    client = run(served, load)
    seconds = time.monotonic() - began
    assert wrong == []
    assert set(client.statuses) == {200}
    assert client.statuses[200] >= streams
    print(
        f"\n{streams} streams, {seconds:.0f} s: {client.statuses[200]} answers, {client.tokens / seconds:.0f} tokens/s,"
        f" first token p50 {1e3 * statistics.median(client.first_s):.0f} ms"
    )


@pytest.mark.parametrize("streams", [16, 64])
def test_callers_who_leave_free_their_places_within_a_second(served: tuple[Process, str], streams: int) -> None:
    async def load(client: Client) -> None:
        begun = asyncio.Barrier(streams)

        async def caller(number: int) -> None:
            async with client.asking(body_of(number, max_tokens=LONG)) as events:
                await anext(events)
                await begun.wait()
                assert not await client.is_idle()

        await asyncio.gather(*(caller(number) for number in range(streams)))
        seconds = await until_idle(client, FREE_S)
        print(f"\n{streams} callers left, all places free after {1e3 * seconds:.0f} ms")

    run(served, load)


def test_memory_stays_flat_over_thousands_of_calls(served: tuple[Process, str]) -> None:
    """Of every kind: streamed, whole, refused, unknown, embedded, left in the middle."""
    marks: list[tuple[int, float, int]] = []

    async def load(client: Client) -> None:
        numbers = iter(range(LOAD_REQUESTS))

        async def caller() -> None:
            for number in numbers:
                await one_of_all(client, number)
                if number % max(1, LOAD_REQUESTS // 20) == 0:
                    await mark(client, number)

        await asyncio.gather(*(caller() for _ in range(16)))
        await until_idle(client, FREE_S)
        await mark(client, LOAD_REQUESTS)

    async def mark(client: Client, number: int) -> None:
        found = await client.stats()
        marks.append((number, found["rss_mib"], found["tasks"]))

    client = run(served, load)
    assert {status for status in client.statuses if status >= 500} == set()
    warm = [found for found in marks if found[0] >= LOAD_REQUESTS // 4]
    slope, _ = statistics.linear_regression([found[0] for found in warm], [found[1] for found in warm])
    ratio = warm[-1][1] / warm[0][1]
    print(f"\n{LOAD_REQUESTS} calls: RSS {warm[0][1]:.0f} -> {warm[-1][1]:.0f} MiB, {1e3 * slope:.2f} MiB per 1,000")
    assert ratio < 1.03, marks
    assert marks[-1][2] <= marks[0][2], "no task is left over"


async def one_of_all(client: Client, number: int) -> None:
    short = body_of(number, max_tokens=2)
    match number % 8:
        case 0:
            async with client.asking(body_of(number, max_tokens=100)) as events:
                await anext(events)  # and leaves
        case 1:
            assert await client.post("/v1/completions", {**short, "max_tokens": -1}) == 400
        case 2:
            assert await client.post("/v1/completions", {**short, "model": f"none-{number}"}) == 404
        case 3:
            assert await client.post("/v1/embeddings", {"model": MODEL, "input": [f"text {number}"]}) == 200
        case 4:
            whole = {**short, "stream": False, "stream_options": None}
            assert await client.post("/v1/completions", whole) == 200
        case 5:
            messages = [{"role": "user", "content": f"hello {number}"}]
            body = {"model": MODEL, "messages": messages, "max_tokens": 2}
            assert await client.post("/v1/chat/completions", body) == 200
        case _:
            await client.stream(number)
