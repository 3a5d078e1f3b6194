"""The models behind the gateway, asked for seldom."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping

from modelyard.errors import nearest
from modelyard.security import Caller
from modelyard.security.callers import Work
from modelyard.serving.gateway.errors import CallError, timed_out
from modelyard.serving.gateway.settings import GatewaySettings
from modelyard.serving.protocol import Backend, ServedModel

_MISS_REFRESH_S = 0.25


class Catalogue:
    """Keeps the backend's list for `models_cache_s`, and asks again at once when a name is not in it."""

    def __init__(self, backend: Backend, settings: GatewaySettings) -> None:
        """Asks nothing yet."""
        self._backend, self._settings = backend, settings
        self._models: dict[str, ServedModel] = {}
        self._asked_s = float("-inf")
        self._lock = asyncio.Lock()

    async def models(self, max_age_s: float | None = None) -> Mapping[str, ServedModel]:
        """By name.

        Raises:
            CallError: 504, the backend did not answer within `backend_timeout_s`.
            UnavailableError: from the backend.
        """
        max_age_s = self._settings.models_cache_s if max_age_s is None else max_age_s
        if time.monotonic() - self._asked_s <= max_age_s:
            return self._models
        async with self._lock:
            if time.monotonic() - self._asked_s > max_age_s:
                seconds = self._settings.backend_timeout_s
                try:
                    async with asyncio.timeout(seconds):
                        found = await self._backend.models()
                except TimeoutError:
                    raise timed_out("the list of models", seconds, "backend_timeout_s") from None
                self._models = {model.name: model for model in found}
                self._asked_s = time.monotonic()
        return self._models

    async def find(self, name: str, caller: Caller, work: Work) -> ServedModel:
        """The model `name`, for a caller who may use it so.

        Raises:
            CallError: 404 there is none (the caller's own are listed), 403 it is not for this caller.
        """
        known = await self.models()
        if name not in known:
            known = await self.models(_MISS_REFRESH_S)
        if name not in known:
            usable = caller.visible(known)
            shown = name if len(name) <= 64 else f"{name[:64]}..."
            hint = nearest(name[:64], usable) if usable else "this key may use none of the models here"
            listed = f"; this key may use: {', '.join(usable)}" if usable and not hint.startswith("known") else ""
            raise CallError(404, "model_not_found", f"there is no model {shown!r}; {hint}{listed}", param="model")
        if not caller.may_see(name):
            allowed = ", ".join(caller.visible(known)) or "none"
            problem = f"this key may not use {name!r}; it may use: {allowed}"
            raise CallError(403, "model_not_allowed", problem, param="model")
        if not caller.may_do(work):
            problem = f"this key may not {work}, only {', '.join(caller.work)}"
            raise CallError(403, "work_not_allowed", problem)
        return known[name]
