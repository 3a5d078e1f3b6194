"""Two real classifiers and two real language models, trained or made once."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tests.serving.cascade import digits
from tests.serving.models import tiny_llama

from modelyard.artifacts import Parent, Registry, Store, VersionInfo
from modelyard.errors import UnavailableError
from modelyard.serving.engines.choice import Machine
from modelyard.serving.model_server import ModelServer
from modelyard.serving.protocol import Generation, OnSite, Piece, ServedModel, Usage
from modelyard.serving.server_config import ModelConfig, ServerConfig

NAMES = ("mlp", "cnn", "terse", "fluent")


class Stock(NamedTuple):
    """A registry of the four models, and rows that none of the classifiers saw."""

    home: Path
    versions: dict[str, VersionInfo]
    held_out: digits.Digits


@pytest.fixture(scope="session")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Stock:
    pytest.importorskip("sklearn")
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("cascade")
    seen, held_out = digits.split()
    digits.trained(digits.SMALL, seen, root / "mlp", steps=200)
    digits.trained(digits.LARGE, seen, root / "cnn", steps=100)
    tiny_llama(root / "terse", seed=1, num_hidden_layers=1)
    tiny_llama(root / "fluent", seed=2)
    home = root / "home"
    home.mkdir()
    registry = Registry(f"sqlite:///{home / 'mlflow.db'}", Store(str(home / "store"), home / "cache"))
    versions = {name: registry.register(registry.store.put(root / name, kind="model", name=name)) for name in NAMES}
    return Stock(home, versions, held_out)


class Link:
    """A backend behind a link that a test can cut, or let hang; remembers what came through."""

    def __init__(self, inner: ModelServer) -> None:
        self.inner = inner
        self.cut: set[str] = set()
        """Models that cannot be reached."""
        self.breaks_after_pieces: dict[str, int] = {}
        self.says_site: dict[str, str] = {}
        self.inputs: dict[str, int] = {}
        self.texts: list[str] = []
        """Models asked for text, in order."""
        self.closed: list[str] = []

    async def models(self) -> Sequence[ServedModel]:
        return await self.inner.models()

    async def generate(self, model: str, call: Generation) -> AsyncIterator[Piece]:
        self.texts.append(model)
        self._reach(model)
        number = 0
        pieces = self.inner.generate(model, call)
        try:
            async for piece in pieces:
                if number == self.breaks_after_pieces.get(model):
                    raise UnavailableError(f"{model} was lost")
                yield piece
                number += 1
        finally:
            await pieces.aclose()
            self.closed.append(model)

    async def embed(
        self,
        model: str,
        texts: Sequence[str | Sequence[int]],
        *,
        site: str | None = None,
        on_site: OnSite | None = None,
    ) -> tuple[list[list[float]], Usage]:
        return await self.inner.embed(model, texts)

    async def predict(
        self, model: str, inputs: Sequence[Any], *, site: str | None = None, on_site: OnSite | None = None
    ) -> list[Any]:
        if on_site is not None and model in self.says_site:
            on_site(self.says_site[model])
        self._reach(model)
        self.inputs[model] = self.inputs.get(model, 0) + len(inputs)
        return await self.inner.predict(model, inputs)

    def _reach(self, model: str) -> None:
        if model in self.cut:
            raise UnavailableError(f"{model} cannot be reached")


class Shop(NamedTuple):
    """A server of all four models, with their versions."""

    link: Link
    versions: dict[str, VersionInfo]
    held_out: digits.Digits

    def parent(self, name: str) -> Parent:
        """A model as a calibration names it."""
        return Parent(reference=self.versions[name].reference, digest=self.versions[name].digest)


@pytest.fixture
def shop(stock: Stock, monkeypatch: pytest.MonkeyPatch) -> Shop:
    monkeypatch.setenv("MODELYARD_HOME", str(stock.home))
    monkeypatch.setenv("MODELYARD_STORE", str(stock.home / "store"))
    monkeypatch.setenv("MODELYARD_TRACKING_URI", f"sqlite:///{stock.home / 'mlflow.db'}")
    models = tuple(ModelConfig(reference=each.reference, cache_mib=4) for each in stock.versions.values())
    config = ServerConfig(models=models, preload=False, threads=1)
    server = ModelServer(config, Registry.from_settings(), Machine(frozenset()))
    return Shop(Link(server), stock.versions, stock.held_out)
