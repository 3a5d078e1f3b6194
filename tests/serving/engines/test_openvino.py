"""OpenVINO GenAI against plain transformers on the same, dequantized, weights."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.serving.engines.asking import PROMPTS, TOKENS, answer, asking, ids
from tests.serving.models import CONTEXT, log_probabilities, tiny_llama

from modelyard.errors import CapacityError, InputError, UnavailableError
from modelyard.serving.engines.openvino import generation_options, openvino_engine
from modelyard.serving.engines.threaded import ThreadedEngine
from modelyard.serving.export import read_gguf, write_gguf
from modelyard.serving.protocol import Sampling, Tokens
from modelyard.tasks import load_model
from modelyard.tasks.generation import load_tokenizer
from modelyard.tasks.language_models import load_folder

pytest.importorskip("openvino_genai", reason="needs the extra openvino")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("models") / "tiny", vocab_padding=64)


@pytest.fixture(scope="module")
def gguf(folder: Path) -> Path:
    target = folder.parent / "tiny.gguf"
    write_gguf(load_model(folder)[1], folder, target)
    return target


@pytest.fixture(scope="module")
def dequantized(gguf: Path) -> Any:
    """What transformers reads back from the exported file."""
    read_gguf(gguf, gguf.parent / "back")
    return load_folder(gguf.parent / "back").eval()


@pytest.fixture
def engine(gguf: Path, folder: Path) -> Iterator[ThreadedEngine]:
    engine = openvino_engine(gguf, folder, eos_ids={0}, cache_mib=8, threads=1)
    yield engine
    asyncio.run(engine.close())


def test_sixteen_streams_at_once_answer_as_each_does_alone(engine: ThreadedEngine) -> None:
    async def alone() -> list[list[Tokens]]:
        return [await answer(engine, asking(prompt)) for prompt in PROMPTS]

    async def together() -> list[list[Tokens]]:
        return await asyncio.gather(*(answer(engine, asking(prompt)) for prompt in PROMPTS))

    answers = [ids(one) for one in asyncio.run(together())]
    assert answers == [ids(one) for one in asyncio.run(alone())]
    assert len({tuple(one) for one in answers}) > 10
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.cache_usage) == (0, 0, 0.0)
    assert stats.prompt_tokens == 2 * sum(map(len, PROMPTS))
    assert stats.generated_tokens == 2 * sum(map(len, answers))


def test_without_rounding_answers_are_those_of_the_dequantized_weights(
    gguf: Path, folder: Path, dequantized: Any
) -> None:
    engine = openvino_engine(gguf, folder, eos_ids={0}, cache_mib=8, threads=1, round_activations=False)
    for prompt in PROMPTS:
        got = asyncio.run(answer(engine, asking(prompt, top_logprobs=0)))
        given = torch.tensor([prompt])
        with torch.inference_mode():
            out = dequantized.generate(
                input_ids=given, attention_mask=torch.ones_like(given), max_new_tokens=TOKENS, do_sample=False
            )[0, given.shape[1] :].tolist()
        assert ids(got) == (out[: out.index(0)] if 0 in out else out)
        found = [one for tokens in got for one in tokens.logprobs]
        expected = log_probabilities(dequantized, prompt, ids(got))
        assert [one.logprob for one in found] == pytest.approx(
            [float(expected[place, one.token_id]) for place, one in enumerate(found)], abs=0.1
        )  # keys and values are kept in 16 bits
    asyncio.run(engine.close())


def test_an_answer_ends_at_its_length_or_at_an_end_token_which_it_does_not_contain(
    engine: ThreadedEngine, gguf: Path, folder: Path
) -> None:
    plain = ids(asyncio.run(answer(engine, asking(PROMPTS[4]))))
    short = asyncio.run(answer(engine, asking(PROMPTS[4], max_tokens=5)))
    assert ids(short) == plain[:5]
    assert short[-1].finish_reason == "length"
    place = next(place for place in range(3, len(plain)) if plain[place] not in plain[:place])
    ending = openvino_engine(gguf, folder, eos_ids={0, plain[place]}, cache_mib=8, threads=1)
    stopped = asyncio.run(answer(ending, asking(PROMPTS[4])))
    asyncio.run(ending.close())
    assert ids(stopped) == plain[:place]
    assert stopped[-1].finish_reason == "stop"


def test_the_same_seed_gives_the_same_tokens_alone_and_among_others(engine: ThreadedEngine) -> None:
    request = asking(PROMPTS[1], temperature=1.3, top_p=0.9, seed=11)

    async def among() -> list[list[Tokens]]:
        others = [asking(prompt, temperature=2.0, seed=number) for number, prompt in enumerate(PROMPTS[:7])]
        return await asyncio.gather(*(answer(engine, one) for one in [*others, request]))

    alone = ids(asyncio.run(answer(engine, request)))
    assert ids(asyncio.run(among())[-1]) == alone
    other_seed = asking(PROMPTS[1], temperature=1.3, top_p=0.9, seed=12)
    assert ids(asyncio.run(answer(engine, other_seed))) != alone
    unseeded = asking(PROMPTS[1], temperature=1.3)
    assert ids(asyncio.run(answer(engine, unseeded))) != ids(asyncio.run(answer(engine, unseeded)))


def test_log_probabilities_are_given_when_asked_for_before_temperature(
    engine: ThreadedEngine, dequantized: Any
) -> None:
    for options in ({}, {"temperature": 1.7, "seed": 5}):
        got = asyncio.run(answer(engine, asking(PROMPTS[2], top_logprobs=0, **options)))
        expected = log_probabilities(dequantized, PROMPTS[2], ids(got))
        found = [one for tokens in got for one in tokens.logprobs]
        assert [one.token_id for one in found] == ids(got)
        assert [one.logprob for one in found] == pytest.approx(
            [float(expected[place, one.token_id]) for place, one in enumerate(found)], abs=0.4
        )
    assert all(not tokens.logprobs for tokens in asyncio.run(answer(engine, asking(PROMPTS[2]))))


def test_a_cancelled_stream_frees_its_slot_within_a_second(engine: ThreadedEngine) -> None:
    async def main() -> float:
        stream = engine.stream(asking(PROMPTS[0], max_tokens=CONTEXT))
        await anext(stream)
        assert engine.stats().running == 1
        left = time.monotonic()
        await stream.aclose()
        while engine.stats().running:
            await asyncio.sleep(0.005)
        return time.monotonic() - left

    assert asyncio.run(main()) < 1
    assert engine.stats().cache_usage == 0


def test_a_small_cache_makes_sequences_wait_but_changes_no_answer(gguf: Path, folder: Path) -> None:
    """1 MiB holds 2,048 tokens: 32 sequences of 200 do not fit together."""
    engine = openvino_engine(gguf, folder, eos_ids={}, cache_mib=1, threads=1)
    requests = [asking((PROMPTS[4] * 3)[: 100 + n], max_tokens=100) for n in range(32)]

    async def together() -> list[list[Tokens]]:
        return await asyncio.gather(*(answer(engine, one) for one in requests))

    answers = asyncio.run(together())
    assert [len(ids(one)) for one in answers] == [100] * 32
    assert [ids(one) for one in answers[::8]] == [ids(asyncio.run(answer(engine, one))) for one in requests[::8]]
    asyncio.run(engine.close())


def test_a_context_that_cannot_fit_is_refused_with_both_numbers(gguf: Path, folder: Path) -> None:
    with pytest.raises(CapacityError, match=r"context_tokens=257, but the model sees 256"):
        openvino_engine(gguf, folder, context_tokens=CONTEXT + 1)


SCHEMA = {
    "$defs": {"Part": {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}},
    "type": "object",
    "title": "every plain keyword once",
    "properties": {
        "part": {"$ref": "#/$defs/Part"},
        "kind": {"enum": ["a", "b", 3]},
        "always": {"const": "x"},
        "word": {"type": "string", "minLength": 1, "maxLength": 3},
        "list": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 2},
        "either": {"anyOf": [{"type": "null"}, {"type": "boolean"}]},
        "both": {"type": ["boolean", "null"]},
    },
    "required": ["part", "kind", "always", "word", "list", "either", "both"],
    "additionalProperties": False,
}


def test_a_json_schema_is_kept(engine: ThreadedEngine, folder: Path) -> None:
    got = asyncio.run(answer(engine, asking(PROMPTS[3], max_tokens=220, json_schema=SCHEMA)))
    text = load_tokenizer(folder).decode(ids(got))
    assert got[-1].finish_reason == "stop", text
    found = json.loads(text)
    assert list(found) == SCHEMA["required"]
    assert isinstance(found["part"]["ok"], bool)
    assert found["kind"] in ("a", "b", 3)
    assert found["always"] == "x"
    assert 1 <= len(found["word"]) <= 3
    assert 1 <= len(found["list"]) <= 2


@pytest.mark.parametrize("schema", [{"type": "nonsense"}, {"type": "string", "pattern": "("}, {"$ref": "#/$defs/no"}])
def test_a_schema_that_is_none_spoils_only_its_own_call(engine: ThreadedEngine, schema: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="json_schema"):
        asyncio.run(answer(engine, asking(PROMPTS[3], json_schema=schema)))
    assert len(ids(asyncio.run(answer(engine, asking(PROMPTS[4], max_tokens=4))))) == 4


def test_a_closed_engine_ends_its_streams_with_an_error(gguf: Path, folder: Path) -> None:
    engine = openvino_engine(gguf, folder, cache_mib=8, threads=1)

    async def main() -> None:
        stream = engine.stream(asking(PROMPTS[0], max_tokens=200))
        await anext(stream)
        await engine.close()
        with pytest.raises(UnavailableError, match="closed"):
            async for _ in stream:
                pass

    asyncio.run(main())


def test_a_damaged_file_is_refused(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(InputError, match="OpenVINO refuses"):
        openvino_engine(tmp_path / "bad.gguf", folder)


def test_options_that_are_not_asked_for_are_left_to_openvino() -> None:
    greedy = generation_options(Sampling(max_tokens=50, temperature=0), room=20, eos_ids={2})
    assert greedy == {"max_new_tokens": 20, "do_sample": False, "stop_token_ids": {2}, "logprobs": 0}
    drawn = generation_options(Sampling(max_tokens=5, temperature=0.5, seed=-1, top_k=7, top_logprobs=0), 20, ())
    assert drawn == {
        "max_new_tokens": 5,
        "do_sample": True,
        "stop_token_ids": set(),
        "logprobs": 1,
        "ignore_eos": True,
        "temperature": 0.5,
        "top_p": 1.0,
        "rng_seed": 2**63 - 1,
        "top_k": 7,
    }
