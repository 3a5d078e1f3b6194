"""A backend, a database with keys, and one running gateway for the tests of a module."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from tests.serving.gateway.backends import RuleBackend
from tests.serving.gateway.running import Running, running

from modelyard.security import KeyStore
from modelyard.serving.gateway import GatewaySettings


@pytest.fixture(scope="module")
def shared_backend() -> RuleBackend:
    return RuleBackend()


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('gateway') / 'gateway.db'}"


@pytest.fixture(scope="module")
def keys(database: str) -> Iterator[KeyStore]:
    store = KeyStore(database)
    yield store
    store.close()


@pytest.fixture(scope="module")
def key(keys: KeyStore) -> str:
    """A key without bounds."""
    return keys.create(tenant="tests")


@pytest.fixture(scope="module")
def gateway(shared_backend: RuleBackend, database: str) -> Iterator[Running]:
    settings = GatewaySettings(database=database, key_cache_s=0.2, max_body_bytes=2**20, site="lab")
    with running(shared_backend, settings) as found:
        yield found


@pytest.fixture
def backend(shared_backend: RuleBackend) -> RuleBackend:
    """The backend of `gateway`, with its knobs back at rest."""
    shared_backend.__init__()  # type: ignore[misc]
    return shared_backend


@pytest.fixture
def client(gateway: Running, key: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=key, max_retries=0, timeout=20) as found:
        yield found


@pytest.fixture
def database_file(tmp_path: Path) -> str:
    """A database of this test alone."""
    return f"sqlite:///{tmp_path / 'own.db'}"
