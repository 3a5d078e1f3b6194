"""A request the gateway cannot honour is refused with its status, its parameter, and what would work."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.serving.gateway.backends import CONTEXT_TOKENS, RuleBackend
from tests.serving.gateway.running import Reply, Running

MESSAGES = [{"role": "user", "content": "hello"}]
SCHEMA = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}


def chat(gateway: Running, key: str, **changes: Any) -> Reply:
    body = {"model": "tiny-gpt", "messages": MESSAGES, "max_tokens": 2, **changes}
    return gateway.ask("/v1/chat/completions", {k: v for k, v in body.items() if v is not ...}, key=key)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1_000_000_000}, "max_tokens"),
        ({"max_tokens": 2**70}, "max_tokens"),
        ({"max_tokens": CONTEXT_TOKENS + 1}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_completion_tokens": 5}, "max_tokens"),
        ({"max_tokens": ..., "max_completion_tokens": 10**9}, "max_completion_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"n": 0}, "n"),
        ({"n": 9}, "n"),
        ({"seed": 2**63}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", ""]}, "stop.1"),
        ({"stop": ["a", "a"]}, "stop"),
        ({"stop": list("abcde")}, "stop"),
        ({"stop": "x" * 257}, "stop"),
        ({"stop": 5}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"what": 1}}, "stream_options.what"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"messages": []}, "messages"),
        ({"messages": ...}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0.type"),
        ({"model": ...}, "model"),
        ({"model": ""}, "model"),
        ({"model": 5}, "model"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"temprature": 1}, "temprature"),
        ({"model": "digits"}, "model"),
    ],
    ids=lambda value: json.dumps(value, default=repr)[:60],
)
def test_a_bad_parameter_is_a_400_that_names_it(
    gateway: Running, key: str, backend: RuleBackend, changes: dict[str, Any], param: str
) -> None:
    reply = chat(gateway, key, **changes)
    assert (reply.status, reply.param) == (400, param), reply.body
    error = reply.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    assert backend.begun == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"tools": [], "tool_choice": "none", "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}},
        {"user": "u", "metadata": {"a": "b"}, "service_tier": "auto", "store": False, "parallel_tool_calls": True},
        {"temperature": None, "top_p": None, "n": None, "stop": None, "stream": None, "seed": None, "tools": None},
        {"max_tokens": 2.0, "temperature": 1, "n": 1.0},
        {"response_format": {"type": "text"}},
        {"max_tokens": CONTEXT_TOKENS, "stop": ["gear", "belt", "cam", "rod"]},
        {"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": "a", "name": "b"}]},
    ],
    ids=lambda value: json.dumps(value)[:60],
)
def test_parameters_that_change_nothing_pass(
    gateway: Running, key: str, backend: RuleBackend, changes: dict[str, Any]
) -> None:
    assert chat(gateway, key, **changes).status == 200


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"seed": 1}, "seed"),
        ({"logprobs": True}, "logprobs"),
        ({"response_format": SCHEMA}, "response_format"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
    ],
)
def test_what_the_engine_cannot_do_is_refused_by_its_name(
    gateway: Running, key: str, backend: RuleBackend, changes: dict[str, Any], param: str
) -> None:
    reply = chat(gateway, key, model="tiny-plain", **changes)
    assert (reply.status, reply.param, reply.code) == (400, param, "unsupported_parameter")
    assert "engine 'rule'" in reply.json()["error"]["message"]
    assert chat(gateway, key, model="tiny-gpt", **changes).status == 200


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("completions", {"prompt": ""}, "prompt"),
        ("completions", {"prompt": []}, "prompt"),
        ("completions", {"prompt": [[]]}, "prompt"),
        ("completions", {"prompt": ["a"] * 33}, "prompt"),
        ("completions", {"prompt": [1, "a"]}, "prompt"),
        ("completions", {"prompt": [-1]}, "prompt"),
        ("completions", {}, "prompt"),
        ("completions", {"prompt": "a", "suffix": "b"}, "suffix"),
        ("completions", {"prompt": "a", "best_of": 3}, "best_of"),
        ("completions", {"prompt": "a", "logprobs": 6}, "logprobs"),
        ("embeddings", {"input": ""}, "input"),
        ("embeddings", {"input": []}, "input"),
        ("embeddings", {"input": ["a"] * 257}, "input"),
        ("embeddings", {"input": "a", "dimensions": 5}, "dimensions"),
        ("embeddings", {"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ("predict/digits", {"inputs": []}, "inputs"),
        ("predict/digits", {}, "inputs"),
    ],
    ids=lambda value: json.dumps(value)[:40],
)
def test_the_other_paths_refuse_in_the_same_form(
    gateway: Running, key: str, backend: RuleBackend, path: str, body: dict[str, Any], param: str
) -> None:
    full = body if path.startswith("predict") else {"model": "tiny-gpt", **body}
    reply = gateway.ask(f"/v1/{path}", full, key=key)
    assert reply.status == 400, reply.body
    assert (reply.param or "").split(".")[0] == param
    assert backend.begun == 0


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b"\xff\xfe\x00",
        b'{"model": "\xff"}',
        b'{"model": "\\ud800"}',
        b'{"temperature": NaN}',
        b'{"temperature": Infinity}',
        b'{"temperature": 1e999}',
        b'{"seed": ' + b"9" * 5_000 + b"}",
        b"[" * 100_000,
        b'{"a":' * 100 + b"1" + b"}" * 100,
        b'{"model": "tiny-gpt", "x": [[[[' + b"[" * 60 + b"]" * 60 + b"]]]]}",
    ],
    ids=lambda body: repr(body[:24]),
)
def test_what_is_no_json_object_is_a_400(gateway: Running, key: str, body: bytes) -> None:
    reply = gateway.ask("/v1/chat/completions", body, key=key, content_type="application/json")
    assert (reply.status, reply.code) == (400, "invalid_json")


def test_a_body_that_says_it_is_something_else_is_a_415(gateway: Running, key: str) -> None:
    for headers in ({"content_type": "text/xml"}, {"content_encoding": "gzip"}):
        reply = gateway.ask("/v1/chat/completions", b"{}", key=key, **headers)
        assert (reply.status, reply.code) == (415, "unsupported_media_type")


def test_a_body_over_the_limit_is_a_413_before_it_is_parsed(gateway: Running, key: str) -> None:
    reply = chat(gateway, key, messages=[{"role": "user", "content": "x" * 2**21}])
    assert (reply.status, reply.code) == (413, "body_too_large")
    assert "max_body_bytes" in reply.json()["error"]["message"]
