"""Both engines on a real model, SmolLM2-135M-Instruct: what the small random ones show, in English."""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.serving.engines.asking import answer, ids
from tests.serving.engines.asking import asking as asked
from tests.serving.models import smollm2_gguf

from modelyard.serving.engines.openvino import openvino_engine
from modelyard.serving.engines.threaded import ThreadedEngine
from modelyard.serving.engines.transformers import transformers_engine
from modelyard.serving.export import read_gguf, write_gguf
from modelyard.serving.protocol import Tokens
from modelyard.tasks.generation import load_tokenizer
from modelyard.tasks.language_models import load_folder

pytestmark = pytest.mark.slow
pytest.importorskip("openvino_genai", reason="needs the extra openvino")
TOKENS = 32
asking = functools.partial(asked, max_tokens=TOKENS)
END = 2
ANIMALS = "dog cat cow pig hen fox owl bee ant bat elk emu yak rat ram eel".split(" ")  # noqa: SIM905


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("models") / "smollm2"
    read_gguf(smollm2_gguf(), target)
    return target


def transformers_on(folder: Path) -> ThreadedEngine:
    return transformers_engine(load_folder(folder).eval(), eos_ids={END}, cache_mib=256, threads=1)


def openvino_on(folder: Path) -> ThreadedEngine:
    file = folder.parent / "smollm2.gguf"
    if not file.exists():
        write_gguf(load_folder(folder), folder, file)
    return openvino_engine(file, folder, eos_ids={END}, cache_mib=256, threads=1)


@pytest.fixture(params=[transformers_on, openvino_on], ids=["transformers", "openvino"])
def engine(request: pytest.FixtureRequest, folder: Path) -> Iterator[ThreadedEngine]:
    make: Callable[[Path], ThreadedEngine] = request.param
    made = make(folder)
    yield made
    asyncio.run(made.close())


def prompts(folder: Path) -> list[list[int]]:
    tokenizer = load_tokenizer(folder)
    texts = [f"Tell me a story about {number} and a {animal}." for number, animal in enumerate(ANIMALS)]
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
        for text in texts
    ]


def test_sixteen_streams_at_once_answer_as_each_does_alone_and_in_english(engine: ThreadedEngine, folder: Path) -> None:
    given = prompts(folder)

    async def together() -> list[list[Tokens]]:
        return await asyncio.gather(*(answer(engine, asking(prompt)) for prompt in given))

    answers = [ids(one) for one in asyncio.run(together())]
    assert answers == [ids(asyncio.run(answer(engine, asking(prompt)))) for prompt in given]
    words = load_tokenizer(folder).decode(answers[0]).split()
    assert len({"the", "a", "I", "was", "and", "to"} & set(words)) >= 3


def test_the_default_engine_answers_as_plain_transformers_does(folder: Path) -> None:
    model: Any = load_folder(folder).eval()
    expected = []
    for prompt in prompts(folder)[:3]:
        given = torch.tensor([prompt])
        with torch.inference_mode():
            out = model.generate(
                input_ids=given, attention_mask=torch.ones_like(given), max_new_tokens=TOKENS, do_sample=False
            )
        expected.append([token for token in out[0, len(prompt) :].tolist() if token != END])
    engine = transformers_on(folder)

    async def together() -> list[list[Tokens]]:
        return await asyncio.gather(*(answer(engine, asking(prompt)) for prompt in prompts(folder)[:3]))

    assert [ids(one) for one in asyncio.run(together())] == expected
    asyncio.run(engine.close())


def test_the_same_seed_gives_the_same_tokens_among_others(engine: ThreadedEngine, folder: Path) -> None:
    given = prompts(folder)[:4]
    request = asking(given[0], temperature=0.9, top_p=0.9, seed=4)

    async def among() -> list[list[Tokens]]:
        others = [asking(prompt, temperature=1.0, seed=number) for number, prompt in enumerate(given)]
        return await asyncio.gather(*(answer(engine, one) for one in [*others, request]))

    assert ids(asyncio.run(among())[-1]) == ids(asyncio.run(answer(engine, request)))


def test_openvino_keeps_a_json_schema_that_the_model_fills_in(folder: Path) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}, "is_capital": {"type": "boolean"}},
        "required": ["city", "is_capital"],
        "additionalProperties": False,
    }
    tokenizer = load_tokenizer(folder)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Answer in JSON: what is the capital of France?"}],
        add_generation_prompt=True,
        return_dict=False,
    )
    engine = openvino_on(folder)
    got = asyncio.run(answer(engine, asking(prompt, max_tokens=80, json_schema=schema)))
    asyncio.run(engine.close())
    assert set(json.loads(tokenizer.decode(ids(got)))) == {"city", "is_capital"}
