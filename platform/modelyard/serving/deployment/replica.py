"""A replica of a model's deployment: a model server behind Ray Serve."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

from modelyard.artifacts.registry import Registry
from modelyard.serving.autoscaling.serve import ReplicaStats
from modelyard.serving.deployment.config import ModelApp
from modelyard.serving.model_server import ModelServer
from modelyard.serving.protocol import EngineStats, Generation, Piece, Usage
from modelyard.serving.server_config import ServerConfig

INTERVAL_S = 0.02
"""Pieces of one stream that come closer together travel together; up to the first text each goes at once."""
logger = logging.getLogger(__name__)
_IDLE = EngineStats(0, 0, 0.0, 0, 0)
"""Of an engine that counts nothing: classifiers are scaled by how many calls there are."""


class ModelReplica:
    """Loads its model when it is made; Serve counts it as running from then on."""

    async def __init__(self, app: dict[str, Any]) -> None:  # type: ignore[misc]  # Serve awaits it
        config = ModelApp.model_validate(app)
        self._name = config.name
        self._stats = ReplicaStats(config.objective)
        model = config.model.with_changes(name=config.name)
        threads = max(1, int(config.placement.cpus))
        self._server = ModelServer(ServerConfig(models=(model,), threads=threads), Registry.from_settings())
        began = time.monotonic()
        await self._server.start()
        logger.info("%s is loaded in %.1f s", self._name, time.monotonic() - began)

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """What the deployment carries is for others to read."""

    async def generate(self, call: Generation) -> AsyncIterator[list[Piece]]:
        """See `Backend.generate`; lists of pieces."""
        began, first_at, prompt_tokens, usage = time.monotonic(), None, 0, None
        try:
            async with aclosing(self._server.generate(self._name, call)) as pieces:
                async for together in batched(pieces, INTERVAL_S):
                    for piece in together:
                        if piece.usage is not None:
                            usage = piece.usage
                    if usage is not None and not prompt_tokens:
                        prompt_tokens = usage.prompt_tokens
                        self._stats.accepted(prompt_tokens)
                    if first_at is None and any(piece.text for piece in together):
                        first_at = time.monotonic()
                        self._stats.first_token(first_at, first_at - began, prompt_tokens)
                    yield together
        finally:
            if prompt_tokens:
                now = time.monotonic()
                tokens = usage.completion_tokens if usage is not None else 0
                self._stats.finished(now, (now - (first_at or now)) / max(tokens - 1, 1))

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What the autoscaling policy hears of this replica."""
        engine = self._server.stats().get(self._name, _IDLE)
        return self._stats.metrics(engine, time.monotonic())

    async def embed(self, texts: Sequence[str | Sequence[int]]) -> tuple[list[list[float]], Usage]:
        """See `Backend.embed`."""
        return await self._server.embed(self._name, texts)

    async def predict(self, inputs: Sequence[Any]) -> list[Any]:
        """See `Backend.predict`."""
        return await self._server.predict(self._name, inputs)

    async def __del__(self) -> None:
        await self._server.close()


async def batched(pieces: AsyncIterator[Piece], interval_s: float) -> AsyncIterator[list[Piece]]:
    """Lists of what came since the last one: until the first text at once, then `interval_s` apart at least."""
    ready: list[Piece] = []
    news = asyncio.Event()
    ended: list[BaseException | None] = []

    async def collect() -> None:
        try:
            async for piece in pieces:
                ready.append(piece)
                news.set()
            ended.append(None)
        except BaseException as error:
            ended.append(error)
            raise
        finally:
            news.set()

    collecting = asyncio.create_task(collect())
    has_text = False
    try:
        while True:
            await news.wait()
            news.clear()
            if ready:
                together, ready[:] = list(ready), []
                yield together
                has_text = has_text or any(piece.text for piece in together)
                if has_text and not ended:
                    await asyncio.sleep(interval_s)
            if ended and not ready:
                break
        await collecting  # raises what ended it
    finally:
        collecting.cancel()
        await asyncio.gather(collecting, return_exceptions=True)
