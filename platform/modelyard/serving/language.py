"""A language model that is loaded: calls in text come in, an engine continues tokens, pieces of text go out."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from modelyard.errors import InputError, OverloadedError
from modelyard.serving.engines.threaded import ThreadedEngine
from modelyard.serving.protocol import (
    Engine,
    EngineRequest,
    Feature,
    FinishReason,
    Generation,
    Piece,
    Sampling,
    TextLogprob,
    TokenLogprob,
    Usage,
)
from modelyard.serving.text import AnswerText, TokenBytes

_RETRY_AFTER_S = 1.0


class LanguageModel:
    """A tokenizer with an engine."""

    def __init__(self, name: str, tokenizer: Any, engine: Engine, *, max_sequences: int) -> None:
        """Take over an engine.

        Args:
            name: how errors call the model.
            tokenizer: the Hugging Face tokenizer of the model's folder.
            engine: closed by `close`.
            max_sequences: most sequences that are taken in; more are refused until some have ended.
        """
        self.name = name
        self.engine = engine
        self._tokenizer = tokenizer
        self._token_bytes = functools.lru_cache(1 << 16)(TokenBytes(tokenizer))
        self._max_sequences = max_sequences
        self._sequences = 0

    async def generate(self, call: Generation) -> AsyncGenerator[Piece, None]:
        """The answer to a call; see `Backend.generate`."""
        sampling = self._checked(call)
        ids, stops = await asyncio.to_thread(self._prompt, call)
        room = self.engine.context_tokens - len(ids)
        if room < 1:
            raise InputError(
                f"the prompt has {len(ids)} tokens, model {self.name!r} takes {self.engine.context_tokens} "
                "together with the answer",
                f"shorten it by {1 - room} tokens or more",
            )
        sampling = replace(sampling, max_tokens=min(sampling.max_tokens, room))
        with self._places(call.num_choices):
            yield Piece(0, "", usage=Usage(len(ids), 0))
            async with contextlib.aclosing(self._choices(call, ids, stops, sampling)) as pieces:
                async for piece in pieces:
                    yield piece

    async def embed(self, texts: Sequence[str | Sequence[int]]) -> tuple[list[list[float]], Usage]:
        """The mean of the last layer's states over a text's tokens, at length 1; see `Backend.embed`.

        A language model was not trained for this: near texts come out near, but an encoder does it better.
        """
        if not isinstance(self.engine, ThreadedEngine) or not self.gives_embeddings:
            raise InputError(
                f"model {self.name!r} runs on the engine {self.engine.name}, which gives no embeddings",
                "serve it with `engine: transformers`",
            )
        encoded = await asyncio.to_thread(lambda: [self._ids(text) for text in texts])
        for number, ids in enumerate(encoded):
            if not 0 < len(ids) <= self.engine.context_tokens:
                raise InputError(
                    f"text {number} has {len(ids)} tokens, where 1 to {self.engine.context_tokens} are possible"
                )
        with self._places(1):
            vectors = []
            for ids in encoded:  # one by one, so that answers go on in between
                vectors.append(await self.engine.run(functools.partial(_embed, ids)))
        return vectors, Usage(sum(map(len, encoded)), 0)

    @property
    def gives_embeddings(self) -> bool:
        """Whether `embed` works with this engine."""
        return self.engine.name == "transformers"

    async def close(self) -> None:
        """Free the engine's memory."""
        await self.engine.close()

    def _checked(self, call: Generation) -> Sampling:
        sampling = call.sampling
        wanted: dict[Feature, bool] = {
            "logprobs": sampling.top_logprobs is not None,
            "top_logprobs": bool(sampling.top_logprobs),
            "seed": sampling.seed is not None and sampling.temperature > 0,
            "json_schema": sampling.json_schema is not None,
        }
        for feature, is_wanted in wanted.items():
            if is_wanted and feature not in self.engine.features:
                raise InputError(
                    f"model {self.name!r} runs on the engine {self.engine.name}, which has no {feature}",
                    "leave it out of the call, or serve the model with another engine",
                )
        if sampling.max_tokens < 1:
            raise InputError(f"max_tokens={sampling.max_tokens} is below 1")
        return sampling

    @contextlib.contextmanager
    def _places(self, count: int) -> Any:
        if self._sequences and self._sequences + count > self._max_sequences:
            raise OverloadedError(
                f"model {self.name!r} has {self._sequences} sequences, {self._max_sequences} is the most",
                _RETRY_AFTER_S,
            )
        self._sequences += count
        try:
            yield
        finally:
            self._sequences -= count

    def _prompt(self, call: Generation) -> tuple[list[int], tuple[str, ...]]:
        """Token ids, and the texts that end the answer."""
        if call.messages is not None:
            return chat_ids(self._tokenizer, call.messages, call.stop)
        if call.prompt is None:
            raise InputError("the call has neither messages nor a prompt")
        ids = self._ids(call.prompt)
        if not ids:
            raise InputError("the prompt is empty", "give at least one character")
        return ids, call.stop

    def _ids(self, text: str | Sequence[int]) -> list[int]:
        if isinstance(text, str):
            return list(self._tokenizer(text).input_ids)
        known = len(self._tokenizer)
        if wrong := next((number for number in text if not 0 <= number < known), None):
            raise InputError(f"token {wrong} is none of model {self.name!r}, which has 0 to {known - 1}")
        return list(text)

    async def _choices(
        self, call: Generation, ids: list[int], stops: tuple[str, ...], sampling: Sampling
    ) -> AsyncGenerator[Piece, None]:
        """The pieces of all choices as they come; the last one carries the usage."""
        prefix = self._prefix(call, ids)
        queue: asyncio.Queue[_Step | Exception] = asyncio.Queue()

        async def pump(index: int) -> None:
            try:
                steps = self._answer(call, ids, stops, _numbered(sampling, index), index, prefix)
                async with contextlib.aclosing(steps):
                    async for step in steps:
                        queue.put_nowait(step)
            except Exception as error:  # noqa: BLE001  (raised again by the reader of the queue)
                queue.put_nowait(error)

        tasks = [asyncio.create_task(pump(index)) for index in range(call.num_choices)]
        running, generated = call.num_choices, 0
        try:
            while running:
                item = await queue.get()
                if isinstance(item, Exception):
                    raise item
                generated += item.tokens
                running -= item.piece.finish_reason is not None
                usage = None if running else Usage(len(ids), generated)
                yield replace(item.piece, usage=usage)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)  # their slots are free when this returns

    def _prefix(self, call: Generation, ids: list[int]) -> str:
        if not call.echo:
            return ""
        return call.prompt if isinstance(call.prompt, str) else self._tokenizer.decode(ids, skip_special_tokens=True)

    async def _answer(
        self, call: Generation, ids: list[int], stops: tuple[str, ...], sampling: Sampling, index: int, prefix: str
    ) -> AsyncGenerator[_Step, None]:
        answer = AnswerText(self._tokenizer, stops)
        if prefix:
            yield _Step(Piece(index, prefix), 0)
        request = EngineRequest(f"{call.request_id}-{index}", ids, sampling)
        async with contextlib.aclosing(self.engine.stream(request)) as stream:  # type: ignore[type-var]
            async for tokens in stream:
                text, logprobs = answer.add(tokens)
                reason: FinishReason | None = "stop" if answer.stopped else tokens.finish_reason
                if reason is not None and not answer.stopped:
                    rest, more = answer.finish()
                    text, logprobs = text + rest, logprobs + more
                    reason = "stop" if answer.stopped else reason
                if text or logprobs or reason or tokens.ids:
                    shown = tuple(self._in_text(logprob) for logprob in logprobs)
                    yield _Step(Piece(index, text, shown, reason), len(tokens.ids))
                if reason is not None:
                    return

    def _in_text(self, logprob: TokenLogprob) -> TextLogprob:
        text, data = self._token_bytes(logprob.token_id)
        top = tuple((*self._token_bytes(token_id), value) for token_id, value in logprob.top)
        return TextLogprob(text, data, logprob.logprob, top)


@dataclass(frozen=True)
class _Step:
    piece: Piece
    tokens: int
    """Tokens behind it; a piece may be empty while a character is unfinished."""


def chat_ids(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], stops: tuple[str, ...] = ()
) -> tuple[list[int], tuple[str, ...]]:
    """A chat by the model's own template, with the beginning of the assistant's answer.

    A model without a template was not trained on chats; it gets `role: content` lines, and its answer ends where it
    would go on with the user's part.

    Returns:
        Token ids, and the texts that end the answer.

    Raises:
        InputError: a message has content other than text, or the template refuses the chat.
    """
    plain = [{**message, "content": _text_of(message)} for message in messages]
    if not plain:
        raise InputError("the chat has no messages", "give at least one")
    if tokenizer.chat_template is None:
        lines = [f"{message.get('role', 'user')}: {message['content']}\n" for message in plain]
        return list(tokenizer("".join(lines) + "assistant:").input_ids), (*stops, "\nuser:")
    from jinja2 import TemplateError

    try:
        ids = tokenizer.apply_chat_template(plain, add_generation_prompt=True, tokenize=True, return_dict=False)
    except (TemplateError, TypeError, KeyError) as error:
        raise InputError(f"the model's chat template refuses these messages: {error}") from error
    return list(ids), stops


def _text_of(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if content is None or isinstance(content, str):
        return content or ""
    parts = []
    for part in content:
        if part.get("type") != "text":
            raise InputError(f"a message has a part of type {part.get('type')!r}, this model reads text only")
        parts.append(str(part.get("text", "")))
    return "".join(parts)


def _numbered(sampling: Sampling, index: int) -> Sampling:
    """Choices of one call differ: each draws with a seed of its own."""
    return sampling if sampling.seed is None else replace(sampling, seed=sampling.seed + index)


def _embed(ids: list[int], core: Any) -> Any:
    return core.embed(ids)
