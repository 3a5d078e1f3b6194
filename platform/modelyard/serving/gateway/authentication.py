"""From the `Authorization` header to a `Caller`, at the price of one SHA-256.

Records of keys are kept for `key_cache_s`, those of unknown ids as well; the key itself is proved against its record
each time. So revoking takes effect on every replica within that time, with no message between them, and when the
database is gone no key is believed for longer than that.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from modelyard.errors import AccessError, OverloadedError
from modelyard.security import Caller, KeyStore, TokenQuota, TokenVerifier
from modelyard.security.keys import KeyRecord, key_id
from modelyard.security.tokens import claimed_issuer
from modelyard.serving.gateway.errors import CallError
from modelyard.serving.gateway.settings import GatewaySettings

_MAX_CACHED = 10_000
_MAX_LOOKUPS = 256
_CHALLENGE = {"www-authenticate": "Bearer"}
_OPEN = Caller(subject="open", tenant="open")

T = TypeVar("T")


class Authentication:
    """Proves callers; one for each replica."""

    def __init__(self, keys: KeyStore | None, settings: GatewaySettings) -> None:
        """Without `keys` everyone is let in."""
        self._keys, self._settings = keys, settings
        self._records: OrderedDict[str, tuple[float, KeyRecord | None]] = OrderedDict()
        self._quotas: OrderedDict[str, tuple[float, TokenQuota]] = OrderedDict()
        self._verifiers = {issuer.issuer: TokenVerifier(issuer) for issuer in settings.issuers}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="gateway-keys")
        self._provider_thread = ThreadPoolExecutor(1, thread_name_prefix="gateway-issuers")
        self._lookups = 0

    async def caller(self, authorization: str | None) -> Caller:
        """Who calls.

        Raises:
            CallError: 401, it is not proved.
            UnavailableError: the identity provider does not answer.
            StorageError: the database does not answer.
        """
        if self._keys is None:
            return _OPEN
        scheme, _, credential = (authorization or "").partition(" ")
        credential = credential.strip()
        if scheme.lower() != "bearer" or not credential:
            raise _denied("missing_api_key", "send your API key as `Authorization: Bearer KEY`")
        identity = key_id(credential)
        if identity is not None:
            return await self._by_key(self._keys, identity, credential)
        if self._verifiers:
            return await self._by_token(credential)
        raise _denied("invalid_api_key", "this is no API key of this gateway")

    async def quota(self, caller: Caller) -> TokenQuota:
        """What the caller's tenant may use; as old as `key_cache_s`."""
        if self._keys is None:
            return TokenQuota()
        cached = self._quotas.get(caller.tenant)
        if cached is not None and cached[0] > time.monotonic():
            return cached[1]
        quota = await self._look_up(self._keys.quota, caller.tenant)
        self._keep(self._quotas, caller.tenant, quota)
        return quota

    def close(self) -> None:
        """Let go of the database."""
        self._thread.shutdown(wait=True)
        self._provider_thread.shutdown(wait=True)
        if self._keys is not None:
            self._keys.close()

    async def _by_key(self, keys: KeyStore, identity: str, key: str) -> Caller:
        cached = self._records.get(identity)
        if cached is not None and cached[0] > time.monotonic():
            record = cached[1]
        else:
            record = await self._look_up(keys.find, identity)
            self._keep(self._records, identity, record)
        if record is None or not record.opens_for(key):
            raise _denied("invalid_api_key", "this is no API key of this gateway")
        state = record.state(time.time())
        if state != "active":
            raise _denied(f"{state}_api_key", f"the key {identity} is {state}; ask for a new one")
        return record.caller

    async def _by_token(self, token: str) -> Caller:
        try:
            issuer = claimed_issuer(token)
            verifier = self._verifiers.get(issuer)
            if verifier is None:
                raise _denied("invalid_token", "the token is of an issuer that does not count here")
            if verifier.is_ready_for(token):
                return verifier.verify(token)
            return await self._look_up(verifier.verify, token, self._provider_thread)
        except AccessError as error:
            raise _denied("invalid_token", f"{error.problem}; {error.todo}") from None

    async def _look_up(self, ask: Callable[[str], T], name: str, thread: ThreadPoolExecutor | None = None) -> T:
        """Off the event loop. A provider that is slow has a thread of its own, so that it holds up no API key."""
        if self._lookups >= _MAX_LOOKUPS:
            raise OverloadedError("too many new keys at once", 1.0)
        self._lookups += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(thread or self._thread, ask, name)
        finally:
            self._lookups -= 1

    def _keep(self, cache: OrderedDict[str, tuple[float, T]], name: str, value: T) -> None:
        cache[name] = (time.monotonic() + self._settings.key_cache_s, value)
        cache.move_to_end(name)
        if len(cache) > _MAX_CACHED:
            cache.popitem(last=False)


def _denied(code: str, message: str) -> CallError:
    return CallError(401, code, message, headers=_CHALLENGE)
