"""Which token comes next: greedy, or drawn from the likeliest ones with a generator of the request's own."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from modelyard.serving.protocol import Sampling, TokenLogprob

_FIRST_LOOK = 256
"""Most nuclei hold fewer tokens than this, and finding the k likeliest is far cheaper than sorting all."""


def choose(logits: Tensor, samplings: Sequence[Sampling], generators: Sequence[random.Random]) -> list[int]:
    """The next token of each of B sequences, by logits (B, V); each row is chosen by itself, with its own generator."""
    greedy: list[int] = logits.argmax(dim=-1).tolist()
    return [
        best if sampling.temperature == 0 else _draw(row, sampling, generator)
        for best, row, sampling, generator in zip(greedy, logits, samplings, generators, strict=True)
    ]


def logprobs(row: Tensor, token: int, top: int) -> TokenLogprob:
    """The model's own log probabilities of one row (V,), before temperature and cuts: `token`, and the likeliest."""
    logs_V = row.float().log_softmax(dim=-1)
    values, ids = logs_V.topk(min(top, logs_V.shape[0])) if top else (logs_V[:0], logs_V[:0].long())
    return TokenLogprob(token, float(logs_V[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))


def _draw(row: Tensor, sampling: Sampling, generator: random.Random) -> int:
    """By the inverse of the cumulative distribution, so that one random number makes one token.

    As usual the k likeliest are kept first, then those of them that hold `top_p` of what is left.
    """
    probs_V = (row.double() / sampling.temperature).softmax(dim=-1)
    ids: Tensor | None = None
    if sampling.top_k:
        probs_V, ids = probs_V.topk(min(sampling.top_k, probs_V.shape[0]))
    elif sampling.top_p < 1:
        probs_V, ids = _nucleus(probs_V, sampling.top_p)
    cumulated_V = probs_V.cumsum(dim=0)
    total = float(cumulated_V[-1])
    if sampling.top_p < 1:
        last = int(torch.searchsorted(cumulated_V, sampling.top_p * total).clamp(max=cumulated_V.shape[0] - 1))
        cumulated_V = cumulated_V[: last + 1]
        total = float(cumulated_V[-1])
    place = int(torch.searchsorted(cumulated_V, generator.random() * total, right=True))
    place = min(place, cumulated_V.shape[0] - 1)
    return place if ids is None else int(ids[place])


def _nucleus(probs: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """At least the tokens that hold `top_p` of (V,) together, likeliest first: their shares and ids."""
    values, ids = probs.topk(min(_FIRST_LOOK, probs.shape[0]))
    if float(values.sum()) < top_p:
        values, ids = probs.sort(descending=True)
    return values, ids
