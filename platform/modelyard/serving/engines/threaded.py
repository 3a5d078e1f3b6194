"""An engine on a thread of its own: requests come in from coroutines, tokens go back to them.

What computes is a `Core`: plain synchronous code that only its thread ever touches, so it needs no locks and a test can
step it by hand. `ThreadedEngine` gives it the asyncio face of the `Engine` protocol.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol

from modelyard.errors import InputError, ModelyardError, UnavailableError
from modelyard.serving.protocol import EngineRequest, EngineStats, Feature, Tokens

_CLOSE_TIMEOUT_S = 30.0
_HOPS = 10
"""Turns of an event loop in which a token gets from the engine's thread to a socket; there are about eight."""
_HOPS_TIMEOUT_S = 0.01
"""An event loop that needs longer is busy with something else, and goes on beside the next step."""
log = logging.getLogger(__name__)


class Core(Protocol):
    """The synchronous inside of an engine; every method but the constructor is called by one thread."""

    @property
    def name(self) -> str: ...

    @property
    def features(self) -> frozenset[Feature]: ...

    @property
    def context_tokens(self) -> int: ...

    def add(self, key: int, request: EngineRequest) -> None:
        """Take a request in; `key` names it from here on."""
        ...

    def cancel(self, key: int) -> None:
        """Free what the request holds. Unknown and finished keys are ignored."""
        ...

    @property
    def holds_gil(self) -> bool:
        """Whether no other Python thread runs during a step."""
        ...

    @property
    def busy(self) -> bool:
        """Whether there is anything to step."""
        ...

    def step(self) -> Mapping[int, Tokens]:
        """Compute the next token of the running sequences."""
        ...

    def stats(self) -> EngineStats: ...

    def close(self) -> None: ...


class _Stream:
    """One answer on its way from the engine's thread to a coroutine."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[Tokens | Exception] = asyncio.Queue()

    def put(self, item: Tokens | Exception) -> None:
        """Called by the engine's thread."""
        with contextlib.suppress(RuntimeError):  # the caller's event loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(self._items.put_nowait, item)

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """Of the coroutine that listens."""
        return self._loop

    async def items(self) -> AsyncIterator[Tokens]:
        while True:
            item = await self._items.get()
            if isinstance(item, Exception):
                raise item
            yield item
            if item.finish_reason is not None:
                return


class ThreadedEngine:
    """A `Core` behind the `Engine` protocol."""

    def __init__(self, build: Callable[[], Core]) -> None:
        """Build the core on its thread, and wait for it.

        Raises:
            whatever `build` raises.
        """
        self._wake = threading.Condition()
        self._jobs: list[Callable[[], None]] = []
        self._streams: dict[int, _Stream] = {}
        self._keys = itertools.count()
        self._closing = False
        self._error: Exception | None = None
        ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(build, ready), name="engine", daemon=True)
        self._thread.start()
        ready.wait()  # no timeout: how long a model loads is for whoever asked for it to say
        if self._error is not None:
            raise self._error

    @property
    def name(self) -> str:
        return self._core.name

    @property
    def features(self) -> frozenset[Feature]:
        return self._core.features

    @property
    def context_tokens(self) -> int:
        return self._core.context_tokens

    async def stream(self, request: EngineRequest) -> AsyncGenerator[Tokens, None]:
        """The answer as it comes; closing the iterator frees the slot before the next step.

        Raises:
            InputError: the prompt is empty, or leaves no place in the context for an answer.
            UnavailableError: the engine was closed, or failed.
        """
        length = len(request.prompt_ids)
        if not 0 < length < self.context_tokens:
            raise InputError(
                f"a prompt of {length} tokens, where 1 to {self.context_tokens - 1} leave a place for an answer",
                "give at least one token" if not length else "shorten the prompt",
            )
        key, stream = next(self._keys), _Stream()

        def join() -> None:
            try:
                self._core.add(key, request)
            except Exception as error:  # noqa: BLE001  (it belongs to this caller, not to the other streams)
                stream.put(error)

        self._streams[key] = stream
        finished = False
        try:
            self._submit(join)
            async for tokens in stream.items():
                finished = tokens.finish_reason is not None
                yield tokens
        finally:
            del self._streams[key]
            if not finished:
                with contextlib.suppress(UnavailableError):
                    self._submit(lambda: self._core.cancel(key))

    async def run(self, work: Callable[[Any], Any]) -> Any:
        """The result of `work(core)`, called by the engine's thread between two steps.

        Raises:
            UnavailableError: the engine was closed, or failed.
        """
        loop = asyncio.get_running_loop()
        result: asyncio.Future[Any] = loop.create_future()

        def settle(call: Callable[[Any], None], value: Any) -> None:
            if not result.done():
                call(value)

        def job() -> None:
            try:
                outcome, call = work(self._core), result.set_result
            except Exception as error:  # noqa: BLE001  (it belongs to the caller, not to the other streams)
                outcome, call = error, result.set_exception
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(settle, call, outcome)

        self._submit(job)
        return await result

    def stats(self) -> EngineStats:
        """As of the last step; what is not yet with the core counts as waiting."""
        return replace(self._stats, waiting=self._stats.waiting + len(self._jobs))

    async def close(self) -> None:
        """Stop after the step that runs; open streams end with `UnavailableError`."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        await asyncio.to_thread(self._thread.join, _CLOSE_TIMEOUT_S)
        if self._thread.is_alive():
            raise UnavailableError(f"the engine did not stop within {_CLOSE_TIMEOUT_S:g} s", "end its process")

    def _submit(self, job: Callable[[], None]) -> None:
        with self._wake:
            if self._closing or self._error is not None:
                raise self._gone()
            self._jobs.append(job)
            self._wake.notify()

    def _run(self, build: Callable[[], Core], ready: threading.Event) -> None:
        try:
            self._core = build()
            self._stats = self._core.stats()
            ready.set()
            self._work()
        except Exception as error:
            self._error = error
            if ready.is_set():
                log.exception("engine %s failed", self._core.name)
        finally:
            ready.set()
            with self._wake:
                self._closing = True
                self._jobs.clear()
            for stream in list(self._streams.values()):
                stream.put(self._gone())
            if core := getattr(self, "_core", None):
                core.close()

    def _work(self) -> None:
        while True:
            with self._wake:
                while not (self._jobs or self._closing or self._core.busy):
                    self._wake.wait()  # no timeout: an idle engine sleeps until somebody comes
                if self._closing:
                    return
                jobs, self._jobs = self._jobs, []
            for job in jobs:
                job()
            answers = self._core.step() if self._core.busy else {}
            self._stats = self._core.stats()
            loops = set()
            for key, tokens in answers.items():
                if (stream := self._streams.get(key)) is not None:
                    stream.put(tokens)
                    loops.add(stream.loop)
            if self._core.holds_gil:
                for loop in loops:
                    _let_run(loop)

    def _gone(self) -> ModelyardError:
        if self._error is not None:
            return UnavailableError(f"the engine failed: {self._error}", "see the log of its process")
        return UnavailableError("the engine was closed", "try again: the model may be loading elsewhere")


def _let_run(loop: asyncio.AbstractEventLoop) -> None:
    """Wait until the loop has passed on what it got; beside steps that hold the GIL each of its turns takes a step."""
    passed_on = threading.Event()

    def turn(left: int) -> None:
        if left:
            loop.call_soon(turn, left - 1)
        else:
            passed_on.set()

    with contextlib.suppress(RuntimeError):  # the loop is closed
        loop.call_soon_threadsafe(turn, _HOPS)
        passed_on.wait(_HOPS_TIMEOUT_S)
