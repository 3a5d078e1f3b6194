"""Only a token of the named issuer, for us, signed with its published key and not expired proves a caller."""

from __future__ import annotations

import base64
import hmac
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.hashes import SHA256
from joserfc.jwk import ECKey, RSAKey
from tests.security.provider import NOW_S, Provider

from modelyard.config import parse
from modelyard.errors import AccessError, ConfigError, UnavailableError
from modelyard.security import Caller, TokenIssuer, TokenVerifier


class Clock:
    def __init__(self) -> None:
        self.now_s = float(NOW_S)

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture(scope="module")
def running_provider() -> Iterator[Provider]:
    found = Provider()
    yield found
    found.server.shutdown()
    found.server.server_close()


@pytest.fixture
def provider(running_provider: Provider) -> Iterator[Provider]:
    keys = list(running_provider.keys)
    running_provider.asked.clear()
    yield running_provider
    running_provider.keys[:] = keys
    running_provider.is_down = False


@pytest.fixture
def clock() -> Clock:
    return Clock()


def verifier(provider: Provider, clock: Clock, **changes: Any) -> TokenVerifier:
    issuer = parse(TokenIssuer, {"issuer": provider.url, "audience": "modelyard", **changes})
    return TokenVerifier(issuer, clock=clock)


def test_a_good_token_proves_its_caller(provider: Provider, clock: Clock) -> None:
    bounds = {"models": ["tiny-*"], "models_claim": "models", "requests_per_minute": 5, "tokens_per_minute": 50}
    found = verifier(provider, clock, **bounds).verify(provider.token(models="*-gpt digits"))
    assert found == Caller(
        subject=f"oidc:{provider.url}#ada",
        tenant="vision",
        name="ada",
        models=("*-gpt", "digits"),
        within=("tiny-*",),
        requests_per_minute=5,
        tokens_per_minute=50,
        expires_s=NOW_S + 60 + 30,
    )
    assert found.visible(["tiny-gpt", "large-gpt", "tiny-bert", "digits"]) == ["tiny-gpt"]


def test_keys_are_fetched_once(provider: Provider, clock: Clock) -> None:
    proving = verifier(provider, clock)
    assert not proving.is_ready_for(provider.token())
    for _ in range(3):
        proving.verify(provider.token())
    assert proving.is_ready_for(provider.token())
    assert len(provider.asked) == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"iss": "https://elsewhere.example"},
        {"iss": None},
        {"aud": "another"},
        {"aud": None},
        {"aud": ["a", "b"]},
        {"exp": NOW_S - 31},
        {"exp": None},
        {"exp": "tomorrow"},
        {"nbf": NOW_S + 31},
        {"sub": None},
        {"sub": 7},
        {"tenant": None},
        {"tenant": ""},
        {"tenant": ["a"]},
    ],
    ids=str,
)
def test_a_token_with_a_wrong_claim_is_refused(provider: Provider, clock: Clock, changes: dict[str, Any]) -> None:
    with pytest.raises(AccessError):
        verifier(provider, clock).verify(provider.token(**changes))


@pytest.mark.parametrize(
    "changes", [{"aud": ["other", "modelyard"]}, {"exp": NOW_S - 29}, {"nbf": NOW_S + 29}], ids=str
)
def test_audience_lists_and_clocks_a_little_apart_pass(
    provider: Provider, clock: Clock, changes: dict[str, Any]
) -> None:
    assert verifier(provider, clock).verify(provider.token(**changes)).tenant == "vision"


def signed(header: dict[str, Any], claims: dict[str, Any], sign: Callable[[bytes], bytes] = lambda _: b"") -> str:
    parts = [_text(json.dumps(part).encode()) for part in (header, claims)]
    return ".".join([*parts, _text(sign(".".join(parts).encode()))])


def _text(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()


def test_forged_tokens_are_refused(provider: Provider, clock: Clock) -> None:
    proving = verifier(provider, clock)
    claims = {"iss": provider.url, "aud": "modelyard", "sub": "ada", "tenant": "vision", "exp": NOW_S + 60}
    public = provider.keys[0].as_pem(private=False)
    stranger = RSAKey.generate_key(2048, {"kid": "one"})
    head, body, signature = provider.token().split(".")
    forged = {
        "alg none": signed({"alg": "none", "kid": "one"}, claims),
        "alg None": signed({"alg": "None", "kid": "one"}, claims),
        "no alg": signed({"kid": "one"}, claims),
        "public key as a shared secret": signed(
            {"alg": "HS256", "kid": "one"}, claims, lambda text: hmac.digest(public, text, "sha256")
        ),
        "an algorithm that is not listed": provider.token({"alg": "PS256"}),
        "another's key under our id": provider.token(key=stranger),
        "key in the header": provider.token({"jwk": stranger.as_dict(private=False)}, stranger),
        "no signature": f"{head}.{body}.",
        "changed claims": f"{head}.{signed({}, {**claims, 'tenant': 'admin'}).split('.')[1]}.{signature}",
        "unknown critical header": signed(
            {"alg": "RS256", "kid": "one", "crit": ["x"], "x": 1},
            claims,
            lambda text: provider.keys[0].private_key.sign(text, PKCS1v15(), SHA256()),  # type: ignore[union-attr, call-arg, misc]
        ),
    }
    for name, token in forged.items():
        with pytest.raises(AccessError):
            pytest.fail(f"{name} passed as {proving.verify(token)}")


@pytest.mark.parametrize("text", ["", "a.b", "a.b.c.d", "..", "é.é.é", "W10.W10.", "x" * 9_000 + "..", "null"])
def test_what_is_no_token_is_refused_without_asking_the_provider(provider: Provider, clock: Clock, text: str) -> None:
    with pytest.raises(AccessError):
        verifier(provider, clock).verify(text)
    assert provider.asked == []


def test_a_rotated_key_is_found_and_made_up_ids_cannot_flood_the_provider(provider: Provider, clock: Clock) -> None:
    proving = verifier(provider, clock, algorithms=["RS256", "ES256"], keys_refresh_s=10)
    proving.verify(provider.token())
    provider.keys.append(ECKey.generate_key("P-256", {"kid": "two"}))
    rotated = provider.token({"alg": "ES256", "kid": "two"}, provider.keys[1])
    clock.now_s += 9.0
    with pytest.raises(AccessError, match="does not publish"):
        proving.verify(rotated)  # asked for a moment ago
    clock.now_s += 2.0
    assert proving.verify(rotated).name == "ada"
    asked = len(provider.asked)
    for number in range(50):
        with pytest.raises(AccessError):
            proving.verify(provider.token({"kid": f"made-up-{number}"}))
    assert len(provider.asked) == asked


def test_a_withdrawn_key_is_refused_when_keys_are_old(provider: Provider, clock: Clock) -> None:
    proving = verifier(provider, clock, keys_max_age_s=600)
    token = provider.token(exp=NOW_S + 10_000)
    proving.verify(token)
    provider.keys[:] = [RSAKey.generate_key(2048, {"kid": "new"})]
    clock.now_s += 599
    assert proving.verify(token).name == "ada"
    clock.now_s += 2
    with pytest.raises(AccessError):
        proving.verify(token)


def test_a_provider_that_is_down_is_unavailable_and_not_hammered(provider: Provider, clock: Clock) -> None:
    proving = verifier(provider, clock)
    provider.is_down = True
    for _ in range(5):
        with pytest.raises(UnavailableError, match="did not answer"):
            proving.verify(provider.token())
    assert len(provider.asked) == 1
    provider.is_down = False
    clock.now_s += 11
    assert proving.verify(provider.token()).name == "ada"


def test_known_keys_prove_tokens_while_the_provider_is_slow(provider: Provider, clock: Clock) -> None:
    proving = verifier(provider, clock)
    proving.verify(provider.token())
    clock.now_s += 20
    provider.may_answer.clear()

    def ask() -> None:
        with pytest.raises(AccessError):
            proving.verify(provider.token({"kid": "new"}))

    asking = threading.Thread(target=ask)
    try:
        asked = len(provider.asked)
        asking.start()
        deadline = time.monotonic() + 10
        while len(provider.asked) == asked and time.monotonic() < deadline:
            time.sleep(0.005)
        assert proving.verify(provider.token()).name == "ada"
        assert asking.is_alive(), "the provider has not answered yet"
    finally:
        provider.may_answer.set()
        asking.join(timeout=10)


def test_a_provider_that_speaks_for_another_issuer_is_not_believed(provider: Provider, clock: Clock) -> None:
    proving = TokenVerifier(
        TokenIssuer(
            issuer="https://real.example",
            audience="modelyard",
            discovery_url=f"{provider.url}/.well-known/openid-configuration",
        ),
        clock=clock,
    )
    with pytest.raises(UnavailableError, match="another issuer"):
        proving.verify(provider.token(iss="https://real.example"))


@pytest.mark.parametrize("url", ["http://provider.example", "ftp://127.0.0.1", "provider.example", ""])
def test_an_issuer_without_tls_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="https"):
        parse(TokenIssuer, {"issuer": url, "audience": "modelyard"})


@pytest.mark.parametrize("algorithm", ["none", "HS256"])
def test_algorithms_that_prove_nothing_cannot_be_configured(algorithm: str) -> None:
    with pytest.raises(ConfigError):
        parse(TokenIssuer, {"issuer": "https://a.example", "audience": "b", "algorithms": [algorithm]})
