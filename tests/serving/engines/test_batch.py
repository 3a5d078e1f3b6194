"""Dynamic batching: calls that come together are answered together, and none suffers from another."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import pytest

from modelyard.errors import InputError, OverloadedError, UnavailableError
from modelyard.serving.engines.batch import BatchEngine


class Doubling:
    """Doubles numbers and remembers its batches; refuses negative ones; waits while `hold` is set."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.go, self.started = threading.Event(), threading.Event()
        self.go.set()

    def __call__(self, inputs: Sequence[Any]) -> list[Any]:
        self.started.set()
        assert self.go.wait(10)
        self.batches.append(list(inputs))
        if any(item < 0 for item in inputs):
            raise InputError("negative")
        return [2 * item for item in inputs]


def test_calls_that_come_together_become_one_batch_and_get_their_own_answers() -> None:
    model = Doubling()

    async def main() -> list[list[Any]]:
        engine = BatchEngine(model, max_wait_ms=200)
        answers = await asyncio.gather(engine.predict([1, 2]), engine.predict([3]), engine.predict([]))
        await engine.close()
        return answers

    assert asyncio.run(main()) == [[2, 4], [6], []]
    assert model.batches == [[1, 2, 3]]


def test_a_full_batch_does_not_wait_and_no_batch_is_larger() -> None:
    model = Doubling()

    async def main() -> list[Any]:
        engine = BatchEngine(model, max_batch=4, max_wait_ms=600_000)
        async with asyncio.timeout(5):
            answers = await engine.predict(list(range(8)))
        await engine.close()
        return answers

    assert asyncio.run(main()) == [2 * n for n in range(8)]
    assert model.batches == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_a_lone_input_waits_no_longer_than_it_must() -> None:
    async def main() -> None:
        engine = BatchEngine(Doubling(), max_wait_ms=1)
        async with asyncio.timeout(5):
            assert await engine.predict([1]) == [2]
        await engine.close()

    asyncio.run(main())


def test_a_bad_input_spoils_only_its_own_call() -> None:
    async def main() -> list[Any]:
        engine = BatchEngine(Doubling(), max_wait_ms=100)
        calls = (engine.predict([1]), engine.predict([-5]), engine.predict([3]))
        answers = await asyncio.gather(*calls, return_exceptions=True)
        await engine.close()
        return answers

    good, bad, other = asyncio.run(main())
    assert (good, other) == ([2], [6])
    assert isinstance(bad, InputError)


def test_beyond_the_queue_calls_are_refused_at_once() -> None:
    model = Doubling()

    async def main() -> None:
        engine = BatchEngine(model, max_batch=1, max_wait_ms=0, max_queue=3)
        model.go.clear()
        first = asyncio.create_task(engine.predict([1]))
        await asyncio.to_thread(model.started.wait, 10)
        waiting = asyncio.create_task(engine.predict([2, 3, 4]))
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError, match="3 inputs wait, 3 may"):
            await engine.predict([5])
        model.go.set()
        assert await asyncio.gather(first, waiting) == [[2], [4, 6, 8]]
        await engine.close()

    asyncio.run(main())


def test_a_caller_that_leaves_is_not_computed_for() -> None:
    model = Doubling()

    async def main() -> None:
        engine = BatchEngine(model, max_batch=1, max_wait_ms=0)
        model.go.clear()
        first = asyncio.create_task(engine.predict([1]))
        await asyncio.to_thread(model.started.wait, 10)
        second = asyncio.create_task(engine.predict([2]))
        await asyncio.sleep(0)
        assert engine.waiting == 1
        second.cancel()
        model.go.set()
        await first
        assert await engine.predict([3]) == [6]
        await engine.close()

    asyncio.run(main())
    assert model.batches == [[1], [3]]


def test_closing_ends_the_batch_that_runs_and_refuses_the_rest() -> None:
    model = Doubling()

    async def main() -> list[Any]:
        engine = BatchEngine(model, max_batch=1, max_wait_ms=0)
        model.go.clear()
        calls = [asyncio.create_task(engine.predict([n])) for n in (1, 2)]
        await asyncio.to_thread(model.started.wait, 10)
        closing = asyncio.create_task(engine.close())
        await asyncio.sleep(0)
        model.go.set()
        await closing
        with pytest.raises(UnavailableError):
            await engine.predict([3])
        return await asyncio.gather(*calls, return_exceptions=True)

    answered, refused = asyncio.run(main())
    assert answered == [2]
    assert isinstance(refused, UnavailableError)
