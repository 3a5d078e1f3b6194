"""The models of one process behind the `Backend` protocol: opened from the registry, loaded when asked for."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from modelyard.artifacts.registry import Registry
from modelyard.errors import ConfigError, InputError, NotFoundError, nearest
from modelyard.serving.engines.choice import Machine
from modelyard.serving.engines.memory import MIB
from modelyard.serving.protocol import EngineStats, Generation, OnSite, Piece, ServedModel, Usage
from modelyard.serving.residents import Residents
from modelyard.serving.server_config import ServerConfig

if TYPE_CHECKING:
    from modelyard.serving.language import LanguageModel
    from modelyard.serving.loading import Classifier, Entry


class ModelServer:
    """Implements `Backend` in this process. Used by one event loop; call `start` first and `close` at the end."""

    def __init__(self, config: ServerConfig, registry: Registry, machine: Machine | None = None) -> None:
        """Open nothing yet.

        Args:
            config: the models, and how much memory they may take.
            registry: where they are registered.
            machine: what engines are chosen by; by default what this process finds.
        """
        self._config = config
        self._registry = registry
        self._machine = machine
        self._entries: dict[str, Entry] | None = None
        self._starting = asyncio.Lock()
        budget = None if config.memory_mib is None else config.memory_mib * MIB
        self._residents = Residents(budget, config.room_timeout_s)

    async def start(self) -> None:
        """Fetch and verify every model's files, choose engines, and load what `preload` says. Safe to call again.

        Raises:
            ConfigError: two models have one name, or an engine that is asked for cannot run its model.
            NotFoundError, IntegrityError, UnsafeFileError, StorageError: as for `Registry.open`.
            CapacityError, InputError: a preloaded model cannot run.
        """
        async with self._starting:
            if self._entries is not None:
                return
            entries = await asyncio.to_thread(self._describe)
            room = True
            for entry in entries.values():
                room = room and self._config.preload and self._residents.room(entry.size_bytes)
                if room:
                    async with self._use(entry):
                        pass
            self._entries = entries

    async def models(self) -> Sequence[ServedModel]:
        """All that can be asked, loaded or not; the context of a loaded one is exact."""
        await self.start()
        assert self._entries is not None
        shown = []
        for entry in self._entries.values():
            loaded: Any = self._residents.loaded(entry.served.name)
            engine = getattr(loaded, "engine", None)
            shown.append(replace(entry.served, context_tokens=engine.context_tokens) if engine else entry.served)
        return shown

    async def generate(self, model: str, call: Generation) -> AsyncGenerator[Piece, None]:
        """See `Backend.generate`. The answer's length is cut to what the context leaves."""
        entry = await self._entry(model, "causal_lm", "text")
        async with self._use(entry) as loaded, contextlib.aclosing(loaded.generate(call)) as pieces:
            async for piece in pieces:
                yield piece

    async def embed(
        self,
        model: str,
        texts: Sequence[str | Sequence[int]],
        *,
        site: str | None = None,
        on_site: OnSite | None = None,
    ) -> tuple[list[list[float]], Usage]:
        """See `Backend.embed`, and `LanguageModel.embed` for what the vectors are."""
        entry = await self._entry(model, "causal_lm", "embeddings")
        async with self._use(entry) as loaded:
            answer: tuple[list[list[float]], Usage] = await loaded.embed(texts)
            return answer

    async def predict(
        self, model: str, inputs: Sequence[Any], *, site: str | None = None, on_site: OnSite | None = None
    ) -> list[Any]:
        """See `Backend.predict`."""
        entry = await self._entry(model, None, "predictions")
        async with self._use(entry) as loaded:
            answers: list[Any] = await loaded.batch.predict(inputs)
            return answers

    def stats(self) -> dict[str, EngineStats]:
        """The engines of the language models that are loaded now, by the models' names; cheap."""
        found = {}
        for name in self._residents.names:
            engine = getattr(self._residents.loaded(name), "engine", None)
            if engine is not None:
                found[name] = engine.stats()
        return found

    @property
    def loaded(self) -> tuple[str, ...]:
        """Names of the models in memory, the longest idle one first."""
        return self._residents.names

    async def close(self) -> None:
        """Unload everything; calls that run end with `UnavailableError`."""
        await self._residents.close()

    def _describe(self) -> dict[str, Entry]:
        from modelyard.serving.loading import describe

        machine = self._machine or Machine.here()
        entries: dict[str, Entry] = {}
        for config in self._config.models:
            entry = describe(config, self._registry, machine)
            if entry.served.name in entries:
                raise ConfigError(f"models: two are named {entry.served.name!r}", "give one of them another `name`")
            entries[entry.served.name] = entry
        return entries

    async def _entry(self, model: str, task: str | None, what: str) -> Entry:
        await self.start()
        entries: Mapping[str, Entry] = self._entries or {}
        if (entry := entries.get(model)) is None:
            raise NotFoundError(f"there is no model {model!r}", nearest(model, entries))
        is_language = entry.served.task == "causal_lm"
        if is_language != (task == "causal_lm"):
            raise InputError(
                f"model {model!r} is for {entry.served.task}, it gives no {what}",
                "ask it for text" if is_language else "ask it for predictions",
            )
        return entry

    @contextlib.asynccontextmanager
    async def _use(self, entry: Entry) -> AsyncIterator[Any]:
        from modelyard.serving.loading import load

        async def loading() -> LanguageModel | Classifier:
            return await asyncio.to_thread(load, entry, self._config.threads)

        async with self._residents.use(entry.served.name, entry.size_bytes, loading) as model:
            yield model
