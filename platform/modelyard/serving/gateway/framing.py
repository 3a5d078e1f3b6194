"""Answers as OpenAI writes them. A stream's frames are built from bytes made once: a piece costs one string escape."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from json.encoder import encode_basestring_ascii as quoted
from typing import Any

from modelyard.serving.protocol import Piece, TextLogprob, Usage

DONE = b"data: [DONE]\n\n"


class Frames:
    """Builds the events of one stream."""

    def __init__(self, *, is_chat: bool, identity: str, created_s: int, model: str, include_usage: bool) -> None:
        """Everything that is the same in each frame is made here."""
        kind = "chat.completion.chunk" if is_chat else "text_completion"
        self._is_chat = is_chat
        self._sent: dict[int, int] = {}  # characters of each choice so far
        usage = ',"usage":null' if include_usage else ""
        self._head = f'data: {{"id":{quoted(identity)},"object":"{kind}","created":{created_s},"model":{quoted(model)}'
        self._middle = f'{self._head}{usage},"choices":[{{"index":'

    def opening(self, index: int) -> bytes:
        """The first event of a chat's choice: who speaks."""
        return (
            f'{self._middle}{index},"delta":{{"role":"assistant","content":""}},"logprobs":null,'
            '"finish_reason":null}]}\n\n'
        ).encode()

    def piece(self, piece: Piece) -> bytes:
        """A piece of text, or the end of a choice."""
        finish = f'"{piece.finish_reason}"' if piece.finish_reason else "null"
        logprobs = "null"
        if self._is_chat:
            if piece.logprobs:
                logprobs = json.dumps(chat_logprobs(piece.logprobs))
            delta = f'"delta":{{"content":{quoted(piece.text)}}}' if piece.text or piece.logprobs else '"delta":{}'
        else:
            sent = self._sent.get(piece.index, 0)
            self._sent[piece.index] = sent + len(piece.text)
            if piece.logprobs:
                logprobs = json.dumps(completion_logprobs(piece.logprobs, first_offset(piece, sent)))
            delta = f'"text":{quoted(piece.text)}'
        return f'{self._middle}{piece.index},{delta},"logprobs":{logprobs},"finish_reason":{finish}}}]}}\n\n'.encode()

    def usage(self, usage: Usage) -> bytes:
        """The last event before the end, when the caller asked for it."""
        return f'{self._head},"choices":[],"usage":{json.dumps(usage_object(usage))}}}\n\n'.encode()


def error_event(body: bytes) -> bytes:
    """An error in a stream that has begun; nothing follows it."""
    return b"data: " + body + b"\n\n"


@dataclass
class Choice:
    """One choice of an answer that is not streamed, as it grows."""

    texts: list[str] = field(default_factory=list)
    logprobs: list[TextLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    offset: int = 0
    """Characters before the first token with a log probability: those of an echoed prompt."""

    def add(self, piece: Piece) -> None:
        """The next piece."""
        if piece.logprobs and not self.logprobs:
            self.offset = first_offset(piece, sum(map(len, self.texts)))
        self.texts.append(piece.text)
        self.logprobs.extend(piece.logprobs)
        self.finish_reason = piece.finish_reason or self.finish_reason


def whole(
    *, is_chat: bool, identity: str, created_s: int, model: str, choices: Sequence[Choice], usage: Usage
) -> dict[str, Any]:
    """An answer in one object."""
    listed: list[dict[str, Any]] = []
    for index, choice in enumerate(choices):
        text = "".join(choice.texts)
        entry: dict[str, Any] = {"index": index, "finish_reason": choice.finish_reason, "logprobs": None}
        if is_chat:
            entry["message"] = {"role": "assistant", "content": text, "refusal": None}
            if choice.logprobs:
                entry["logprobs"] = chat_logprobs(choice.logprobs)
        else:
            entry["text"] = text
            if choice.logprobs:
                entry["logprobs"] = completion_logprobs(choice.logprobs, choice.offset)
        listed.append(entry)
    return {
        "id": identity,
        "object": "chat.completion" if is_chat else "text_completion",
        "created": created_s,
        "model": model,
        "choices": listed,
        "usage": usage_object(usage),
    }


def usage_object(usage: Usage) -> dict[str, int]:
    """Tokens as OpenAI names them."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def chat_logprobs(items: Iterable[TextLogprob]) -> dict[str, Any]:
    """Log probabilities in the form of chats."""
    return {
        "content": [
            {
                **_token(item.token, item.token_bytes, item.logprob),
                "top_logprobs": [_token(*one) for one in item.top],
            }
            for item in items
        ],
        "refusal": None,
    }


def first_offset(piece: Piece, before: int) -> int:
    """Where the first token of `piece` begins, `before` characters after the start: a prompt may stand before it."""
    return before + max(0, len(piece.text) - sum(len(item.token) for item in piece.logprobs))


def completion_logprobs(items: Sequence[TextLogprob], offset: int) -> dict[str, Any]:
    """Log probabilities in the form of completions; `offset`: characters of the choice before these."""
    offsets = []
    for item in items:
        offsets.append(offset)
        offset += len(item.token)
    return {
        "tokens": [item.token for item in items],
        "token_logprobs": [item.logprob for item in items],
        "top_logprobs": [{token: logprob for token, _, logprob in item.top} for item in items],
        "text_offset": offsets,
    }


def _token(token: str, token_bytes: bytes, logprob: float) -> dict[str, Any]:
    return {"token": token, "bytes": list(token_bytes), "logprob": max(logprob, -9999.0)}  # JSON has no -Infinity
