"""OpenAI's client, as it is, against a real instruct model: SmolLM2-135M on OpenVINO, behind the gateway over HTTP."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from tests.serving.gateway.process import serving
from tests.serving.models import smollm2_gguf

from modelyard.artifacts import Registry
from modelyard.security import KeyStore

pytestmark = pytest.mark.slow
pytest.importorskip("openvino_genai", reason="needs the extra openvino")
CHAT, VECTORS = "smollm2-openvino", "smollm2-transformers"
CONTEXT = 8_192
TIMEOUT_S = 4.0
"""The gateway's `request_timeout_s`: a few hundred tokens take longer."""
FRANCE = [{"role": "user", "content": "What is the capital of France? Answer with the name of the city alone."}]


@pytest.fixture(scope="module")
def url_and_key(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    from modelyard.serving.importing import import_model

    file = smollm2_gguf()
    folder = tmp_path_factory.mktemp("clients")
    database = f"sqlite:///{folder / 'gateway.db'}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODELYARD_HOME", str(folder / "home"))
        patch.setenv("MODELYARD_STORE", str(folder / "home" / "store"))
        patch.setenv("MODELYARD_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        patch.setenv("HF_HUB_OFFLINE", "1")
        import_model(file, "smollm2", Registry.from_settings())
        keys = KeyStore(database)
        key = keys.create(tenant="clients", models=["smollm2-*"])
        keys.close()
        names = ("smollm2=openvino", "smollm2=transformers")
        with serving(database, *names, log=folder / "log.txt", request_timeout_s=TIMEOUT_S) as process:
            yield f"{process.url}/v1", key


@pytest.fixture
def client(url_and_key: tuple[str, str]) -> Iterator[openai.OpenAI]:
    url, key = url_and_key
    with openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=60) as found:
        yield found


def test_the_models_are_listed_with_their_engines(client: openai.OpenAI) -> None:
    listed = {model.id: model for model in client.models.list()}
    assert set(listed) == {CHAT, VECTORS}
    assert listed[CHAT].model_dump()["engine"] == "openvino"
    assert client.models.retrieve(CHAT).model_dump()["context_tokens"] <= CONTEXT


def test_a_chat_knows_the_capital_of_france(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=CHAT, messages=FRANCE, temperature=0, max_tokens=24)  # type: ignore[arg-type]
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert 20 < answer.usage.prompt_tokens < 80
    assert 1 <= answer.usage.completion_tokens <= 24


def test_a_stream_is_the_same_chat_in_pieces_and_ends_with_its_usage(client: openai.OpenAI) -> None:
    request = {"model": CHAT, "messages": FRANCE, "temperature": 0, "max_tokens": 24}
    whole = client.chat.completions.create(**request)  # type: ignore[call-overload]
    stream = client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True})  # type: ignore[call-overload]
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert len(chunks) > 3
    assert chunks[-1].usage == whole.usage


def test_a_completion_goes_on_in_english_and_stops_where_it_is_told(client: openai.OpenAI) -> None:
    prompt = "One, two, three, four, five,"
    answer = client.completions.create(model=CHAT, prompt=prompt, temperature=0, max_tokens=20, stop=["eight"])
    assert "six, seven" in answer.choices[0].text
    assert "eight" not in answer.choices[0].text
    assert answer.choices[0].finish_reason == "stop"
    two = client.completions.create(model=CHAT, prompt=[prompt, "Monday, Tuesday,"], temperature=0, max_tokens=6)
    assert "six" in two.choices[0].text
    assert "Wednesday" in two.choices[1].text


def test_embeddings_of_near_texts_are_nearer(client: openai.OpenAI) -> None:
    texts = ["The cat sleeps on the sofa.", "A kitten naps on the couch.", "Interest rates rose by two percent."]
    answer = client.embeddings.create(model=VECTORS, input=texts)
    cat, kitten, rates = (item.embedding for item in answer.data)
    assert sum(a * b for a, b in zip(cat, kitten, strict=True)) > sum(a * b for a, b in zip(cat, rates, strict=True))
    assert sum(a * a for a in cat) == pytest.approx(1, abs=1e-3)
    assert answer.usage.prompt_tokens > 15
    with pytest.raises(openai.BadRequestError, match="gives no embeddings"):
        client.embeddings.create(model=CHAT, input=texts)


def test_errors_are_openais(url_and_key: tuple[str, str], client: openai.OpenAI) -> None:
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=url_and_key[0], api_key="sk-wrong", max_retries=0).models.list()
    with pytest.raises(openai.NotFoundError, match=f"(?s){CHAT}.*{VECTORS}") as unknown:
        client.chat.completions.create(model="gpt-4o", messages=FRANCE)  # type: ignore[arg-type]
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="max_tokens") as wrong:
        client.chat.completions.create(model=CHAT, messages=FRANCE, max_tokens=-1)  # type: ignore[arg-type]
    assert wrong.value.param == "max_tokens"


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_longer_than_the_context_is_told_with_its_length(client: openai.OpenAI, stream: bool) -> None:
    prompt = "one word and another " * 3_000
    with pytest.raises(openai.BadRequestError, match=r"the prompt has \d+ tokens"):
        client.completions.create(model=CHAT, prompt=prompt, stream=stream)


def test_what_takes_too_long_ends_with_an_error_that_names_the_setting(client: openai.OpenAI) -> None:
    story = [{"role": "user", "content": "Tell me a very long story about a lighthouse, in ten chapters."}]
    request = {"model": CHAT, "messages": story, "max_tokens": 2_000, "temperature": 0.7}
    started = time.monotonic()
    with pytest.raises(openai.InternalServerError, match="request_timeout_s") as late:
        client.chat.completions.create(**request)  # type: ignore[call-overload]
    assert late.value.status_code == 504
    assert time.monotonic() - started < TIMEOUT_S + 2
    chunks: list[Any] = []
    with pytest.raises(openai.APIError, match="request_timeout_s"):
        chunks.extend(client.chat.completions.create(**request, stream=True))  # type: ignore[call-overload]
    assert len(chunks) > 5, "what was ready came in time"


def test_a_client_that_gives_up_is_not_answered_on(client: openai.OpenAI) -> None:
    story = [{"role": "user", "content": "Tell me a very long story about a mill."}]
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.3).chat.completions.create(model=CHAT, messages=story, max_tokens=2_000)  # type: ignore[arg-type]
    answer = client.chat.completions.create(model=CHAT, messages=FRANCE, temperature=0, max_tokens=24)  # type: ignore[arg-type]
    assert "Paris" in (answer.choices[0].message.content or "")
