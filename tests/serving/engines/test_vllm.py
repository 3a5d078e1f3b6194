"""What can be shown without vLLM: what it would be asked, how its answers are read, and that it is missed by name."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from modelyard.errors import InputError, MissingExtraError, UnavailableError
from modelyard.serving.engines.vllm import VLLMEngine, sampling_options, tokens_of
from modelyard.serving.protocol import Sampling, TokenLogprob, Tokens


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_the_extra_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingExtraError, match=r"modelyard\[vllm\]"):
        VLLMEngine(tmp_path)


def test_every_field_of_a_request_reaches_vllm() -> None:
    sampling = Sampling(
        max_tokens=99, temperature=0.7, top_p=0.9, top_k=5, seed=3, top_logprobs=2, json_schema={"type": "object"}
    )
    assert sampling_options(sampling, 40, {7, 2}, [0, 1]) == {
        "n": 1,
        "max_tokens": 40,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 5,
        "seed": 3,
        "logprobs": 2,
        "stop_token_ids": [2, 7],
        "detokenize": False,
        "allowed_token_ids": [0, 1],
        "json_schema": {"type": "object"},
    }
    plain = sampling_options(Sampling(max_tokens=4, temperature=0), 40, {2})
    assert plain["max_tokens"] == 4
    assert (plain["logprobs"], plain["seed"]) == (None, None)
    assert not {"allowed_token_ids", "json_schema"} & set(plain)
    with pytest.raises(InputError, match="json_schema"):  # a schema that its compiler refuses would end vLLM's process
        sampling_options(Sampling(max_tokens=4, json_schema={"type": "nonsense"}), 40, {2})
    with pytest.raises(InputError, match="top_logprobs=21"):
        sampling_options(Sampling(max_tokens=4, top_logprobs=21), 40, {2})


def output(ids: list[int], reason: str | None = None, logprobs: Any = None) -> Any:
    return SimpleNamespace(token_ids=ids, finish_reason=reason, logprobs=logprobs)


def test_an_end_token_is_not_among_the_tokens() -> None:
    assert tokens_of(output([5, 6]), {2}, None) == Tokens((5, 6))
    assert tokens_of(output([5, 2], "stop"), {2}, None) == Tokens((5,), finish_reason="stop")
    assert tokens_of(output([5, 6], "length"), {2}, None) == Tokens((5, 6), finish_reason="length")


def test_the_likeliest_tokens_come_by_rank_and_the_chosen_one_only_if_it_is_among_them() -> None:
    place = {
        9: SimpleNamespace(logprob=-3.0, rank=8),
        4: SimpleNamespace(logprob=-0.5, rank=1),
        5: SimpleNamespace(logprob=-1.0, rank=2),
    }
    end = {2: SimpleNamespace(logprob=-0.1, rank=1)}
    got = tokens_of(output([9, 2], "stop", [place, end]), {2}, 2)
    assert got == Tokens((9,), (TokenLogprob(9, -3.0, ((4, -0.5), (5, -1.0))),), "stop")
    assert tokens_of(output([9], None, [place]), {2}, 0).logprobs == (TokenLogprob(9, -3.0),)


def test_a_request_that_vllm_gives_up_is_an_error_and_no_short_answer() -> None:
    with pytest.raises(UnavailableError, match="abort"):
        tokens_of(output([5], "abort"), {2}, None)
