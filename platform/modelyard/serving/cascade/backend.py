"""Cascades as a `Backend`: in front of one that serves the models, or of one at the site and one in the cloud."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any

from modelyard.artifacts.manifest import Parent
from modelyard.errors import ConfigError, InputError, ModelyardError
from modelyard.serving.cascade.config import CascadeConfig
from modelyard.serving.cascade.counters import Counters
from modelyard.serving.cascade.pair import Pair, answered_at
from modelyard.serving.protocol import Backend, Generation, OnSite, Piece, ServedModel, Usage

logger = logging.getLogger(__name__)
_LOOK_TIMEOUT_S = 5.0


class CascadeBackend:
    """Adds cascades to the models of a backend; calls for its other models pass through. Used by one event loop."""

    def __init__(
        self,
        backend: Backend,
        cascades: Sequence[CascadeConfig],
        *,
        cloud: Backend | None = None,
        digest_of: Callable[[str], str] | None = None,
        refresh_s: float = 2.0,
    ) -> None:
        """Ask nobody yet.

        Args:
            backend: serves the small models, and without `cloud` the large ones too.
            cascades: by different names.
            cloud: serves the large models.
            digest_of: the digest of an artifact by its reference; by default the registry's.
            refresh_s: seconds between looks at which versions are served.

        Raises:
            ConfigError: two cascades have one name.
        """
        names = [each.name for each in cascades]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigError(f"cascades: two are named {twice[0]!r}", "give one of them another `name`")
        self._backend, self._cloud = backend, cloud or backend
        self._pairs = {each.name: Pair(each, backend, self._cloud) for each in cascades}
        self._digest_of = digest_of or _registered
        self._digests: dict[str, str] = {}
        self._served: tuple[dict[str, ServedModel], dict[str, ServedModel]] = ({}, {})
        self._refresh_s = refresh_s
        self._looked_s: float | None = None
        self._looking: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Refuse calibrations of other models, or of the small one on another engine, than are served now.

        Later, when another version is rolled out, its cascades send everything up until they are calibrated again.

        Raises:
            ConfigError: a calibration was made with other models.
        """
        await self._look()
        for pair in self._pairs.values():
            if pair.refusal is not None:
                raise pair.refusal

    async def models(self) -> Sequence[ServedModel]:
        """Those of the backend, and the cascades of which a model is known."""
        own = await self._backend.models()
        await self._known()
        cascades = [shown for pair in self._pairs.values() if (shown := self._shown(pair.config)) is not None]
        return [*cascades, *(model for model in own if model.name not in self._pairs)]

    async def generate(self, model: str, call: Generation) -> AsyncGenerator[Piece, None]:
        """See `Backend.generate`. No text is passed on before it is decided whose."""
        pair = await self._pair(model)
        pieces = self._backend.generate(model, call) if pair is None else pair.generate(call)
        async with contextlib.aclosing(pieces):  # type: ignore[type-var]
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
        """See `Backend.embed`; a cascade has none, since vectors of two models do not compare."""
        if (pair := self._pairs.get(model)) is not None:
            raise InputError(
                f"model {model!r} is a cascade of two models, whose vectors do not compare",
                f"ask {pair.config.small!r} or {pair.config.large!r}",
            )
        return await self._backend.embed(model, texts, site=site, on_site=on_site)

    async def predict(
        self, model: str, inputs: Sequence[Any], *, site: str | None = None, on_site: OnSite | None = None
    ) -> list[Any]:
        """See `Backend.predict`. Each answer of a cascade also says `site`, and `unsure` where it stands for want of
        the cloud; `on_site` is told all of them, joined by commas."""
        if (pair := await self._pair(model)) is None:
            return await self._backend.predict(model, inputs, site=site, on_site=on_site)
        answers = await pair.predict(inputs, site)
        if on_site is not None and (where := answered_at(answers)) is not None:
            on_site(where)
        return answers

    def counters(self) -> Mapping[str, Counters]:
        """Of each cascade since the start, by name."""
        return {name: pair.counters for name, pair in self._pairs.items()}

    async def close(self) -> None:
        """Stop looking."""
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)

    async def _pair(self, model: str) -> Pair | None:
        if (pair := self._pairs.get(model)) is not None:
            await self._known()
        return pair

    async def _known(self) -> None:
        """Look at what is served: the first time now, later in the background, so that a cut link stops no call."""
        is_first = self._looked_s is None
        is_due = is_first or time.monotonic() - (self._looked_s or 0.0) > self._refresh_s
        if is_due and (self._looking is None or self._looking.done()):
            self._looking = asyncio.create_task(self._look())
        if is_first and self._looking is not None:
            await asyncio.shield(self._looking)

    async def _look(self) -> None:
        at_site = in_cloud = await _list(self._backend)
        if self._cloud is not self._backend:
            in_cloud = await _list(self._cloud)
        known_site, known_cloud = self._served
        self._served = (known_site | at_site, known_cloud | in_cloud)
        for pair in self._pairs.values():
            await self._judge(pair)
        self._looked_s = time.monotonic()

    async def _judge(self, pair: Pair) -> None:
        """Whether the calibration is of what is served; a model that was never seen is not held against it."""
        calibration, (at_site, in_cloud) = pair.config.calibration, self._served
        small, large = at_site.get(pair.config.small), in_cloud.get(pair.config.large)
        try:
            calibration.require(
                calibration.small.digest if small is None else await self._digest(small.reference, calibration.small),
                calibration.large.digest if large is None else await self._digest(large.reference, calibration.large),
                "" if small is None else small.engine,
            )
        except ConfigError as error:
            if pair.refusal is None:
                logger.warning("cascade %s sends everything up: %s", pair.config.name, error.problem)
            pair.refusal = error
        else:
            pair.refusal = None

    async def _digest(self, reference: str, calibrated: Parent) -> str:
        """Of a version, which never changes. Without a registry only the very version of the calibration passes."""
        if reference not in self._digests:
            try:
                self._digests[reference] = await asyncio.to_thread(self._digest_of, reference)
            except ModelyardError as error:
                if reference == calibrated.reference:
                    return calibrated.digest
                raise ConfigError(f"the digest of {reference} cannot be found: {error.problem}", error.todo) from error
        return self._digests[reference]

    def _shown(self, config: CascadeConfig) -> ServedModel | None:
        small, large = self._served[0].get(config.small), self._served[1].get(config.large)
        if (main := large or small) is None:
            return None
        both = [model.reference for model in (small, large) if model is not None]
        return ServedModel(
            name=config.name,
            reference=" > ".join(both),
            task=main.task,
            engine="cascade",
            created_s=max(model.created_s for model in (small, large) if model is not None),
            context_tokens=main.context_tokens,
            features=main.features - {"embeddings"},
        )


async def _list(backend: Backend) -> dict[str, ServedModel]:
    try:
        async with asyncio.timeout(_LOOK_TIMEOUT_S):
            return {model.name: model for model in await backend.models()}
    except (ModelyardError, TimeoutError) as error:
        logger.warning("could not look at what is served: %s", error)
        return {}


def _registered(reference: str) -> str:
    from modelyard.artifacts.registry import Registry

    return Registry.from_settings().resolve(reference, "model").digest
