"""One cascade at work: two models, asked one after the other."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from modelyard.errors import ConfigError, InputError, NotFoundError, OverloadedError, UnavailableError
from modelyard.serving.cascade.confidence import keeps, of_logprobs, raw_probability, softened
from modelyard.serving.cascade.config import CascadeConfig
from modelyard.serving.cascade.counters import Counters
from modelyard.serving.cascade.payload import answer_bytes, input_bytes, prompt_bytes
from modelyard.serving.protocol import Backend, Generation, Piece

logger = logging.getLogger(__name__)
UNSURE = ";unsure"
"""After the site of a text that the small model was unsure of, when the large one could not be reached."""
_GONE = (UnavailableError, OverloadedError, NotFoundError)


class Pair:
    """A small and a large model. `refusal` says why the calibration does not count; everything then goes up."""

    def __init__(self, config: CascadeConfig, backend: Backend, cloud: Backend) -> None:
        """Ask `backend` for the small model and `cloud` for the large one."""
        self.config = config
        self.counters = Counters()
        self.refusal: ConfigError | None = None
        self._backend, self._cloud = backend, cloud
        self._paused_until_s = 0.0

    async def predict(self, inputs: Sequence[Any], site: str | None = None) -> list[Any]:
        """An answer for each input, with `site`; those that the small model is unsure of go up together."""
        self._require(is_text=False)
        config, counters = self.config, self.counters
        small = _Asked(self._backend, config.small, config.small_site, "small_timeout_s")
        large = _Asked(self._cloud, config.large, config.large_site, "large_timeout_s")
        answers: list[Any] | None = None
        failure: Exception | None = None
        if not self._sends_all:
            try:
                answers = await self._predicted(small, inputs, site)
            except _GONE as error:
                failure = error
        up = [n for n in range(len(inputs)) if answers is None or not self._stays(answers[n])]
        better = await self._predicted_above(large, [inputs[n] for n in up], site, failure) if up else []
        marked: dict[int, Any] = {}
        if better is not None:
            marked = {n: _at(answer, large.site) for n, answer in zip(up, better, strict=True)}
        if answers is None and len(marked) < len(inputs):
            answers = await self._predicted(small, inputs, site)
        for n, answer in enumerate(answers or []):
            if n not in marked:
                marked[n] = _at(answer, small.site, unsure=better is None and n in up)
        counters.answered += len(inputs)
        counters.unsure += len(up) if better is None else 0
        counters.small_failed += len(inputs) if failure is not None else 0
        return [marked[n] for n in range(len(inputs))]

    async def generate(self, call: Generation) -> AsyncGenerator[Piece, None]:
        """The text of one of the models; the small one's is held back until it is decided on."""
        self._require(is_text=True)
        asked = call
        if call.sampling.top_logprobs is None:
            asked = replace(call, sampling=replace(call.sampling, top_logprobs=0))
        answer = _Answer(self._backend.generate(self.config.small, asked), keeps_logprobs=asked is call)
        async with contextlib.aclosing(answer):
            failure: Exception | None = None
            stays = False
            if not self._sends_all:
                try:
                    stays = await self._decided(answer, call.num_choices)
                except (InputError, UnavailableError, OverloadedError) as error:
                    failure = error  # a prompt too long for the small model may fit the large one
            if not stays:
                async with contextlib.aclosing(self._generated_above(call, failure)) as above:
                    if (first := await anext(above, None)) is not None:
                        await answer.aclose()
                        self.counters.answered += 1
                        self.counters.small_failed += failure is not None
                        yield first
                        async for piece in above:
                            yield piece
                        return
            async with contextlib.aclosing(answer.pieces()) as pieces:
                if (first := await anext(pieces, None)) is None:
                    raise UnavailableError("the small model gave no answer", "try again")
                self.counters.answered += 1
                self.counters.unsure += not stays
                site = first.site or self.config.small_site
                yield replace(first, site=site if stays else site + UNSURE)
                async for piece in pieces:
                    yield piece

    def _require(self, *, is_text: bool) -> None:
        gives_text = self.config.calibration.score.is_text
        if gives_text != is_text:
            raise InputError(
                f"model {self.config.name!r} gives no {'text' if is_text else 'predictions'}",
                f"ask it for {'text' if gives_text else 'predictions'}",
            )

    @property
    def _sends_all(self) -> bool:
        return self.refusal is not None or self.config.limit >= 1

    def _stays(self, answer: Any) -> bool:
        return keeps(softened(raw_probability(answer), self.config.calibration.temperature), self.config.limit)

    async def _predicted(self, asked: _Asked, inputs: Sequence[Any], site: str | None) -> list[Any]:
        async with self._within(asked.model, asked.setting):
            answers = await asked.backend.predict(asked.model, inputs, site=site, on_site=asked.on_site)
        if len(answers) != len(inputs):
            raise UnavailableError(f"model {asked.model!r} gave {len(answers)} answers to {len(inputs)} inputs")
        return answers

    async def _predicted_above(
        self, large: _Asked, inputs: Sequence[Any], site: str | None, failure: Exception | None
    ) -> list[Any] | None:
        """The large model's answers; None when it cannot be reached and the small one has answered."""
        if failure is None and self._is_paused:
            return None
        self.counters.bytes_up += sum(map(input_bytes, inputs))
        try:
            answers = await self._predicted(large, inputs, site)
        except _GONE as error:
            self._pause(error)
            if failure is not None:
                raise error from failure
            return None
        self.counters.bytes_down += sum(map(answer_bytes, answers))
        self.counters.sent_up += len(answers)
        return answers

    async def _decided(self, answer: _Answer, num_choices: int) -> bool:
        score = self.config.calibration.score
        async with self._within(self.config.small, "small_timeout_s"):
            logprobs = await answer.decidable(num_choices, score.first_tokens)
        confidence = min(of_logprobs(score, values) for values in logprobs)
        return keeps(confidence, self.config.limit)

    async def _generated_above(self, call: Generation, failure: Exception | None) -> AsyncGenerator[Piece, None]:
        """The large model's answer; empty when it cannot be reached and the small one has begun an answer."""
        if failure is None and self._is_paused:
            return
        self.counters.bytes_up += prompt_bytes(call)
        pieces = self._cloud.generate(self.config.large, call)
        async with contextlib.aclosing(pieces):  # type: ignore[type-var]
            try:
                async with self._within(self.config.large, "large_timeout_s"):
                    begun = await _begun(pieces, whole=not call.is_streamed)
            except _GONE as error:
                self._pause(error)
                if failure is not None:
                    raise error from failure
                return
            self.counters.sent_up += 1
            begun[0] = replace(begun[0], site=begun[0].site or self.config.large_site)
            for piece in begun:
                self.counters.bytes_down += len(piece.text.encode())
                yield piece
            async for piece in pieces:
                self.counters.bytes_down += len(piece.text.encode())
                yield piece

    @contextlib.asynccontextmanager
    async def _within(self, model: str, setting: str) -> AsyncGenerator[None, None]:
        seconds: float = getattr(self.config, setting)
        try:
            async with asyncio.timeout(seconds):
                yield
        except TimeoutError:
            raise UnavailableError(
                f"model {model!r} was silent for {seconds:g} s", f"if it only needs longer, raise {setting}"
            ) from None

    @property
    def _is_paused(self) -> bool:
        return time.monotonic() < self._paused_until_s

    def _pause(self, error: Exception) -> None:
        logger.warning("cascade %s: the large model cannot be reached: %s", self.config.name, error)
        self._paused_until_s = time.monotonic() + self.config.large_pause_s


@dataclass
class _Asked:
    """One of the two models, as it is asked for predictions."""

    backend: Backend
    model: str
    site: str
    """Where it answers, unless its backend says."""
    setting: str
    """The config's field for its timeout."""

    def on_site(self, site: str) -> None:
        """The backend says where."""
        self.site = site


class _Answer:
    """The small model's text, held until somebody reads it."""

    def __init__(self, source: AsyncIterator[Piece], *, keeps_logprobs: bool) -> None:
        self._source = source
        self._keeps_logprobs = keeps_logprobs
        self._held: list[Piece] = []

    async def decidable(self, num_choices: int, first_tokens: int | None) -> list[list[float]]:
        """The log probabilities of each choice, when each has enough tokens or has ended.

        Raises:
            UnavailableError: it broke off.
            what the model raises.
        """
        logprobs: list[list[float]] = [[] for _ in range(num_choices)]
        waiting = set(range(num_choices))
        async for piece in self._source:
            self._held.append(piece)
            if not 0 <= piece.index < num_choices:
                continue
            logprobs[piece.index] += [each.logprob for each in piece.logprobs]
            has_enough = first_tokens is not None and len(logprobs[piece.index]) >= first_tokens
            if has_enough or piece.finish_reason is not None:
                waiting.discard(piece.index)
            if not waiting:
                return logprobs
        raise UnavailableError("the small model stopped before its answer was whole", "try again")

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """What was held, then the rest; without the log probabilities that only the decision needed."""
        for piece in self._held:
            yield self._plain(piece)
        async for piece in self._source:
            yield self._plain(piece)

    async def aclose(self) -> None:
        """Cancel the work behind it."""
        closing = getattr(self._source, "aclose", None)
        if closing is not None:
            await closing()

    def _plain(self, piece: Piece) -> Piece:
        return piece if self._keeps_logprobs or not piece.logprobs else replace(piece, logprobs=())


async def _begun(pieces: AsyncIterator[Piece], *, whole: bool) -> list[Piece]:
    """The pieces up to the first text, or all of them.

    Raises:
        UnavailableError: the answer broke off before that.
    """
    found: list[Piece] = []
    async for piece in pieces:
        found.append(piece)
        if not whole and (piece.text or piece.finish_reason):
            return found
    if not found or not any(piece.finish_reason for piece in found):
        raise UnavailableError("the large model stopped before its answer was whole", "try again")
    return found


def _at(answer: Any, site: str, *, unsure: bool = False) -> dict[str, Any]:
    held = dict(answer) if isinstance(answer, Mapping) else {"output": answer}
    return {**held, "site": site, **({"unsure": True} if unsure else {})}


def answered_at(answers: Sequence[Any]) -> str | None:
    """Who gave these answers of `predict`, for a header: the sites, joined by commas; None when they do not say."""
    names = {
        each["site"] + (UNSURE if each.get("unsure") else "")
        for each in answers
        if isinstance(each, Mapping) and isinstance(each.get("site"), str)
    }
    return ",".join(sorted(names)) or None
