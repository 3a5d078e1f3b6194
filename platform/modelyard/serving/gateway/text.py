"""Answering chats and completions: reserve, generate, frame, settle."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

from starlette.types import Send

from modelyard.errors import UnavailableError
from modelyard.serving.gateway import streams
from modelyard.serving.gateway.errors import timed_out
from modelyard.serving.gateway.exchange import Exchange, send_whole, told
from modelyard.serving.gateway.framing import DONE, Choice, Frames, error_event, whole
from modelyard.serving.gateway.metrics import Metrics
from modelyard.serving.protocol import Piece, Usage

_STREAM_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}


@dataclass(kw_only=True)
class TextAnswer:
    """How one call for text is to be answered."""

    exchange: Exchange
    metrics: Metrics
    is_chat: bool
    model: str
    num_choices: int
    """Of all prompts together."""
    is_streamed: bool
    include_usage: bool
    timeout_s: float
    headers: dict[str, str]

    def __post_init__(self) -> None:
        self._created_s = int(time.time())
        self._identity = f"{'chatcmpl' if self.is_chat else 'cmpl'}-{self.exchange.request_id}"
        self._num_pieces = 0
        self._ended: set[int] = set()
        self._usage: Usage | None = None

    @property
    def tokens(self) -> int | None:
        """What it cost, as far as is known; None when no model took the call.

        A call that broke off is counted by its pieces, each of which holds at least one token.
        """
        return self.exchange.prompt_tokens + self.exchange.completion_tokens or None

    async def send(self, pieces: AsyncIterator[Piece], send: Send) -> None:
        """Answer with `pieces`, which are closed at the end.

        Raises:
            CallError: 504, before the first byte; later errors go into the stream.
        """
        try:
            async with asyncio.timeout(self.timeout_s), streams.closing(pieces):
                first = await streams.accepted(pieces)
                if first.usage is not None:
                    self.exchange.prompt_tokens = first.usage.prompt_tokens
                self.exchange.site = first.site or self.exchange.site
                if self.is_streamed:
                    await self._stream(pieces, send)
                else:
                    await self._collect(pieces, send)
        except TimeoutError:
            problem = timed_out("the whole answer", self.timeout_s, "request_timeout_s")
            if not self.exchange.status:
                raise problem from None
            await self._break_off(problem, send)
        except Exception as error:
            if not self.exchange.status:
                raise
            await self._break_off(error, send)
        finally:
            self._observe_gaps()

    async def _stream(self, pieces: AsyncIterator[Piece], send: Send) -> None:
        frames = Frames(
            is_chat=self.is_chat,
            identity=self._identity,
            created_s=self._created_s,
            model=self.model,
            include_usage=self.include_usage,
        )
        headers = {**_STREAM_HEADERS, **self.headers}
        pairs = [(name.encode(), value.encode("latin-1", "replace")) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": pairs})
        opening = b"".join(frames.opening(index) for index in range(self.num_choices)) if self.is_chat else b""
        await send({"type": "http.response.body", "body": opening, "more_body": True})
        async for piece in pieces:
            self._note(piece)
            if piece.text or piece.finish_reason or piece.logprobs:
                await send({"type": "http.response.body", "body": frames.piece(piece), "more_body": True})
        last = (frames.usage(self._whole_usage()) if self.include_usage else b"") + DONE
        self._whole_usage()
        await send({"type": "http.response.body", "body": last, "more_body": False})

    async def _collect(self, pieces: AsyncIterator[Piece], send: Send) -> None:
        choices = [Choice() for _ in range(self.num_choices)]
        async for piece in pieces:
            self._note(piece)
            choices[piece.index].add(piece)
        answer = whole(
            is_chat=self.is_chat,
            identity=self._identity,
            created_s=self._created_s,
            model=self.model,
            choices=choices,
            usage=self._whole_usage(),
        )
        headers = {"content-type": "application/json", **self.headers}
        await send_whole(send, 200, headers, json.dumps(answer).encode())

    async def _break_off(self, error: Exception, send: Send) -> None:
        problem = told(error, self.exchange)
        await send({"type": "http.response.body", "body": error_event(problem.body()), "more_body": False})

    def _note(self, piece: Piece) -> None:
        exchange = self.exchange
        if piece.text:
            if exchange.first_token_s is None:
                exchange.first_token_s = exchange.elapsed_s()
            self._num_pieces += 1
            exchange.completion_tokens = self._num_pieces
        if piece.finish_reason:
            self._ended.add(piece.index)
        if piece.usage is not None:
            self._usage = piece.usage

    def _whole_usage(self) -> Usage:
        """The usage of a call that was answered to its end."""
        if self._usage is None or len(self._ended) < self.num_choices:
            raise UnavailableError("the model stopped before the answer was whole", "try again")
        self.exchange.prompt_tokens = self._usage.prompt_tokens
        self.exchange.completion_tokens = self._usage.completion_tokens
        return self._usage

    def _observe_gaps(self) -> None:
        first = self.exchange.first_token_s
        if first is not None and self._num_pieces > 1:
            gap_s = (self.exchange.elapsed_s() - first) / (self._num_pieces - 1)
            self.metrics.between_tokens.labels(self.model).observe(gap_s)
