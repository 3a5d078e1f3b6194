"""The two seams of serving, as plain data: gateway -> model server (text), model server -> engine (tokens).

A gateway knows callers, limits and the OpenAI API, but no tokenizer; it sends a `Generation` (or texts to embed, or
inputs to predict) to a `Backend`, which is a Ray Serve handle in production and a model server in the same process in
a test. A model server knows tokenizers and chat templates; it sends token ids to an `Engine` and turns the tokens that
come back into text. An engine knows neither text nor callers: token ids in, token ids out.

Closing an async iterator of either seam cancels the work behind it and frees its slot.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

FinishReason = Literal["stop", "length"]
OnSite = Callable[[str], None]
"""Told where a call is answered, if the backend knows; the gateway sends it as `X-Modelyard-Site`."""
Feature = Literal["logprobs", "top_logprobs", "seed", "json_schema"]
"""`logprobs`: of the chosen token; `top_logprobs`: of the likeliest ones beside it."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen; `temperature` 0 is greedy."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """Sample from the k likeliest only; 0 from all."""
    seed: int | None = None
    """Same seed, same prompt, same model: same tokens."""
    top_logprobs: int | None = None
    """None: no log probabilities; 0: of the chosen token; n: of the n likeliest beside it."""
    json_schema: Mapping[str, Any] | None = None
    """Only text that parses as JSON of this schema, where the engine can (`Engine.features`)."""


@dataclass(frozen=True)
class EngineRequest:
    """One sequence to continue."""

    request_id: str
    prompt_ids: Sequence[int]
    sampling: Sampling


@dataclass(frozen=True)
class TokenLogprob:
    """A token, its log probability (nats), and the likeliest tokens at its place, itself maybe among them."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Tokens:
    """The next tokens of a sequence; the last item of a stream carries `finish_reason`, the others None.

    The end-of-sequence token ends the stream with `stop` and is not among the ids.
    """

    ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class EngineStats:
    """A moment of an engine, for autoscaling and metrics."""

    running: int
    """Sequences that get tokens now."""
    waiting: int
    """Sequences that were taken in and have no place yet."""
    cache_usage: float
    """Share of the key-value cache in use, 0 to 1."""
    prompt_tokens: int
    """Prompt tokens read since the engine started."""
    generated_tokens: int
    """Tokens generated since the engine started."""


class Engine(Protocol):
    """Continues token sequences, many at once."""

    @property
    def name(self) -> str:
        """The engine's name, as in `serve status`."""
        ...

    @property
    def features(self) -> frozenset[Feature]:
        """What it can do beyond plain sampling; a request for anything else is refused before it gets here."""
        ...

    @property
    def context_tokens(self) -> int:
        """Most tokens of prompt and answer together."""
        ...

    def stream(self, request: EngineRequest) -> AsyncIterator[Tokens]:
        """The answer as it comes; closing the iterator frees the slot."""
        ...

    def stats(self) -> EngineStats:
        """Where it stands now; cheap, callable from any thread."""
        ...

    async def close(self) -> None:
        """Stop and free the memory; running streams end with an error."""
        ...


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One call for text: a chat or a prompt, and how to answer it."""

    request_id: str
    sampling: Sampling
    messages: Sequence[Mapping[str, Any]] | None = None
    """A chat in OpenAI's form, put through the model's chat template; or"""
    prompt: str | Sequence[int] | None = None
    """a text, or its token ids."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer and are not part of it."""
    num_choices: int = 1
    echo: bool = False
    """Whether a completion's answer begins with its prompt."""
    site: str | None = None
    """Where the caller is at home; a router prefers that site."""
    is_streamed: bool = True
    """Whether the caller sees pieces as they come. If not, a lost replica is made good for without his noticing."""


@dataclass(frozen=True)
class TextLogprob:
    """`TokenLogprob` in text: the token as text and bytes."""

    token: str
    token_bytes: bytes
    logprob: float
    top: tuple[tuple[str, bytes, float], ...] = ()


@dataclass(frozen=True)
class Usage:
    """What a call cost."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Piece:
    """The next text of one choice. A choice's last piece has a `finish_reason`; a call's last piece has `usage`.

    The first piece of a call has no text and carries the usage of the prompt, so that a gateway knows at once that
    the call was accepted.
    """

    index: int
    text: str
    logprobs: tuple[TextLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    site: str | None = None
    """On the first piece, where it is answered, if the backend knows; the gateway sends it as `X-Modelyard-Site`."""


@dataclass(frozen=True)
class ServedModel:
    """A model as the gateway lists it."""

    name: str
    """What callers write into `model`."""
    reference: str
    """The artifact: `models:/tiny-gpt/3`."""
    task: str
    """`causal_lm`, `image_classification`, ..."""
    engine: str
    created_s: int
    """Unix time of the artifact."""
    context_tokens: int | None = None
    features: frozenset[str] = field(default_factory=frozenset)


class Backend(Protocol):
    """What answers behind the gateway.

    Raises:
        InputError: the call can never work: the prompt is longer than the context, an image that is none.
        NotFoundError: no such model.
        OverloadedError: too many calls wait; says after how many seconds to come back.
        UnavailableError: nothing that serves this model is running now.
    """

    async def models(self) -> Sequence[ServedModel]:
        """All models that can be asked."""
        ...

    def generate(self, model: str, call: Generation) -> AsyncIterator[Piece]:
        """Text, piece by piece; closing the iterator cancels."""
        ...

    async def embed(
        self,
        model: str,
        texts: Sequence[str | Sequence[int]],
        *,
        site: str | None = None,
        on_site: OnSite | None = None,
    ) -> tuple[list[list[float]], Usage]:
        """One unit vector for each text, or sequence of token ids. `site`: as in `Generation`."""
        ...

    async def predict(
        self, model: str, inputs: Sequence[Any], *, site: str | None = None, on_site: OnSite | None = None
    ) -> list[Any]:
        """An answer for each input of the other tasks (images as numpy arrays (H, W) or (H, W, C) uint8)."""
        ...
