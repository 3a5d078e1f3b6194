"""Who may ask what, and how much of it."""

from __future__ import annotations

import base64
import sqlite3
import time

import openai
import pytest
from tests.security.provider import Provider
from tests.serving.gateway.backends import RuleBackend
from tests.serving.gateway.running import Reply, Running, running, wait_until

from modelyard.security import KeyStore, TokenIssuer, TokenQuota
from modelyard.security.keys import key_id
from modelyard.serving.gateway import GatewaySettings

CHAT = {"model": "tiny-gpt", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}


def chat(gateway: Running, key: str | None, **changes: object) -> Reply:
    return gateway.ask("/v1/chat/completions", {**CHAT, **changes}, key=key)


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/tiny-gpt"])
def test_nothing_under_v1_is_told_without_a_key(gateway: Running, path: str) -> None:
    reply = gateway.ask(path)
    assert (reply.status, reply.code) == (401, "missing_api_key")
    assert reply.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    ("header", "code"),
    [
        ("", "missing_api_key"),
        ("Bearer", "missing_api_key"),
        ("Basic dXNlcjpwdw==", "missing_api_key"),
        ("Bearer sk-something", "invalid_api_key"),
        ("Bearer my-0123456789ab-" + "A" * 43, "invalid_api_key"),
        ("Bearer a.b.c", "invalid_api_key"),
        ("Bearer \xff\xfe", "invalid_api_key"),
    ],
)
def test_what_is_no_key_is_refused_before_the_body_is_read(
    gateway: Running, backend: RuleBackend, header: str, code: str
) -> None:
    reply = gateway.ask("/v1/chat/completions", b"{not json", authorization=header)
    assert (reply.status, reply.code) == (401, code)


def test_a_key_with_one_wrong_character_is_refused(gateway: Running, key: str) -> None:
    wrong = key[:-1] + ("A" if key[-1] != "A" else "B")
    assert chat(gateway, key).status == 200
    assert (chat(gateway, wrong).status, chat(gateway, wrong).code) == (401, "invalid_api_key")


def test_an_expired_key_is_refused(gateway: Running, keys: KeyStore) -> None:
    key = keys.create(tenant="t", lifetime_s=0.3)
    assert chat(gateway, key).status == 200
    wait_until(lambda: chat(gateway, key).status == 401, 3)
    assert chat(gateway, key).code == "expired_api_key"


def test_a_revoked_key_stops_on_every_replica_within_its_setting(keys: KeyStore, database: str) -> None:
    key = keys.create(tenant="t")
    settings = GatewaySettings(database=database, key_cache_s=0.5)
    with running(RuleBackend(), settings) as first, running(RuleBackend(), settings) as second:
        assert [chat(one, key).status for one in (first, second)] == [200, 200]
        keys.revoke(key_id(key) or "")
        revoked_s = time.monotonic()
        for one in (first, second):
            wait_until(lambda one=one: chat(one, key).code_or_ok == "revoked_api_key")  # type: ignore[misc]
        assert time.monotonic() - revoked_s < 0.5 + 1.0  # and a second for a busy machine


def test_a_key_sees_and_uses_its_own_models_alone(gateway: Running, keys: KeyStore) -> None:
    key = keys.create(tenant="t", models=["tiny-g*", "dig*"])
    listed = gateway.ask("/v1/models", key=key).json()["data"]
    assert [model["id"] for model in listed] == ["digits", "tiny-gpt"]
    assert chat(gateway, key).status == 200
    refused = chat(gateway, key, model="tiny-plain")
    assert (refused.status, refused.code, refused.param) == (403, "model_not_allowed", "model")
    assert gateway.ask("/v1/models/tiny-plain", key=key).status == 403


def test_an_unknown_model_is_a_404_that_lists_the_keys_own(gateway: Running, keys: KeyStore) -> None:
    reply = chat(gateway, keys.create(tenant="t", models=["tiny-*"]), model="gpt-17")
    assert (reply.status, reply.code, reply.param) == (404, "model_not_found", "model")
    message = reply.json()["error"]["message"]
    assert "tiny-gpt" in message
    assert "tiny-plain" in message
    assert "digits" not in message


def test_a_key_does_its_own_kind_of_work_alone(gateway: Running, keys: KeyStore) -> None:
    key = keys.create(tenant="t", work=["embed"])
    assert (chat(gateway, key).status, chat(gateway, key).code) == (403, "work_not_allowed")
    assert gateway.ask("/v1/embeddings", {"model": "minilm", "input": "a"}, key=key).status == 200


def test_the_home_of_a_key_goes_to_the_backend_and_its_answer_says_where_it_was(
    gateway: Running, backend: RuleBackend, keys: KeyStore
) -> None:
    key = keys.create(tenant="t", site="plant")
    assert chat(gateway, key).headers["x-modelyard-site"] == "lab"
    assert backend.generations[0].site == "plant"
    backend.site = "plant"
    reply = chat(gateway, key)
    assert reply.headers["x-modelyard-site"] == "plant"
    assert gateway.record_of(reply).site == "plant"


@pytest.mark.parametrize(
    ("path", "body"),
    [("/v1/embeddings", {"model": "minilm", "input": "a"}), ("/v1/predict/minilm", {"inputs": [[1, 2]]})],
    ids=["embedding", "prediction"],
)
def test_embeddings_and_predictions_go_home_too_and_say_who_answered(
    gateway: Running, backend: RuleBackend, keys: KeyStore, path: str, body: dict[str, object]
) -> None:
    key = keys.create(tenant="t", site="plant")
    assert gateway.ask(path, body, key=key).headers["x-modelyard-site"] == "lab", "the gateway's own"
    assert backend.asked_site == "plant"
    backend.site = "mill"
    reply = gateway.ask(path, body, key=key, X_Modelyard_Site="mill")
    assert (backend.asked_site, reply.headers["x-modelyard-site"]) == ("mill", "mill")
    assert gateway.record_of(reply).site == "mill"


def test_requests_beyond_the_limit_are_refused_with_openais_headers(
    gateway: Running, backend: RuleBackend, keys: KeyStore
) -> None:
    key = keys.create(tenant="t", requests_per_minute=3)
    replies = [chat(gateway, key) for _ in range(5)]
    assert [reply.status for reply in replies] == [200, 200, 200, 429, 429]
    assert [reply.headers["x-ratelimit-remaining-requests"] for reply in replies] == ["2", "1", "0", "0", "0"]
    assert replies[0].headers["x-ratelimit-limit-requests"] == "3"
    assert 0 < int(replies[3].headers["retry-after"]) <= 61
    assert replies[3].code == "rate_limit_exceeded"
    assert replies[3].json()["error"]["type"] == "requests"
    assert backend.begun == 3
    text = gateway.ask("/metrics").body.decode()
    assert 'modelyard_gateway_limit_refusals_total{limit="requests"} 2.0' in text


def test_openais_client_retries_by_our_headers(gateway: Running, keys: KeyStore) -> None:
    key = keys.create(tenant="t", tokens_per_minute=100)
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=key, max_retries=2, timeout=20) as client:
        started = time.monotonic()
        with pytest.raises(openai.RateLimitError, match="can never fit"):
            client.chat.completions.create(
                model="tiny-gpt", messages=[{"role": "user", "content": "x"}], max_tokens=500
            )
        assert time.monotonic() - started < 2, "it was told that retrying is of no use"


def test_tokens_are_settled_with_what_was_used(gateway: Running, backend: RuleBackend, keys: KeyStore) -> None:
    key = keys.create(tenant="t", tokens_per_minute=300)
    stops = ["gear", "belt", "cam", "rod"]
    statuses = [chat(gateway, key, max_tokens=100, stop=stops).status for _ in range(8)]
    assert statuses == [200] * 8, "each reserves over 100 of the 300, and uses a handful"


def test_the_quota_of_a_tenant_holds_for_all_its_keys(gateway: Running, keys: KeyStore) -> None:
    keys.set_quota("small", TokenQuota(tokens_per_day=40))
    first, second = (keys.create(tenant="small") for _ in range(2))
    assert [chat(gateway, first, max_tokens=20).status for _ in range(2)] == [200, 429]
    refused = chat(gateway, second, max_tokens=20)
    assert (refused.status, refused.code) == (429, "insufficient_quota")
    assert int(refused.headers["retry-after"]) <= 86_400


def test_limits_hold_over_two_replicas(keys: KeyStore, database: str) -> None:
    key = keys.create(tenant="t", requests_per_minute=10)
    settings = GatewaySettings(database=database)
    with running(RuleBackend(), settings) as first, running(RuleBackend(), settings) as second:
        statuses = [chat((first, second)[number % 2], key).status for number in range(16)]
    assert statuses.count(200) == 10
    assert statuses.count(429) == 6


def test_tokens_of_an_identity_provider_count_as_keys(database: str) -> None:
    provider = Provider()
    issuer = TokenIssuer(
        issuer=provider.url, audience="modelyard", models=("tiny-*",), requests_per_minute=2, leeway_s=0
    )
    soon, past = int(time.time()) + 60, int(time.time()) - 5
    try:
        with running(RuleBackend(), GatewaySettings(database=database, issuers=(issuer,))) as gateway:
            token = provider.token(exp=soon)
            replies = [chat(gateway, token) for _ in range(3)]
            assert [reply.status for reply in replies] == [200, 200, 429]
            assert chat(gateway, token, model="minilm").status == 403
            record = gateway.record_of(replies[0])
            assert (record.subject, record.tenant) == (f"oidc:{provider.url}#ada", "vision")
            for bad in (provider.token(exp=past), provider.token(aud="x", exp=soon), token[:-4] + "AAAA", "a.b.c"):
                assert (chat(gateway, bad).status, chat(gateway, bad).code) == (401, "invalid_token")
            none = base64.urlsafe_b64encode(b'{"alg":"none","kid":"one"}').decode().rstrip("=")
            unsigned = f"{none}.{token.split('.')[1]}."
            other = provider.token(iss="https://elsewhere.example", exp=soon)
            for forged in (unsigned, other):
                assert (chat(gateway, forged).status, chat(gateway, forged).code) == (401, "invalid_token")
            provider.is_down = True
            assert chat(gateway, provider.token({"kid": "new"}, exp=soon)).status in (401, 503)
    finally:
        provider.server.shutdown()
        provider.server.server_close()


def test_open_access_needs_no_key() -> None:
    with running(RuleBackend(), GatewaySettings(open_access=True)) as gateway:
        assert chat(gateway, None).status == 200
        assert "x-ratelimit-limit-requests" not in chat(gateway, None).headers


def test_the_database_gone_means_503_not_open_doors(database_file: str) -> None:
    own = KeyStore(database_file)
    key = own.create(tenant="t")
    own.close()
    with running(RuleBackend(), GatewaySettings(database=database_file, key_cache_s=0.1)) as gateway:
        assert chat(gateway, key).status == 200
        with sqlite3.connect(database_file.removeprefix("sqlite:///")) as connection:
            connection.execute("drop table gateway_keys")
        wait_until(lambda: chat(gateway, key).status == 503)
        reply = chat(gateway, key)
        assert (reply.code, reply.headers["retry-after"]) == ("unavailable", "5")
        assert "sqlite" not in reply.json()["error"]["message"]


@pytest.mark.parametrize(("path", "method", "status"), [("/v1/nothing", "GET", 404), ("/v1/models", "POST", 405)])
def test_wrong_paths_and_methods_are_told_in_openais_form(
    gateway: Running, path: str, method: str, status: int
) -> None:
    reply = gateway.ask(path, method=method)
    assert (reply.status, reply.json()["error"]["type"]) == (status, "invalid_request_error")


def test_other_origins_may_not_call_unless_they_are_named(gateway: Running, database: str) -> None:
    asked = {"Origin": "https://shop.example", "Access_Control_Request_Method": "POST"}
    refused = gateway.ask("/v1/chat/completions", method="OPTIONS", **asked)
    assert "access-control-allow-origin" not in refused.headers
    settings = GatewaySettings(database=database, cors_origins=("https://shop.example",))
    with running(RuleBackend(), settings) as named:
        allowed = named.ask("/v1/chat/completions", method="OPTIONS", **asked)
        assert allowed.headers["access-control-allow-origin"] == "https://shop.example"
        other = named.ask("/v1/models", Origin="https://other.example")
        assert other.status == 401
        assert "access-control-allow-origin" not in other.headers
