"""Tokens on their way from an engine's thread to the coroutines that wait for them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping

import pytest

from modelyard.serving.engines import threaded
from modelyard.serving.engines.threaded import ThreadedEngine
from modelyard.serving.protocol import EngineRequest, EngineStats, Feature, Sampling, Tokens

TOKENS, HANDS = 8, 6


class CountingCore:
    """Gives out the number of the step as the token, and notes how many were not received when a step began."""

    name = "counting"
    features: frozenset[Feature] = frozenset()
    context_tokens = 100

    def __init__(self, holds_gil: bool) -> None:
        self.holds_gil = holds_gil
        self.keys: list[int] = []
        self.steps = 0
        self.received = 0
        """By who listens; set from outside."""
        self.on_the_way: list[int] = []

    @property
    def busy(self) -> bool:
        return bool(self.keys)

    def add(self, key: int, request: EngineRequest) -> None:
        self.keys.append(key)

    def cancel(self, key: int) -> None:
        self.keys.remove(key)

    def step(self) -> Mapping[int, Tokens]:
        self.on_the_way.append(self.steps - self.received)
        self.steps += 1
        is_last = self.steps == TOKENS
        answers = {key: Tokens((self.steps,), finish_reason="length" if is_last else None) for key in self.keys}
        if is_last:
            self.keys.clear()
        return answers

    def stats(self) -> EngineStats:
        return EngineStats(len(self.keys), 0, 0.0, 0, 0)

    def close(self) -> None:
        self.keys.clear()


async def handed_on(source: AsyncIterator[Tokens], hands: int) -> AsyncIterator[Tokens]:
    """The same items after so many tasks, each of which hands them to the next by a queue."""
    if not hands:
        async for item in source:
            yield item
        return
    queue: asyncio.Queue[Tokens] = asyncio.Queue()

    async def pass_on() -> None:
        async for item in handed_on(source, hands - 1):
            queue.put_nowait(item)

    task = asyncio.create_task(pass_on())
    while True:
        item = await queue.get()
        yield item
        if item.finish_reason is not None:
            break
    await task


def test_tokens_are_received_before_a_step_that_holds_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threaded, "_HOPS_TIMEOUT_S", 60.0)  # so that a busy machine changes nothing
    core = CountingCore(holds_gil=True)

    async def listen() -> None:
        engine = ThreadedEngine(lambda: core)
        request = EngineRequest("r", [1], Sampling(max_tokens=TOKENS))
        async for _ in handed_on(engine.stream(request), HANDS):
            core.received += 1
        await engine.close()

    asyncio.run(listen())
    assert core.on_the_way == [0] * TOKENS


@pytest.mark.parametrize("holds_gil", [True, False])
def test_all_tokens_arrive_in_their_order(holds_gil: bool) -> None:
    core = CountingCore(holds_gil)

    async def listen() -> list[int]:
        engine = ThreadedEngine(lambda: core)
        request = EngineRequest("r", [1], Sampling(max_tokens=TOKENS))
        seen = [item.ids[0] async for item in engine.stream(request)]
        await engine.close()
        return seen

    assert asyncio.run(listen()) == list(range(1, TOKENS + 1))
