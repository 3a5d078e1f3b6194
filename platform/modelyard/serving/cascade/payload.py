"""How many bytes go up and come down: inputs, prompts and answers as such, without framing or compression."""

from __future__ import annotations

import json
from typing import Any

from modelyard.serving.protocol import Generation


def input_bytes(value: Any) -> int:
    """Of one input of `predict`: an array as it is, anything else as JSON."""
    size = getattr(value, "nbytes", None)
    if isinstance(size, int):
        return size
    return len(value) if isinstance(value, bytes) else len(_json(value))


def answer_bytes(answer: Any) -> int:
    """Of one answer of `predict`, as JSON."""
    return len(_json(answer))


def prompt_bytes(call: Generation) -> int:
    """Of a chat or a prompt: text in UTF-8, a chat and token ids as JSON."""
    if call.messages is not None:
        return len(_json([dict(message) for message in call.messages]))
    return len(call.prompt.encode()) if isinstance(call.prompt, str) else len(_json(list(call.prompt or ())))


def _json(value: Any) -> bytes:
    plain = json.dumps(value, default=lambda held: held.tolist() if hasattr(held, "tolist") else str(held))
    return plain.encode()
