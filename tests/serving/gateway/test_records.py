"""Each call leaves one record, one log line and its counts; none of them holds a secret or a prompt."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.serving.gateway.backends import RuleBackend, answer_to, served
from tests.serving.gateway.running import Running, running, wait_until
from tests.serving.gateway.test_predict import form, picture

from modelyard.security import KeyStore
from modelyard.serving.gateway import CallRecord, GatewaySettings

CHAT = {"model": "tiny-gpt", "messages": [{"role": "user", "content": "say hello"}], "max_tokens": 4}


def test_a_call_is_recorded_with_who_what_and_how_much(gateway: Running, backend: RuleBackend, keys: KeyStore) -> None:
    key = keys.create(tenant="vision", name="line-4")
    reply = gateway.ask("/v1/chat/completions", CHAT, key=key, x_request_id="order-66")
    assert reply.headers["x-request-id"] == "order-66"
    record = gateway.record_of(reply)
    assert dataclasses.replace(record, at_s=0, first_token_s=0, duration_s=0) == CallRecord(
        request_id="order-66",
        at_s=0,
        route="POST /v1/chat/completions",
        subject=f"key:{key[3:15]}",
        tenant="vision",
        site="lab",
        model="tiny-gpt",
        status=200,
        outcome="ok",
        prompt_tokens=3,
        completion_tokens=4,
        first_token_s=0,
        duration_s=0,
    )
    assert record.first_token_s is not None
    assert 0 < record.first_token_s <= record.duration_s


@pytest.mark.parametrize("given", ["a" * 65, "a b", "a\tb", "<script>", "é", ""])
def test_a_request_id_that_could_do_harm_is_replaced(gateway: Running, key: str, given: str) -> None:
    reply = gateway.ask("/v1/models", key=key, x_request_id=given)
    assert re.fullmatch(r"[0-9a-f]{32}", reply.headers["x-request-id"])


def test_refused_calls_are_recorded_too(gateway: Running, key: str) -> None:
    replies = [
        gateway.ask("/v1/chat/completions", CHAT),
        gateway.ask("/v1/chat/completions", {**CHAT, "model": "made-up-name"}, key=key),
        gateway.ask("/v1/chat/completions", b"{", key=key),
    ]
    records = [gateway.record_of(reply) for reply in replies]
    found = [(record.status, record.outcome, record.model, record.subject is not None) for record in records]
    assert found == [
        (401, "missing_api_key", None, False),
        (404, "model_not_found", None, True),
        (400, "invalid_json", None, True),
    ]


def test_an_audit_hook_that_fails_harms_no_call_and_is_counted(database: str, key: str) -> None:
    async def full(_: CallRecord) -> None:
        raise OSError("disk is full")

    with running(RuleBackend(), GatewaySettings(database=database), audit=full) as gateway:
        assert gateway.ask("/v1/chat/completions", CHAT, key=key).status == 200
        wait_until(lambda: b"modelyard_gateway_audit_failures_total 1.0" in gateway.ask("/metrics").body)


def test_metrics_count_calls_tokens_and_times_by_model(database: str, keys: KeyStore) -> None:
    key = keys.create(tenant="t", requests_per_minute=2)
    with running(RuleBackend(), GatewaySettings(database=database)) as gateway:
        for number in range(3):
            gateway.ask("/v1/chat/completions", {**CHAT, "stream": number == 0}, key=key)
        for number in range(20):
            gateway.ask(f"/v1/models/made-up-{number}", key=key)
            gateway.ask(f"/made-up-{number}", key=key, x_request_id=f"id-{number}")
        wait_until(lambda: b'route="unmatched",status="404"} 20.0' in gateway.ask("/metrics").body)
        text = gateway.ask("/metrics").body.decode()
    route = 'route="POST /v1/chat/completions"'
    for line in (
        f'requests_total{{model="tiny-gpt",outcome="ok",{route},status="200"}} 2.0',
        f'requests_total{{model="tiny-gpt",outcome="rate_limit_exceeded",{route},status="429"}} 1.0',
        'tokens_total{kind="prompt",model="tiny-gpt"} 6.0',
        'tokens_total{kind="completion",model="tiny-gpt"} 8.0',
        'first_token_seconds_count{model="tiny-gpt"} 2.0',
        'between_pieces_seconds_count{model="tiny-gpt"} 2.0',
        "in_flight 0.0",
        'limit_refusals_total{limit="requests"} 1.0',
    ):
        assert f"modelyard_gateway_{line}" in text
    assert "made-up" not in text
    assert key[3:15] not in text


def test_health_is_answered_without_a_key_and_readiness_tells_the_truth(database_file: str) -> None:
    backend = RuleBackend()
    with running(backend, GatewaySettings(database=database_file, models_cache_s=0.01)) as gateway:
        assert gateway.ask("/healthz").status == 200
        assert gateway.ask("/readyz").json() == {"status": "ready"}
        backend.list = []
        wait_until(lambda: gateway.ask("/readyz").status == 503)
        assert "no model is served" in gateway.ask("/readyz").json()["error"]["message"]
        assert gateway.ask("/healthz").status == 200
        backend.list = [served("tiny-gpt")]
        wait_until(lambda: gateway.ask("/readyz").status == 200)


def test_metrics_can_be_kept_in(database: str) -> None:
    with running(RuleBackend(), GatewaySettings(database=database, expose_metrics=False)) as gateway:
        assert gateway.ask("/metrics").status == 404


SERVER = """
import asyncio, logging, sys
logging.basicConfig(level=logging.DEBUG, stream=sys.stdout)
logging.getLogger("sqlalchemy").setLevel(logging.DEBUG)
from modelyard.serving.gateway import GatewaySettings, create_app
from modelyard.serving.gateway.server import server
from tests.serving.gateway.backends import RuleBackend
class Failing(RuleBackend):
    async def embed(self, model, texts, **options):
        raise RuntimeError(f"cannot embed {texts}")
serving = server(create_app(Failing(), GatewaySettings(database=sys.argv[1], max_body_bytes=200_000)), port=0)
async def main():
    task = asyncio.ensure_future(serving.serve())
    while not serving.started:
        await asyncio.sleep(0.01)
    print("PORT", serving.servers[0].sockets[0].getsockname()[1], flush=True)
    await task
asyncio.run(main(), debug=True)
"""


@pytest.fixture
def logged(database_file: str) -> Iterator[tuple[Running, Path]]:
    """A gateway in its own process that logs everything of every library into a file."""
    log = Path(database_file.removeprefix("sqlite:///")).with_name("log.txt")
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-X", "dev", "-c", SERVER, database_file],
            stdout=out,
            stderr=subprocess.STDOUT,
        )
        try:
            wait_until(lambda: b"PORT " in log.read_bytes(), 30)
            port = int(log.read_text().partition("PORT ")[2].split()[0])
            yield Running(port, []), log
        finally:
            process.terminate()
            process.wait(timeout=20)


def test_no_secret_and_no_prompt_is_ever_logged(logged: tuple[Running, Path], database_file: str) -> None:
    gateway, log = logged
    keys = KeyStore(database_file)
    key, gone = keys.create(tenant="t", requests_per_minute=50), keys.create(tenant="t")
    keys.revoke(gone[3:15])
    canary = "c4n4ry"
    prompt = f"{canary} my password is hunter2"
    body = {**CHAT, "messages": [{"role": "user", "content": prompt}]}
    image = base64.b64encode(picture()).decode()
    gateway.ask("/v1/chat/completions", body, key=key)
    gateway.ask("/v1/chat/completions", {**body, "stream": True}, key=key)
    gateway.ask("/v1/completions", {"model": "tiny-gpt", "prompt": prompt}, key=key)
    gateway.ask("/v1/chat/completions", {**body, "temperature": canary}, key=key)
    gateway.ask("/v1/chat/completions", {**body, canary: 1}, key=key)
    gateway.ask("/v1/chat/completions", {**body, "model": canary}, key=key)
    gateway.ask("/v1/chat/completions", f'{{"messages": "{canary}'.encode(), key=key)
    gateway.ask("/v1/chat/completions", {**body, "x": "y" * 300_000}, key=key)
    gateway.ask("/v1/embeddings", {"model": "minilm", "input": prompt}, key=key)  # fails with the prompt in its text
    gateway.ask("/v1/predict/digits", {"inputs": [image]}, key=key)
    gateway.ask("/v1/predict/digits", form(picture(), canary.encode())[0], key=key, content_type=form()[1])
    gateway.ask(f"/v1/models/{canary}?api_key={key}", key=key)
    gateway.ask(f"/{canary}?key={key}", key=gone)
    gateway.ask("/v1/models", key=gone)
    gateway.ask("/v1/models", key=key[:-1] + "!")
    gateway.ask("/v1/models", authorization=f"Basic {key}")
    gateway.ask("/v1/models", key=key, x_request_id=f"{canary} {key}")
    with gateway.socket() as connection:
        connection.sendall(f"GET / HTTP/9 {canary}\r\nauthorization: Bearer {key}\r\n\r\n".encode())
        connection.recv(1_000)
    wait_until(lambda: log.read_text().count('"request_id"') >= 17)
    text = log.read_text()
    marked = [line for line in text.splitlines() if line.startswith("INFO:modelyard.gateway.access:")]
    lines = [json.loads(line.partition("{")[1] + line.partition("{")[2]) for line in marked]
    assert {line["outcome"] for line in lines} >= {"ok", "internal_error", "invalid_value", "revoked_api_key"}
    assert "RuntimeError" in text
    assert "sqlalchemy" in text, "the log of every library is in it"
    answer = answer_to(f"user {prompt}", 4)
    for secret in (key, gone, key[16:], gone[16:], key[16:40], canary, "hunter2", image, image[:40], answer):
        assert secret not in text
