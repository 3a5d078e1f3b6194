"""A backend in this process that answers by rule, token by token, as slowly as a test wants."""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import numpy as np

from modelyard.errors import InputError, NotFoundError
from modelyard.serving.protocol import Generation, OnSite, Piece, ServedModel, TextLogprob, Usage

WORDS = ("gear ", "belt ", "cam ", "rod ", "nut ", "axle ", "weld ", "shim ")
CONTEXT_TOKENS = 2_000


def served(name: str, task: str = "causal_lm", features: Sequence[str] = ()) -> ServedModel:
    """A model of the list."""
    context = CONTEXT_TOKENS if task == "causal_lm" else None
    return ServedModel(name, f"models:/{name}/1", task, "rule", 1_700_000_000, context, frozenset(features))


class RuleBackend:
    """The words of an answer follow from prompt, seed and choice; a prompt has as many tokens as words."""

    def __init__(self, *, delay_s: float = 0.0) -> None:
        """Wait `delay_s` before each token."""
        self.delay_s = delay_s
        self.error: Exception | None = None
        self.error_after_tokens = 0
        self.breaks_off = False
        """End the stream without a finish reason or a usage."""
        self.running = 0
        """Calls that were begun and not yet ended or closed."""
        self.begun = 0
        self.generations: list[Generation] = []
        self.inputs: list[Any] = []
        self.site: str | None = None
        """Where it says that it answered."""
        self.asked_site: str | None = None
        """The site that the last embedding or prediction asked for."""
        self.list = [
            served("tiny-gpt", features=("logprobs", "top_logprobs", "seed", "json_schema")),
            served("tiny-plain"),
            served("minilm", "embedding"),
            served("digits", "image_classification"),
        ]

    async def models(self) -> Sequence[ServedModel]:
        """The list, as it is now."""
        return self.list

    async def generate(self, model: str, call: Generation) -> AsyncGenerator[Piece, None]:
        """Words up to the stop or the length; all choices in turn, a token each."""
        self.running += 1
        self.begun += 1
        self.generations.append(call)
        try:
            self._known(model)
            self._raise_after(0)
            prompt = prompt_of(call)
            size = len(prompt.split()) if isinstance(prompt, str) else len(prompt)
            if size > CONTEXT_TOKENS:
                raise InputError(f"the prompt has {size} tokens, the context {CONTEXT_TOKENS}", "shorten it")
            yield Piece(0, "", usage=Usage(size, 0), site=self.site)
            texts = [str(prompt) if call.echo else ""] * call.num_choices
            done, tokens = [False] * call.num_choices, 0
            for number in range(call.sampling.max_tokens):
                for choice in [index for index, ended in enumerate(done) if not ended]:
                    await asyncio.sleep(self.delay_s)
                    tokens += 1
                    self._raise_after(tokens)
                    word = word_at(str(prompt), call.sampling.seed, choice, number)
                    before, texts[choice] = texts[choice], texts[choice] + word
                    cut = min((at for stop in call.stop if (at := texts[choice].find(stop)) >= 0), default=None)
                    is_last = cut is not None or number + 1 == call.sampling.max_tokens
                    done[choice] = is_last
                    if self.breaks_off and all(done):
                        return
                    sent = texts[choice][len(before) if number else 0 : cut]
                    yield Piece(
                        choice,
                        sent,
                        logprobs=self._logprobs(call, sent if number else sent[len(before) :]),
                        finish_reason=("length" if cut is None else "stop") if is_last else None,
                        usage=Usage(size, tokens) if all(done) else None,
                    )
                if all(done):
                    return
        finally:
            self.running -= 1

    async def embed(
        self,
        model: str,
        texts: Sequence[str | Sequence[int]],
        *,
        site: str | None = None,
        on_site: OnSite | None = None,
    ) -> tuple[list[list[float]], Usage]:
        """Three numbers of unit length from each text's length."""
        async with _counted(self):
            self._tell_site(site, on_site)
            self._known(model)
            self._raise_after(0)
            await asyncio.sleep(self.delay_s)
            angles = [float(len(text)) for text in texts]
            return [[math.cos(a), math.sin(a), 0.0] for a in angles], Usage(sum(len(t) for t in texts), 0)

    async def predict(
        self, model: str, inputs: Sequence[Any], *, site: str | None = None, on_site: OnSite | None = None
    ) -> list[Any]:
        """The mean of each picture."""
        async with _counted(self):
            self._tell_site(site, on_site)
            self._known(model)
            self._raise_after(0)
            await asyncio.sleep(self.delay_s)
            self.inputs = list(inputs)
            try:
                arrays = [np.asarray(item, dtype=np.uint8) for item in inputs]
            except (TypeError, ValueError, OverflowError) as error:
                raise InputError("an input holds something that is no small number", "send numbers") from error
            if not all(array.size for array in arrays):
                raise InputError("an input is empty", "send numbers")
            return [{"label": int(a.mean()), "shape": list(a.shape), "score": np.float32(0.5)} for a in arrays]

    def _tell_site(self, asked: str | None, on_site: OnSite | None) -> None:
        self.asked_site = asked
        if self.site is not None and on_site is not None:
            on_site(self.site)

    def _known(self, model: str) -> None:
        if model not in [one.name for one in self.list]:
            raise NotFoundError(f"there is no model {model!r}")

    def _raise_after(self, tokens: int) -> None:
        if self.error is not None and tokens >= self.error_after_tokens:
            raise self.error

    @staticmethod
    def _logprobs(call: Generation, text: str) -> tuple[TextLogprob, ...]:
        count = call.sampling.top_logprobs
        if count is None:
            return ()
        top = tuple((WORDS[i], WORDS[i].encode(), -0.5 - i) for i in range(count))
        return (TextLogprob(text, text.encode(), -0.25, top),)


class _counted:  # noqa: N801  (reads as a phrase: `async with _counted(self)`)
    def __init__(self, backend: RuleBackend) -> None:
        self._backend = backend

    async def __aenter__(self) -> None:
        self._backend.running += 1
        self._backend.begun += 1

    async def __aexit__(self, *_: object) -> None:
        self._backend.running -= 1


def prompt_of(call: Generation) -> str | Sequence[int]:
    """The prompt, or the chat as one text."""
    if call.prompt is not None:
        return call.prompt
    return "\n".join(f"{message['role']} {message['content']}" for message in call.messages or ())


def word_at(prompt: str, seed: int | None, choice: int, number: int) -> str:
    """The rule."""
    digest = hashlib.sha256(f"{prompt}|{seed}|{choice}|{number}".encode()).digest()
    return WORDS[digest[0] % len(WORDS)]


def answer_to(prompt: str, tokens: int, *, seed: int | None = None, choice: int = 0) -> str:
    """What `RuleBackend` says."""
    return "".join(word_at(prompt, seed, choice, number) for number in range(tokens))
