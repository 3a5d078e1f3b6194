"""The OpenAPI document is true: whatever is made up from it gets an answer that it promises, and never a 5xx.

The requests are the same each time; `SCHEMA_EXAMPLES=400 pytest ... -s -m slow` makes more of them.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator

import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from tests.serving.gateway.backends import RuleBackend
from tests.serving.gateway.running import Running, running

from modelyard.security import KeyStore
from modelyard.serving.gateway import GatewaySettings

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
OPERATIONS = 9
ANSWER_S = 5.0
NAMES = [model.name for model in RuleBackend().list]


@pytest.fixture(scope="module")
def gateway(database: str) -> Iterator[Running]:
    with running(RuleBackend(), GatewaySettings(database=database, request_timeout_s=3)) as found:
        yield found


def attack(gateway: Running, key: str, examples: int) -> int:
    """Call every operation with `examples` requests that fit its schema, and as many that do not."""
    schema = schemathesis.openapi.from_url(f"{gateway.url}/openapi.json")
    count = 0
    for mode in schemathesis.GenerationMode:
        for found in schema.get_all_operations():
            operation = found.ok()

            @hypothesis.settings(
                max_examples=examples,
                derandomize=True,
                database=None,
                deadline=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @hypothesis.given(operation.as_strategy(generation_mode=mode))
            def one(case: schemathesis.Case) -> None:
                nonlocal count
                count += 1
                name_a_model(case, count)
                started = time.monotonic()
                answer = case.call(headers={"authorization": f"Bearer {key}"}, timeout=20)
                assert time.monotonic() - started < ANSWER_S
                case.validate_response(answer, checks=CHECKS)
                if answer.status_code >= 400:
                    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}

            try:
                one()
            except hypothesis.errors.Unsatisfiable:
                continue  # a path without parameters cannot be called wrongly
    return count


def name_a_model(case: schemathesis.Case, number: int) -> None:
    """Put a real model where four in five requests would have named none, so that they get further."""
    name = NAMES[number % len(NAMES)]
    if number % 5:
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = name
        if isinstance(case.path_parameters, dict) and "model" in case.path_parameters:
            case.path_parameters["model"] = name


def test_the_document_names_every_call_its_body_and_its_errors(gateway: Running) -> None:
    document = gateway.ask("/openapi.json").json()
    operations = {f"{m.upper()} {path}": one for path, by in document["paths"].items() for m, one in by.items()}
    assert len(operations) == OPERATIONS
    for name, operation in operations.items():
        assert "default" in operation["responses"]
        assert ("requestBody" in operation) == name.startswith("POST")
        assert ("security" in operation) == ("/v1/" in name)
        streams = "text/event-stream" in operation["responses"]["200"].get("content", {})
        assert streams == name.endswith("completions")
    chat = document["components"]["schemas"]["ChatBody"]
    assert {"messages", "max_completion_tokens", "top_k", "response_format"} <= set(chat["properties"])
    assert chat["required"] == ["model", "messages"]
    assert json.dumps(document).count("$ref") > 5


def test_requests_made_from_the_document_are_answered_as_it_says(gateway: Running, keys: KeyStore, key: str) -> None:
    assert attack(gateway, key, 15) >= 150
    answered = {(record.route, record.status) for record in gateway.records}
    for path in ("chat/completions", "completions", "embeddings"):
        assert {(f"POST /v1/{path}", status) for status in (200, 400, 404)} <= answered


@pytest.mark.slow
def test_a_thousand_requests_made_from_the_document_are_answered_as_it_says(
    gateway: Running, keys: KeyStore, key: str
) -> None:
    threads, before = threading.active_count(), len(gateway.records)
    count = attack(gateway, key, int(os.environ.get("SCHEMA_EXAMPLES", "150")))
    statuses = Counter(record.status for record in gateway.records[before:])
    print(f"\n{count} requests: {dict(sorted(statuses.items()))}")
    assert count >= 1_000
    assert max(statuses) < 500
    assert threading.active_count() <= threads + 40
