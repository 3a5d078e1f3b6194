"""Tokens of an identity provider (OIDC): JWTs proved against the provider's published keys.

Only tokens of a named issuer, for a named audience, signed with a listed asymmetric algorithm and not expired pass.
Keys are read from the issuer's discovery document, kept, and read again when a token names one that is not known
(providers rotate them), at most once per `keys_refresh_s`, so that made-up key ids cannot turn into a flood.
"""

from __future__ import annotations

import base64
import json
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from joserfc import jwt
from joserfc.errors import JoseError
from joserfc.jwk import KeySet
from pydantic import Field, model_validator

from modelyard.config import Config
from modelyard.errors import AccessError, UnavailableError
from modelyard.security.callers import ALL_WORK, Caller, Work

Algorithm = Literal["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA", "Ed25519"]
_MAX_TOKEN_CHARACTERS = 8_192
_MAX_DOCUMENT_BYTES = 1_000_000
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


class TokenIssuer(Config):
    """An identity provider, and what its tokens allow."""

    issuer: str
    """The `iss` of its tokens, an https URL (http on this machine alone)."""
    audience: str
    """What `aud` must hold: the name under which the provider knows this gateway."""
    discovery_url: str | None = None
    """Where its OpenID configuration is; `<issuer>/.well-known/openid-configuration` by default."""
    algorithms: tuple[Algorithm, ...] = ("RS256", "ES256")
    """Signatures that count; symmetric ones and `none` never do."""
    tenant: str | None = None
    """The tenant of every token; None: the claim `tenant_claim` says."""
    tenant_claim: str = "tenant"
    models_claim: str | None = None
    """Claim with globs (a list, or a text with spaces) that narrows `models`; None: no token narrows it."""
    models: tuple[str, ...] = ("*",)
    """Globs over model names its callers may use."""
    work: tuple[Work, ...] = ALL_WORK
    """What its callers may ask for."""
    requests_per_minute: int | None = Field(default=None, gt=0)
    """Of each `sub`."""
    tokens_per_minute: int | None = Field(default=None, gt=0)
    """Of each `sub`."""
    leeway_s: float = Field(default=30.0, ge=0, le=300)
    """By how much clocks may differ."""
    keys_refresh_s: float = Field(default=10.0, gt=0)
    """The provider's keys are asked for at most this often."""
    keys_max_age_s: float = Field(default=3_600.0, gt=0)
    """Keys are not believed for longer without asking again: the provider may have withdrawn one."""
    fetch_timeout_s: float = Field(default=5.0, gt=0)
    """For one answer of the provider."""

    @model_validator(mode="after")
    def _only_safe_addresses(self) -> TokenIssuer:
        for url in (self.issuer, self.discovery_url):
            if url is not None and not _is_safe(url):
                raise ValueError(f"{url!r} is not an https URL")
        return self


class TokenVerifier:
    """Proves the tokens of one issuer. Thread-safe; `verify` may wait for the provider when a key is new."""

    def __init__(self, issuer: TokenIssuer, *, clock: Callable[[], float] = time.time) -> None:
        """Nothing is fetched before the first token."""
        self.issuer, self._clock = issuer, clock
        self._keys: dict[str, Any] = {}
        self._tried_s = self._fetched_s = float("-inf")
        self._failure: UnavailableError | None = None
        self._lock = threading.Lock()

    def is_ready_for(self, token: str) -> bool:
        """Whether `verify` will answer without asking the provider."""
        return _identity(_header(token)) in self._keys and not self._is_old()

    def verify(self, token: str) -> Caller:
        """The caller that a token proves.

        Raises:
            AccessError: the token proves nothing here; the text says why and holds none of it.
            UnavailableError: the provider's keys cannot be read.
        """
        header = _header(token)
        algorithms: Sequence[str] = self.issuer.algorithms
        if header.get("alg") not in algorithms:
            raise AccessError("the token is signed with an algorithm that does not count here", "ask for a new token")
        key = self._key(_identity(header))
        if key is None:
            raise AccessError("the token is signed with a key its issuer does not publish", "ask for a new token")
        now = self._clock()
        required = jwt.JWTClaimsRegistry(
            now=int(now),
            leeway=int(self.issuer.leeway_s),
            iss={"essential": True, "value": self.issuer.issuer},
            aud={"essential": True, "value": self.issuer.audience},
            sub={"essential": True},
            exp={"essential": True},
        )
        try:
            claims = jwt.decode(token, key, algorithms=list(algorithms)).claims
            required.validate(claims)
        except (JoseError, ValueError, TypeError) as error:
            reason = getattr(error, "error", "") or type(error).__name__
            claim = getattr(error, "claim", "")
            raise AccessError(
                f"the token is not valid: {reason}{f' ({claim})' if claim else ''}", "ask for a new token"
            ) from None
        return self._caller(claims)

    def _caller(self, claims: Mapping[str, Any]) -> Caller:
        issuer = self.issuer
        tenant = issuer.tenant or claims.get(issuer.tenant_claim)
        if not isinstance(tenant, str) or not tenant:
            raise AccessError(f"the token names no tenant in {issuer.tenant_claim!r}", "ask the provider's admin")
        models: tuple[str, ...] = ("*",)
        if issuer.models_claim is not None:
            given = claims.get(issuer.models_claim, ())
            globs = given.split() if isinstance(given, str) else given
            if not isinstance(globs, list | tuple) or not all(isinstance(glob, str) for glob in globs):
                raise AccessError(f"the claim {issuer.models_claim!r} is no list of globs", "ask the provider's admin")
            models = tuple(globs)
        return Caller(
            subject=f"oidc:{issuer.issuer}#{claims['sub']}",
            tenant=tenant,
            name=claims["sub"],
            models=models,
            within=issuer.models,
            work=issuer.work,
            requests_per_minute=issuer.requests_per_minute,
            tokens_per_minute=issuer.tokens_per_minute,
            expires_s=float(claims["exp"]) + issuer.leeway_s,
        )

    def _is_old(self) -> bool:
        return self._clock() - self._fetched_s >= self.issuer.keys_max_age_s

    def _key(self, identity: str) -> Any:
        if identity in self._keys and not self._is_old():
            return self._keys[identity]  # without the lock: another thread may be waiting for the provider under it
        with self._lock:
            age_s = self._clock() - self._tried_s
            if (identity not in self._keys or self._is_old()) and age_s >= self.issuer.keys_refresh_s:
                self._tried_s = self._clock()  # also when it fails: a provider that is down is not hammered
                try:
                    self._keys, self._failure = self._fetch(), None
                    self._fetched_s = self._tried_s
                except UnavailableError as error:
                    self._failure = error
            if self._failure is not None and (identity not in self._keys or self._is_old()):
                raise self._failure
            return self._keys.get(identity)

    def _fetch(self) -> dict[str, Any]:
        issuer = self.issuer
        discovery = issuer.discovery_url or f"{issuer.issuer.rstrip('/')}/.well-known/openid-configuration"
        document = self._read(discovery)
        if document.get("issuer") != issuer.issuer:
            raise UnavailableError(f"{discovery} speaks for another issuer", "correct `issuer` or `discovery_url`")
        where = document.get("jwks_uri")
        if not isinstance(where, str) or not _is_safe(where):
            raise UnavailableError(f"{discovery} names no https `jwks_uri`", "ask the provider's admin")
        signing = [k for k in self._read(where).get("keys", []) if isinstance(k, dict) and k.get("kty") != "oct"]
        try:
            keys = KeySet.import_key_set({"keys": signing})
        except (JoseError, ValueError, TypeError, KeyError) as error:
            raise UnavailableError(f"{where} holds no usable keys", "ask the provider's admin") from error
        return {key.kid or "": key for key in keys.keys if key.get("use", "sig") == "sig"}

    def _read(self, url: str) -> dict[str, Any]:
        try:
            with _OPENER.open(url, timeout=self.issuer.fetch_timeout_s) as answer:
                body = answer.read(_MAX_DOCUMENT_BYTES + 1)
            found = json.loads(body) if len(body) <= _MAX_DOCUMENT_BYTES else None
        except (OSError, ValueError) as error:
            raise UnavailableError(
                f"the identity provider did not answer at {url}", "try again; `fetch_timeout_s` bounds the wait"
            ) from error
        if not isinstance(found, dict):
            raise UnavailableError(f"{url} is no JSON object under {_MAX_DOCUMENT_BYTES} bytes", "correct the URL")
        return found


def claimed_issuer(token: str) -> str:
    """The issuer that a token names, not proved: it chooses the verifier.

    Raises:
        AccessError: this is no JWT.
    """
    return str(_part(token, 1).get("iss"))


def _header(token: str) -> dict[str, Any]:
    """Not proved, read only to choose algorithm and key."""
    return _part(token, 0)


def _part(token: str, number: int) -> dict[str, Any]:
    found = None
    if len(token) <= _MAX_TOKEN_CHARACTERS and token.count(".") == 2:
        text = token.split(".")[number]
        try:
            found = json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
        except (ValueError, RecursionError):
            found = None
    if not isinstance(found, dict):
        raise AccessError("this is neither an API key nor a token", "send `Authorization: Bearer KEY`")
    return found


def _identity(header: Mapping[str, Any]) -> str:
    return str(header.get("kid") or "")


def _is_safe(url: str) -> bool:
    parts = urllib.parse.urlsplit(url)
    return bool(parts.hostname) and (
        parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in _LOOPBACK)
    )


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A provider that is redirected elsewhere is not the one that was named."""

    def redirect_request(self, *args: Any, **others: Any) -> None:
        """Refuse."""


_OPENER = urllib.request.build_opener(_NoRedirects)
