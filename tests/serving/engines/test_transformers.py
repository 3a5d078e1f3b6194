"""The default engine against plain transformers: the same answers, whatever else runs beside them."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.serving.engines.asking import PROMPTS, TOKENS, answer, asking, ids
from tests.serving.models import CONTEXT, greedy, log_probabilities, tiny_llama

from modelyard.errors import CapacityError, InputError, UnavailableError
from modelyard.serving.engines.memory import MIB
from modelyard.serving.engines.ragged import BLOCK_TOKENS
from modelyard.serving.engines.threaded import ThreadedEngine
from modelyard.serving.engines.transformers import TransformersCore, transformers_engine
from modelyard.serving.protocol import Sampling, Tokens
from modelyard.tasks import load_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


def model_of(folder: Path) -> Any:
    return load_model(folder)[1].float()


@pytest.fixture
def engine(folder: Path) -> Iterator[ThreadedEngine]:
    engine = transformers_engine(model_of(folder), eos_ids={0}, cache_mib=64)
    yield engine
    asyncio.run(engine.close())


def test_sixteen_streams_at_once_answer_as_plain_transformers_does_one_by_one(
    engine: ThreadedEngine, folder: Path
) -> None:
    async def main() -> list[list[Tokens]]:
        return await asyncio.gather(*(answer(engine, asking(prompt)) for prompt in PROMPTS))

    answers = asyncio.run(main())
    assert [ids(one) for one in answers] == [greedy(folder, prompt, TOKENS) for prompt in PROMPTS]
    assert len({tuple(ids(one)) for one in answers}) > 10  # they really differ
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.cache_usage) == (0, 0, 0.0)
    assert stats.prompt_tokens == sum(map(len, PROMPTS))
    assert stats.generated_tokens == sum(len(ids(one)) for one in answers)


def test_an_answer_ends_at_its_length_or_at_an_end_token_which_it_does_not_contain(
    engine: ThreadedEngine, folder: Path
) -> None:
    plain = ids(asyncio.run(answer(engine, asking(PROMPTS[4]))))
    short = asyncio.run(answer(engine, asking(PROMPTS[4], max_tokens=5)))
    assert ids(short) == plain[:5]
    assert [tokens.finish_reason for tokens in short] == [None] * 4 + ["length"]
    place = 6
    assert plain[place] not in plain[:place]
    ending = transformers_engine(model_of(folder), eos_ids={plain[place]}, cache_mib=64)
    stopped = asyncio.run(answer(ending, asking(PROMPTS[4])))
    asyncio.run(ending.close())
    assert ids(stopped) == plain[:place]
    assert stopped[-1].finish_reason == "stop"


def test_a_small_cache_makes_sequences_wait_but_changes_no_answer_and_is_never_exceeded(folder: Path) -> None:
    """Room for three blocks: sequences that outgrow theirs push the youngest one out, which starts again later."""
    core = TransformersCore(model_of(folder), cache_mib=1, context_tokens=128, step_tokens=40)
    core._blocks = 3  # the smallest budget in MiB holds more of so small a model
    long = [prompt * 3 for prompt in PROMPTS[2:8]]
    for key, prompt in enumerate(long):
        core.add(key, asking(prompt[:60], max_tokens=30))
    answers: dict[int, list[int]] = {key: [] for key in range(len(long))}
    pushed_out = highest = 0
    for _ in range(2000):
        if not core.busy:
            break
        before = core.stats().waiting
        for key, tokens in core.step().items():
            answers[key] += tokens.ids
        pushed_out += core.stats().waiting > before
        highest = max(highest, sum(sequence.cache.blocks for sequence in core._running))
    assert not core.busy
    assert pushed_out > 0
    assert highest == 3
    assert list(answers.values()) == [greedy(folder, prompt[:60], 30) for prompt in long]


def test_the_cache_takes_no_more_memory_than_its_budget(folder: Path) -> None:
    core = TransformersCore(model_of(folder), cache_mib=2)
    block_bytes = core._shape.token_bytes * BLOCK_TOKENS
    assert core._blocks == 2 * MIB // block_bytes
    for key in range(40):
        core.add(key, asking(PROMPTS[4] * 2, max_tokens=100))
    highest = 0
    for _ in range(60):
        core.step()
        held = sum(sequence.cache._data.numel() * 4 for sequence in core._running)
        highest = max(highest, held)
        assert held <= 2 * MIB
        assert core.stats().cache_usage == pytest.approx(held / (core._blocks * block_bytes))
    assert highest > 1.5 * MIB


def test_a_context_that_cannot_fit_is_refused_with_both_numbers(folder: Path) -> None:
    with pytest.raises(CapacityError, match=r"context_tokens=257, but the model sees 256"):
        TransformersCore(model_of(folder), context_tokens=CONTEXT + 1)
    # keys and values of 2 layers with 2 heads, 32 wide, in fp32: 1 KiB a token
    with pytest.raises(CapacityError, match=r"2000 tokens needs 2 MiB of cache, cache_mib=1 holds 1024 tokens"):
        TransformersCore(load_long(folder), context_tokens=2000, cache_mib=1)
    assert TransformersCore(load_long(folder), cache_mib=1).context_tokens == 1024  # unasked it takes what fits


def load_long(folder: Path) -> Any:
    model = model_of(folder)
    model.config.max_position_embeddings = 4096
    return model


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


def test_log_probabilities_are_those_of_a_plain_forward_pass(folder: Path, engine: ThreadedEngine) -> None:
    for options in ({}, {"temperature": 1.5, "seed": 3}):
        got = asyncio.run(answer(engine, asking(PROMPTS[2], top_logprobs=4, **options)))
        expected = log_probabilities(model_of(folder), PROMPTS[2], ids(got))
        for place, logprob in enumerate(one for tokens in got for one in tokens.logprobs):
            assert logprob.logprob == pytest.approx(float(expected[place, logprob.token_id]), abs=1e-4)
            values, likeliest = expected[place].topk(4)
            assert [token for token, _ in logprob.top] == likeliest.tolist()
            assert [value for _, value in logprob.top] == pytest.approx(values.tolist(), abs=1e-4)
    assert all(not tokens.logprobs for tokens in asyncio.run(answer(engine, asking(PROMPTS[2]))))


def test_a_cancelled_stream_frees_its_slot_within_a_second(engine: ThreadedEngine) -> None:
    async def main() -> float:
        stream = engine.stream(asking(PROMPTS[0], max_tokens=CONTEXT))
        await anext(stream)
        assert engine.stats().running == 1
        left = time.monotonic()
        await stream.aclose()
        while engine.stats() != engine.stats() or engine.stats().running:
            await asyncio.sleep(0.005)
        return time.monotonic() - left

    assert asyncio.run(main()) < 1
    assert engine.stats().cache_usage == 0


def test_a_stream_that_is_cancelled_while_it_waits_never_runs(folder: Path) -> None:
    engine = transformers_engine(model_of(folder), cache_mib=64, max_sequences=1)

    async def main() -> None:
        first = asyncio.create_task(answer(engine, asking(PROMPTS[0], max_tokens=100)))
        second = asyncio.create_task(answer(engine, asking(PROMPTS[1])))
        while engine.stats().waiting != 1:
            await asyncio.sleep(0.005)
        second.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await second
        await first
        assert (engine.stats().waiting, engine.stats().generated_tokens) == (0, 100)
        await engine.close()

    asyncio.run(main())


def test_a_closed_engine_ends_its_streams_with_an_error(folder: Path) -> None:
    engine = transformers_engine(model_of(folder), cache_mib=64)

    async def main() -> None:
        stream = engine.stream(asking(PROMPTS[0], max_tokens=200))
        await anext(stream)
        await engine.close()
        with pytest.raises(UnavailableError, match="closed"):
            async for _ in stream:
                pass
        with pytest.raises(UnavailableError, match="closed"):
            await answer(engine, asking(PROMPTS[0]))

    asyncio.run(main())


def test_an_engine_that_fails_tells_every_stream(folder: Path) -> None:
    engine = transformers_engine(model_of(folder), cache_mib=64)

    async def main() -> None:
        def break_it(core: TransformersCore) -> None:
            core._model = None

        await engine.run(break_it)
        for _ in range(2):
            with pytest.raises(UnavailableError, match="the engine failed"):
                await answer(engine, asking(PROMPTS[0]))

    asyncio.run(main())


@pytest.mark.parametrize("length", [0, CONTEXT, CONTEXT + 3])
def test_a_prompt_without_room_for_an_answer_is_refused(engine: ThreadedEngine, length: int) -> None:
    with pytest.raises(InputError, match=f"a prompt of {length} tokens"):
        asyncio.run(answer(engine, asking([5] * length)))


def test_tokens_that_only_pad_the_vocabulary_are_never_chosen(tmp_path: Path) -> None:
    padded = tiny_llama(tmp_path / "padded", vocab_padding=4000)
    words = 400
    core = TransformersCore(model_of(padded), vocab_tokens=words, cache_mib=8)
    for key in range(8):
        core.add(key, asking(PROMPTS[key], temperature=5.0, seed=key))
    seen = [token for _ in range(TOKENS) for tokens in core.step().values() for token in tokens.ids]
    assert len(seen) == 8 * TOKENS
    assert max(seen) < words


def test_an_attention_window_is_kept_as_transformers_keeps_it(tmp_path: Path) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(1)
    config = MistralConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        sliding_window=8,
        initializer_range=0.3,
        attn_implementation="sdpa",
    )
    model = MistralForCausalLM(config).eval()
    prompt = torch.tensor([PROMPTS[4]])
    with torch.inference_mode():
        out = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=TOKENS)
    expected = out[0, prompt.shape[1] :].tolist()
    core = TransformersCore(model, cache_mib=8, step_tokens=11)  # the prompt goes in parts
    core.add(0, asking(PROMPTS[4]))
    got = [token for _ in range(TOKENS + 8) if core.busy for tokens in core.step().values() for token in tokens.ids]
    assert got == expected


def test_a_model_without_plain_attention_is_refused() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, state_size=4))
    with pytest.raises(InputError, match="MambaForCausalLM"):
        TransformersCore(model.eval())


def test_an_embedding_is_the_mean_of_the_last_states_at_length_one(engine: ThreadedEngine, folder: Path) -> None:
    vector = asyncio.run(engine.run(lambda core: core.embed(PROMPTS[3])))
    with torch.inference_mode():
        states = model_of(folder).model(input_ids=torch.tensor([PROMPTS[3]])).last_hidden_state[0]
    assert vector == pytest.approx(torch.nn.functional.normalize(states.mean(dim=0), dim=0).tolist(), abs=1e-5)


def test_shares_of_drawn_tokens_are_those_of_the_distribution() -> None:
    """Top-k and top-p, over 4,000 draws: a share is off by 0.03 less than once in ten thousand runs."""
    from modelyard.serving.engines.sampling import choose

    logits = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0, -2.0]])
    cases = [({"top_k": 3}, 3), ({"top_p": 0.75}, 2), ({"top_k": 4, "top_p": 0.79}, 2), ({"top_p": 0.79}, 3), ({}, 6)]
    for options, kept in cases:
        sampling = Sampling(max_tokens=1, temperature=1.0, **options)  # type: ignore[arg-type]
        generator = random.Random(5)
        drawn = [choose(logits, [sampling], [generator])[0] for _ in range(4000)]
        expected = logits[0, :kept].softmax(dim=0).tolist()
        assert [drawn.count(token) / 4000 for token in range(kept)] == pytest.approx(expected, abs=0.03)
        assert max(drawn) < kept
