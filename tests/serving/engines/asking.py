"""How the tests of engines ask: token ids in, token ids out."""

from __future__ import annotations

from typing import Any

from modelyard.serving.engines.threaded import ThreadedEngine
from modelyard.serving.protocol import EngineRequest, Sampling, Tokens

TOKENS = 24
PROMPTS = [[3 + (7 * i + 5 * j) % 250 for j in range(4 + 9 * (i % 5))] for i in range(16)]


def asking(prompt: list[int], **sampling: Any) -> EngineRequest:
    """A greedy request for `TOKENS` tokens, unless told otherwise."""
    return EngineRequest("r", prompt, Sampling(**{"max_tokens": TOKENS, "temperature": 0.0, **sampling}))


async def answer(engine: ThreadedEngine, request: EngineRequest) -> list[Tokens]:
    """All that comes."""
    return [tokens async for tokens in engine.stream(request)]


def ids(answer: list[Tokens]) -> list[int]:
    """Its token ids."""
    return [token for tokens in answer for token in tokens.ids]
