"""Async iterators of pieces: closing them, joining several, and giving up when the caller has left."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from modelyard.errors import UnavailableError
from modelyard.serving.protocol import Piece, Usage

T = TypeVar("T")


async def until_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the caller leaves first (or when we are cancelled).

    Raises:
        ClientDisconnect: the caller left; `work` has ended.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        watching.cancel()
        if not working.done():
            working.cancel()
            await asyncio.wait((working,))
            if not working.cancelled():
                working.exception()  # looked at, so that nothing is logged about it


async def close(pieces: AsyncIterator[Any]) -> None:
    """Close an iterator: the work behind it stops."""
    closing = getattr(pieces, "aclose", None)
    if closing is not None:
        await closing()


@contextlib.asynccontextmanager
async def closing(pieces: AsyncIterator[T]) -> AsyncGenerator[AsyncIterator[T], None]:
    """Close `pieces` at the end, however it comes."""
    try:
        yield pieces
    finally:
        await close(pieces)


async def accepted(pieces: AsyncIterator[Piece]) -> Piece:
    """The first piece, which says that the call was accepted.

    Raises:
        UnavailableError: there was none.
    """
    first = await anext(pieces, None)
    if first is None:
        raise UnavailableError("the model gave no answer", "try again")
    return first


async def joined(streams: Sequence[AsyncIterator[Piece]], num_choices: int) -> AsyncGenerator[Piece, None]:
    """Several calls as one: the choices of the second come after those of the first, and usages are added up."""
    queue: asyncio.Queue[Piece | Exception | None] = asyncio.Queue(maxsize=64)
    used = Usage(0, 0)

    async def forward(number: int, stream: AsyncIterator[Piece]) -> None:
        nonlocal used
        try:
            async with closing(stream):
                async for piece in stream:
                    if piece.usage is not None:
                        used = _sum([used, piece.usage])
                    await queue.put(replace(piece, index=piece.index + number * num_choices, usage=None))
            await queue.put(None)
        except Exception as error:  # noqa: BLE001  (raised again on the other side of the queue)
            await queue.put(error)

    tasks: list[asyncio.Task[None]] = []
    try:
        firsts = [await accepted(stream) for stream in streams]
        yield replace(firsts[0], usage=_sum([first.usage for first in firsts if first.usage is not None]))
        tasks = [asyncio.ensure_future(forward(number, stream)) for number, stream in enumerate(streams)]
        running, held = len(tasks), None
        while running:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                running -= 1
                continue
            if held is not None:
                yield held
            held = item
        if held is not None:
            yield replace(held, usage=used)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for stream in streams:
            await close(stream)


def _sum(usages: Sequence[Usage]) -> Usage:
    return Usage(sum(u.prompt_tokens for u in usages), sum(u.completion_tokens for u in usages))


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
