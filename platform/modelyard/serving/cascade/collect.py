"""Ask two served models about labelled rows, to calibrate a cascade of them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from modelyard.errors import DataError
from modelyard.serving.cascade.calibration import Observations
from modelyard.serving.cascade.confidence import of_logprobs, raw_probability
from modelyard.serving.cascade.payload import answer_bytes, input_bytes, prompt_bytes
from modelyard.serving.cascade.records import Score
from modelyard.serving.protocol import Backend, Generation

_BATCH = 64
_TOGETHER = 8


async def observe_predictions(
    backend: Backend, small: str, large: str, inputs: Sequence[Any], labels: Sequence[int | str]
) -> Observations:
    """Two classifiers on the same inputs; their labels (numbers or names) must mean the same.

    Raises:
        DataError: there are no rows, or not as many labels.
        ConfigError: the small model gives no probabilities.
    """
    if not len(inputs) or len(inputs) != len(labels):
        raise DataError(f"there are {len(inputs)} inputs and {len(labels)} labels", "give one label for each input")
    first = await _predicted(backend, small, inputs)
    second = await _predicted(backend, large, inputs)
    truth = np.asarray(labels)
    return Observations(
        confidence=np.array([raw_probability(answer) for answer in first], dtype=np.float64),
        small_right=np.array([answer["label"] for answer in first]) == truth,
        large_right=np.array([answer["label"] for answer in second]) == truth,
        bytes_up=np.array([input_bytes(value) for value in inputs], dtype=np.float64),
        bytes_down=np.array([answer_bytes(answer) for answer in second], dtype=np.float64),
    )


async def observe_generations(
    backend: Backend,
    small: str,
    large: str,
    score: Score,
    calls: Sequence[Generation],
    is_right: Callable[[int, str], bool],
) -> Observations:
    """Two language models on the same calls, of one choice each.

    Args:
        backend: serves both.
        small: the model whose confidence counts.
        large: the other one.
        score: how confidence is taken.
        calls: as callers make them; a score holds for the sampling that it was taken with.
        is_right: by the number of a call and an answer's text.

    Raises:
        DataError: there are no calls.
    """
    if not calls:
        raise DataError("there are no calls to calibrate with")
    gate = asyncio.Semaphore(_TOGETHER)

    async def both(number: int, call: Generation) -> tuple[float, bool, bool, int, int]:
        async with gate:
            text, logprobs = await _answered(backend, small, call, with_logprobs=True)
            better, _ = await _answered(backend, large, call, with_logprobs=False)
        confidence = of_logprobs(score, logprobs)
        right = is_right(number, text), is_right(number, better)
        return confidence, *right, prompt_bytes(call), len(better.encode())

    rows = await asyncio.gather(*(both(number, call) for number, call in enumerate(calls)))
    confidence, small_right, large_right, up, down = (np.array(column) for column in zip(*rows, strict=True))
    return Observations(
        confidence.astype(np.float64), small_right, large_right, up.astype(np.float64), down.astype(np.float64)
    )


async def _predicted(backend: Backend, model: str, inputs: Sequence[Any]) -> list[Any]:
    answers: list[Any] = []
    for start in range(0, len(inputs), _BATCH):
        answers += await backend.predict(model, inputs[start : start + _BATCH])
    return answers


async def _answered(backend: Backend, model: str, call: Generation, *, with_logprobs: bool) -> tuple[str, list[float]]:
    sampling = replace(call.sampling, top_logprobs=0 if with_logprobs else None)
    texts: list[str] = []
    logprobs: list[float] = []
    pieces = backend.generate(model, replace(call, sampling=sampling, num_choices=1))
    async with contextlib.aclosing(pieces):  # type: ignore[type-var]
        async for piece in pieces:
            texts.append(piece.text)
            logprobs += [each.logprob for each in piece.logprobs]
    return "".join(texts), logprobs
