"""Dynamic batching for the tasks that answer in one pass: classifiers and the like.

Calls that come within a few milliseconds of each other become one call of `task.predict`, which costs little more than
one of them alone (Crankshaw et al. 2017, "Clipper").
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from modelyard.errors import OverloadedError, UnavailableError

_Predict = Callable[[Sequence[Any]], list[Any]]


class BatchEngine:
    """Collects inputs until there are enough, or the first has waited long enough; one batch runs at a time."""

    name = "batch"

    def __init__(
        self, predict: _Predict, *, max_batch: int = 32, max_wait_ms: float = 5.0, max_queue: int = 1024
    ) -> None:
        """Start nothing yet.

        Args:
            predict: one answer for each input, in order; called on a thread.
            max_batch: most inputs in one call of it.
            max_wait_ms: how long the first input of a batch waits for others.
            max_queue: inputs beyond these that wait are refused.
        """
        self._predict = predict
        self._max_batch = max_batch
        self._max_wait_s = max_wait_ms / 1000
        self._max_queue = max_queue
        self._waiting: list[tuple[Any, asyncio.Future[Any]]] = []
        self._arrived = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="predict")
        self._closed = False

    async def predict(self, inputs: Sequence[Any]) -> list[Any]:
        """An answer for each input.

        Raises:
            OverloadedError: too many inputs wait.
            UnavailableError: the engine was closed.
            whatever `predict` raises for one of these inputs.
        """
        if self._closed:
            raise UnavailableError("the model was unloaded", "try again")
        if len(self._waiting) + len(inputs) > self._max_queue:
            raise OverloadedError(f"{len(self._waiting)} inputs wait, {self._max_queue} may", retry_after_s=1)
        loop = asyncio.get_running_loop()
        futures = [loop.create_future() for _ in inputs]
        self._waiting.extend(zip(inputs, futures, strict=True))
        self._arrived.set()
        if self._worker is None:
            self._worker = loop.create_task(self._work())
        try:
            return list(await asyncio.gather(*futures))
        finally:
            for future in futures:
                future.cancel()  # of a caller that left, or beside an input that failed

    @property
    def waiting(self) -> int:
        """Inputs that no batch has taken yet."""
        return len(self._waiting)

    async def close(self) -> None:
        """End the batch that runs, and refuse the rest."""
        self._closed = True
        self._arrived.set()
        for _, future in self._waiting:
            if not future.done():
                future.set_exception(UnavailableError("the model was unloaded", "try again"))
        if self._worker is not None:
            await self._worker
        await asyncio.to_thread(self._thread.shutdown)

    async def _work(self) -> None:
        while not self._closed:
            await self._arrived.wait()
            await self._fill()
            self._waiting = [pair for pair in self._waiting if not pair[1].done()]
            batch, self._waiting = self._waiting[: self._max_batch], self._waiting[self._max_batch :]
            if batch:
                await self._run(batch)
            if not (self._waiting or self._closed):
                self._arrived.clear()

    async def _fill(self) -> None:
        """Wait until a batch is full, or the time is over."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._max_wait_s
        while len(self._waiting) < self._max_batch and not self._closed and loop.time() < deadline:
            self._arrived.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(deadline):
                    await self._arrived.wait()

    async def _run(self, batch: list[tuple[Any, asyncio.Future[Any]]]) -> None:
        """Answer a batch. When it fails, each input is asked alone, so that a bad one spoils only its own call."""
        loop = asyncio.get_running_loop()
        try:
            answers = await loop.run_in_executor(self._thread, self._predict, [item for item, _ in batch])
        except Exception as error:  # noqa: BLE001  (it is handed to the caller)
            if len(batch) == 1:
                _settle(batch[0][1], error)
                return
            for pair in batch:
                await self._run([pair])
            return
        for (_, future), answer in zip(batch, answers, strict=True):
            _settle(future, answer)


def _settle(future: asyncio.Future[Any], outcome: Any) -> None:
    if future.done():
        return
    if isinstance(outcome, Exception):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
