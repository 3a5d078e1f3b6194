"""The gateway as an ingress of Ray Serve answers, streams, refuses and cancels as it does under uvicorn."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import socket
import time
from collections.abc import Iterator

import openai
import pytest
from tests.serving.gateway.backends import answer_to
from tests.serving.gateway.running import Running, wait_until

from modelyard.security import KeyStore

pytestmark = pytest.mark.ray
HELLO = [{"role": "user", "content": "say hello"}]


@pytest.fixture(scope="module")
def gateway(ray_cluster: str, database: str) -> Iterator[Running]:
    from ray import serve

    def build() -> object:
        from tests.serving.gateway.backends import RuleBackend

        from modelyard.serving.gateway import GatewaySettings, create_app

        return create_app(RuleBackend(delay_s=0.01), GatewaySettings(database=database, max_body_bytes=2**20))

    @serve.deployment
    @serve.ingress(build)
    class Gateway:
        pass

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(Gateway.bind(), name="gateway", route_prefix="/")  # type: ignore[attr-defined]
    yield Running(port, [])
    serve.shutdown()


def test_the_client_gets_whole_and_streamed_answers_and_errors(gateway: Running, key: str) -> None:
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=key, max_retries=0, timeout=30) as client:
        whole = client.chat.completions.create(model="tiny-gpt", messages=HELLO, max_tokens=5)  # type: ignore[arg-type]
        assert whole.choices[0].message.content == answer_to("user say hello", 5)
        moments, text = [], ""
        stream = client.chat.completions.create(model="tiny-gpt", messages=HELLO, max_tokens=50, stream=True)  # type: ignore[arg-type]
        for chunk in stream:
            moments.append(time.monotonic())
            text += chunk.choices[0].delta.content or ""
        assert text == answer_to("user say hello", 50)
        assert moments[-1] - moments[0] > 0.25, "pieces come as they are made, not all at the end"
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("none")
    assert gateway.ask("/v1/models").status == 401
    assert gateway.ask("/v1/chat/completions", b"x" * 2**21, key=key).status == 413
    assert gateway.ask("/").status == 200


@pytest.mark.parametrize(
    ("given", "expected"), [("mine", r"mine"), (None, r"[0-9a-f-]{32,36}"), ("not one", r"not one, [0-9a-f]{32}")]
)
def test_the_request_id_comes_back_once_though_the_proxy_sends_it_too(
    gateway: Running, key: str, given: str | None, expected: str
) -> None:
    """Only an id that the gateway cannot use comes back beside the one that it used."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=20)) as connection:
        headers = {"authorization": f"Bearer {key}"} | ({"x-request-id": given} if given else {})
        connection.request("GET", "/v1/models", headers=headers)
        found = sorted(connection.getresponse().msg.get_all("x-request-id"), key=lambda value: value != given)
    assert re.fullmatch(expected, ", ".join(found))


def test_a_caller_who_leaves_cancels_the_work(gateway: Running, keys: KeyStore) -> None:
    key = keys.create(tenant="t")
    body = json.dumps({"model": "tiny-gpt", "messages": HELLO, "max_tokens": 2_000, "stream": True}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {key}\r\n"
    with gateway.socket() as connection:
        connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        assert connection.recv(1_000)
        assert b"modelyard_gateway_in_flight 1.0" in gateway.ask("/metrics").body
    wait_until(lambda: b"modelyard_gateway_in_flight 0.0" in gateway.ask("/metrics").body)
    assert b'outcome="cancelled"' in gateway.ask("/metrics").body
