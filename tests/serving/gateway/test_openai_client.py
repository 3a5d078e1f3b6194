"""OpenAI's own client works against a real gateway, and sees errors as OpenAI writes them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from tests.serving.gateway.backends import CONTEXT_TOKENS, RuleBackend, answer_to, served
from tests.serving.gateway.running import Running, running, wait_until

from modelyard.errors import InputError, OverloadedError, UnavailableError
from modelyard.security import KeyStore
from modelyard.serving.gateway import GatewaySettings

HELLO = [{"role": "user", "content": "say hello"}]
PROMPT = "user say hello"


def test_a_chat_is_answered_with_its_usage(client: openai.OpenAI, backend: RuleBackend) -> None:
    answer = client.chat.completions.create(model="tiny-gpt", messages=HELLO, max_tokens=5, temperature=0, top_p=0.5)
    assert answer.choices[0].message.content == answer_to(PROMPT, 5)
    assert (answer.choices[0].finish_reason, answer.choices[0].message.role) == ("length", "assistant")
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (3, 5, 8)
    sampling = backend.generations[0].sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.seed) == (5, 0.0, 0.5, None)


def test_every_parameter_reaches_the_backend(client: openai.OpenAI, backend: RuleBackend) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    client.chat.completions.create(
        model="tiny-gpt",
        messages=[
            {"role": "developer", "content": [{"type": "text", "text": "be"}, {"type": "text", "text": "brief"}]}
        ],
        max_completion_tokens=7,
        n=2,
        seed=9,
        stop=["cam", "rod"],
        logprobs=True,
        top_logprobs=2,
        response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema}},
        extra_body={"top_k": 4},
        user="someone",
        frequency_penalty=0,
    )
    call = backend.generations[0]
    assert call.messages == [{"role": "system", "content": "be\nbrief"}]
    assert (call.stop, call.num_choices, call.sampling.top_k) == (("cam", "rod"), 2, 4)
    assert (call.sampling.max_tokens, call.sampling.seed, call.sampling.top_logprobs) == (7, 9, 2)
    assert call.sampling.json_schema == schema


def test_an_answer_goes_back_into_the_chat_with_its_nulls(client: openai.OpenAI, backend: RuleBackend) -> None:
    answer = client.chat.completions.create(model="tiny-gpt", messages=HELLO, max_tokens=2)
    said: Any = answer.choices[0].message.model_dump()
    assert said["refusal"] is None
    client.chat.completions.create(model="tiny-gpt", messages=[*HELLO, said, *HELLO], max_tokens=2)
    assert backend.generations[-1].messages == [*HELLO, {"role": "assistant", "content": said["content"]}, *HELLO]


def test_a_stream_is_the_same_text_as_the_whole_answer(client: openai.OpenAI, backend: RuleBackend) -> None:
    request = {"model": "tiny-gpt", "messages": HELLO, "max_tokens": 20, "seed": 3}
    whole = client.chat.completions.create(**request)  # type: ignore[call-overload]
    chunks = list(client.chat.completions.create(**request, stream=True))  # type: ignore[call-overload]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["length"]
    assert all(chunk.usage is None for chunk in chunks)
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stream_ends_with_its_usage_on_request(client: openai.OpenAI, backend: RuleBackend) -> None:
    chunks = list(
        client.chat.completions.create(
            model="tiny-gpt", messages=HELLO, max_tokens=4, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (3, 4)


def test_choices_are_kept_apart_in_streams(client: openai.OpenAI, backend: RuleBackend) -> None:
    texts = {0: "", 1: "", 2: ""}
    stream = client.chat.completions.create(model="tiny-gpt", messages=HELLO, max_tokens=6, n=3, stream=True)
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == {choice: answer_to(PROMPT, 6, choice=choice) for choice in range(3)}


def test_a_stop_text_ends_the_answer_and_is_not_in_it(client: openai.OpenAI, backend: RuleBackend) -> None:
    text = answer_to(PROMPT, 40)
    stop = text.split(" ")[3]
    answer = client.chat.completions.create(model="tiny-gpt", messages=HELLO, max_tokens=40, stop=stop)
    assert answer.choices[0].message.content == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_log_probabilities_come_in_openais_form(client: openai.OpenAI, backend: RuleBackend) -> None:
    request = {"model": "tiny-gpt", "messages": HELLO, "max_tokens": 2, "logprobs": True, "top_logprobs": 2}
    content = client.chat.completions.create(**request).choices[0].logprobs.content  # type: ignore[call-overload]
    assert [item.logprob for item in content] == [-0.25, -0.25]
    assert [top.logprob for top in content[0].top_logprobs] == [-0.5, -1.5]
    assert bytes(content[0].bytes).decode() == content[0].token
    chunks = client.chat.completions.create(**request, stream=True)  # type: ignore[call-overload]
    streamed = [item for chunk in chunks if chunk.choices[0].logprobs for item in chunk.choices[0].logprobs.content]
    assert [(item.token, item.logprob) for item in streamed] == [(item.token, item.logprob) for item in content]


def test_completions_take_texts_and_token_ids_and_keep_their_order(client: openai.OpenAI, backend: RuleBackend) -> None:
    answer = client.completions.create(model="tiny-gpt", prompt=["first one", "second"], max_tokens=3, n=2)
    texts = [answer_to("first one", 3), answer_to("first one", 3, choice=1)]
    assert [choice.text for choice in answer.choices][:2] == texts
    assert [choice.text for choice in answer.choices][2:] == [answer_to("second", 3), answer_to("second", 3, choice=1)]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 12)
    assert client.completions.create(model="tiny-gpt", prompt=[5, 6, 7]).usage.prompt_tokens == 3  # type: ignore[union-attr]
    assert backend.generations[-1].sampling.max_tokens == 16
    assert client.completions.create(model="tiny-gpt", prompt=[[5, 6], [7]]).choices[1].index == 1


def test_streamed_completions_of_two_prompts_are_told_apart(client: openai.OpenAI, backend: RuleBackend) -> None:
    texts = {0: "", 1: ""}
    usages = []
    for chunk in client.completions.create(
        model="tiny-gpt",
        prompt=["first one", "second"],
        max_tokens=5,
        stream=True,
        stream_options={"include_usage": True},
    ):
        usages.append(chunk.usage)
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == {0: answer_to("first one", 5), 1: answer_to("second", 5)}
    assert usages[-1] is not None
    assert (usages[-1].prompt_tokens, usages[-1].completion_tokens) == (3, 10)


def test_completions_echo_their_prompt_and_place_log_probabilities(client: openai.OpenAI, backend: RuleBackend) -> None:
    request = {"model": "tiny-gpt", "prompt": "go on ", "max_tokens": 3, "echo": True, "logprobs": 1}
    choice = client.completions.create(**request).choices[0]  # type: ignore[call-overload]
    assert choice.text == "go on " + answer_to("go on ", 3)
    assert [choice.text[at:].startswith(token) for at, token in zip(*places(choice), strict=True)] == [True] * 3
    assert choice.logprobs.text_offset[0] == len("go on ")
    streamed = [chunk.choices[0] for chunk in client.completions.create(**request, stream=True)]  # type: ignore[call-overload]
    assert [place for one in streamed for place in one.logprobs.text_offset] == choice.logprobs.text_offset


def places(choice: Any) -> tuple[list[int], list[str]]:
    return choice.logprobs.text_offset, choice.logprobs.tokens


def test_embeddings_are_the_same_as_numbers_and_as_base64(client: openai.OpenAI, backend: RuleBackend) -> None:
    texts = ["a", "four"]
    plain = client.embeddings.create(model="minilm", input=texts, encoding_format="float")
    packed = client.embeddings.create(model="minilm", input=texts)  # the client asks for base64 by itself
    for number, text in enumerate(texts):
        expected = [math.cos(len(text)), math.sin(len(text)), 0.0]
        assert plain.data[number].embedding == pytest.approx(expected)
        assert packed.data[number].embedding == pytest.approx(expected, abs=1e-6)
    assert plain.usage.prompt_tokens == 5
    assert client.embeddings.create(model="minilm", input=[[1, 2], [3]]).data[1].index == 1


def test_models_are_listed_and_shown(client: openai.OpenAI, backend: RuleBackend) -> None:
    assert [model.id for model in client.models.list()] == ["digits", "minilm", "tiny-gpt", "tiny-plain"]
    assert client.models.retrieve("tiny-gpt").owned_by == "modelyard"
    with pytest.raises(openai.NotFoundError, match="did you mean 'tiny-gpt'"):
        client.models.retrieve("tiny-gtp")


def test_a_new_model_can_be_asked_at_once(client: openai.OpenAI, backend: RuleBackend) -> None:
    client.models.list()
    backend.list.append(served("fresh"))
    wait_until(lambda: _answers(client, "fresh"), 5)


def _answers(client: openai.OpenAI, model: str) -> bool:
    try:
        return bool(client.chat.completions.create(model=model, messages=HELLO, max_tokens=1).choices)
    except openai.NotFoundError:
        return False


@pytest.mark.parametrize(
    ("error", "expected", "code"),
    [
        (InputError("the prompt is too long", "shorten it"), openai.BadRequestError, "invalid_value"),
        (OverloadedError("too many calls wait", 3), openai.InternalServerError, "overloaded"),
        (UnavailableError("no replica of tiny-gpt runs"), openai.InternalServerError, "unavailable"),
        (RuntimeError("secret detail"), openai.InternalServerError, "internal_error"),
        (TimeoutError(), openai.InternalServerError, "timeout"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_before_the_first_token_have_their_status(
    client: openai.OpenAI,
    backend: RuleBackend,
    error: Exception,
    expected: type[openai.APIStatusError],
    code: str,
    stream: bool,
) -> None:
    backend.error = error
    with pytest.raises(expected) as caught:
        client.chat.completions.create(model="tiny-gpt", messages=HELLO, stream=stream)  # type: ignore[call-overload]
    assert caught.value.code == code
    assert "secret detail" not in str(caught.value)
    if code in ("overloaded", "unavailable"):
        assert caught.value.status_code == 503
        assert caught.value.response.headers["retry-after"] == ("3" if code == "overloaded" else "5")


def test_an_error_in_a_stream_ends_it_as_an_event(
    client: openai.OpenAI, backend: RuleBackend, gateway: Running
) -> None:
    backend.error, backend.error_after_tokens = UnavailableError("the replica died"), 4
    texts = []
    stream = client.chat.completions.create(model="tiny-gpt", messages=HELLO, max_tokens=9, stream=True)
    with pytest.raises(openai.APIError, match="the replica died"):
        texts.extend(chunk.choices[0].delta.content or "" for chunk in stream)
    assert "".join(texts) == answer_to(PROMPT, 3)
    wait_until(lambda: gateway.records[-1].outcome == "unavailable")
    assert gateway.records[-1].status == 200


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_breaks_off_is_an_error_not_a_short_answer(
    client: openai.OpenAI, backend: RuleBackend, stream: bool
) -> None:
    backend.breaks_off = True

    def ask() -> list[object]:
        request = {"model": "tiny-gpt", "messages": HELLO, "max_tokens": 3, "stream": stream}
        return list(client.chat.completions.create(**request))  # type: ignore[call-overload]

    with pytest.raises(openai.APIError, match="before the answer was whole"):
        ask()


def test_a_prompt_beyond_the_context_is_told_by_the_model_server(client: openai.OpenAI, backend: RuleBackend) -> None:
    long = "word " * (CONTEXT_TOKENS + 1)
    with pytest.raises(openai.BadRequestError, match="context"):
        client.completions.create(model="tiny-gpt", prompt=long)


@pytest.fixture
def hasty(keys: KeyStore, key: str, database: str) -> Iterator[tuple[openai.OpenAI, RuleBackend]]:
    slow = RuleBackend(delay_s=0.05)
    settings = GatewaySettings(database=database, request_timeout_s=0.4)
    with (
        running(slow, settings) as found,
        openai.OpenAI(base_url=f"{found.url}/v1", api_key=key, max_retries=0, timeout=20) as client,
    ):
        yield client, slow


def test_a_call_that_takes_too_long_is_stopped_and_names_the_setting(
    hasty: tuple[openai.OpenAI, RuleBackend],
) -> None:
    client, backend = hasty
    with pytest.raises(openai.InternalServerError, match="request_timeout_s") as caught:
        client.chat.completions.create(model="tiny-gpt", messages=HELLO, max_tokens=1_000)
    assert caught.value.status_code == 504
    wait_until(lambda: backend.running == 0)
    with pytest.raises(openai.APIError, match="request_timeout_s"):
        list(client.chat.completions.create(model="tiny-gpt", messages=HELLO, max_tokens=1_000, stream=True))
    wait_until(lambda: backend.running == 0)
    backend.delay_s = 5
    with pytest.raises(openai.InternalServerError, match="request_timeout_s"):
        client.embeddings.create(model="minilm", input="x")
    wait_until(lambda: backend.running == 0)
