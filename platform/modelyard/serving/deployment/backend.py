"""The gateway's `Backend` on a Ray cluster: finds deployments, calls their replicas, tries another when one dies."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import ray
from ray import serve
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from modelyard.errors import InputError, ModelyardError, OverloadedError, StorageError, UnavailableError
from modelyard.serving.deployment.config import GatewayApp
from modelyard.serving.deployment.discovery import MODEL, deployed
from modelyard.serving.deployment.rollout import verdict
from modelyard.serving.deployment.routing import Share, State, Target, Way, choose
from modelyard.serving.deployment.shares import Call, ShareStore
from modelyard.serving.protocol import Generation, OnSite, Piece, ServedModel, Usage

logger = logging.getLogger(__name__)
T = TypeVar("T")
_LOST = (ray.exceptions.ActorDiedError, ray.exceptions.ActorUnavailableError, ray.exceptions.NodeDiedError)
_RETRY_AFTER_S = 1.0
_LOOK_TIMEOUT_S = 30.0
"""Serve's controller must have said by then what is deployed; until it does, what was known last counts."""


@dataclass(frozen=True)
class _View:
    """What is deployed and shared out, as of the last look."""

    targets: tuple[Target, ...] = ()
    shares: Mapping[str, Share] = field(default_factory=dict)


class ServeBackend:
    """Routes calls to Serve deployments. Used by one event loop; looks around while calls come."""

    def __init__(self, app: GatewayApp, *, shares: ShareStore | None = None, dice: random.Random | None = None) -> None:
        """`shares` defaults to the tables in the gateway's own database."""
        self._app = app
        self._shares = shares or ShareStore(app.settings.database)
        self._dice = dice or random.Random()
        self._view = _View()
        self._handles: dict[str, DeploymentHandle] = {}
        self._calls: list[Call] = []
        self._paused: dict[str, float] = {}
        """Sites that failed, and until when the cloud is asked before them."""
        self._looking: asyncio.Task[None] | None = None
        self._looked = asyncio.Event()
        self._shadows: set[asyncio.Task[None]] = set()

    async def models(self) -> Sequence[ServedModel]:
        """What callers can ask for; of several deployments of a model the stable one of the cloud is shown."""
        await self._look()
        shown: dict[str, ServedModel] = {}
        for target in sorted(self._view.targets, key=lambda t: (t.is_canary, t.site is not None, t.application)):
            shown.setdefault(target.model, target.served)
        return list(shown.values())

    async def generate(self, model: str, call: Generation) -> AsyncGenerator[Piece, None]:
        """See `Backend.generate`. A call goes to another replica as long as no text of it has been passed on.

        One that is not streamed is passed on when it is complete, so it survives any death of a replica.
        """
        began, passed_on = time.time(), False
        retry = _Retry(self._app.recovery_timeout_s)
        while True:
            way = await self._way(model, call.site)
            if way.shadow is not None and not retry.number:
                self._follow(way.shadow, call)
            target = way.pick(retry.failures)
            request_id = f"{call.request_id}-{retry.number}" if retry.number else call.request_id
            pieces = self._pieces(target, replace(call, request_id=request_id), is_last_hope=len(way.targets) == 1)
            first_s: float | None = None
            try:
                async with contextlib.aclosing(pieces):
                    if call.is_streamed:
                        async for piece in pieces:
                            if first_s is None and piece.text:
                                first_s = time.time() - began
                            passed_on = passed_on or bool(piece.text)
                            yield piece
                    else:
                        together = [piece async for piece in pieces]
                        first_s = time.time() - began
                        passed_on = True
                        for piece in together:
                            yield piece
            except UnavailableError as error:
                self._note(target, began, is_error=True)
                if passed_on or not await retry.again(error, target, len(way.targets)):
                    raise
            else:
                self._note(target, began, is_error=False, first_token_s=first_s)
                return

    async def embed(
        self,
        model: str,
        texts: Sequence[str | Sequence[int]],
        *,
        site: str | None = None,
        on_site: OnSite | None = None,
    ) -> tuple[list[list[float]], Usage]:
        """See `Backend.embed`."""
        answer: tuple[list[list[float]], Usage] = await self._unary(
            model, site, on_site, lambda handle: handle.embed.remote(texts)
        )
        return answer

    async def predict(
        self, model: str, inputs: Sequence[Any], *, site: str | None = None, on_site: OnSite | None = None
    ) -> list[Any]:
        """See `Backend.predict`."""
        answers: list[Any] = await self._unary(model, site, on_site, lambda handle: handle.predict.remote(inputs))
        return answers

    async def _unary(
        self, model: str, site: str | None, on_site: OnSite | None, ask: Callable[[DeploymentHandle], Any]
    ) -> Any:
        retry = _Retry(self._app.recovery_timeout_s)
        while True:
            way = await self._way(model, site)
            target = way.pick(retry.failures)
            began = time.time()
            try:
                with _translated(target):
                    answer = await self._soon(target, ask(self._handle(target)), len(way.targets) == 1)
            except UnavailableError as error:
                self._note(target, began, is_error=True)
                if not await retry.again(error, target, len(way.targets)):
                    raise
            else:
                self._note(target, began, is_error=False, first_token_s=time.time() - began)
                if on_site is not None and target.site:
                    on_site(target.site)
                return answer

    async def _way(self, model: str, site: str | None) -> Way:
        await self._look()
        now = time.monotonic()
        targets = [
            replace(target, state=State.COMING) if now < self._paused.get(target.application, 0.0) else target
            for target in self._view.targets
        ]
        return choose(targets, self._view.shares, model, site=site, draw=self._dice.random())

    async def _pieces(
        self, target: Target, call: Generation, *, is_last_hope: bool = False
    ) -> AsyncGenerator[Piece, None]:
        is_first = True
        with _translated(target):
            answer = self._handle(target).options(stream=True).generate.remote(call)
            try:
                while (together := await self._soon(target, anext(answer, None), is_last_hope)) is not None:
                    for piece in together:
                        yield replace(piece, site=target.site) if is_first and target.site else piece
                        is_first = False
            finally:
                answer.cancel()  # of one that is complete: nothing

    async def _soon(self, target: Target, answer: Awaitable[T], is_last_hope: bool) -> T:
        """Wait for a replica, but not for ever: one behind a cut link says nothing, not even that it is gone."""
        setting = "site_timeout_s" if target.site else "piece_timeout_s"
        seconds = self._app.site_timeout_s if target.site else self._app.piece_timeout_s
        if is_last_hope and target.state is State.COMING:
            return await answer  # it is started for this call; the gateway's own limit counts
        try:
            async with asyncio.timeout(seconds):
                return await answer
        except TimeoutError:
            raise UnavailableError(
                f"{target.application} was silent for {seconds:g} s", f"if it only needs longer, raise {setting}"
            ) from None

    def _handle(self, target: Target) -> DeploymentHandle:
        if target.application not in self._handles:
            self._handles[target.application] = serve.get_deployment_handle(MODEL, target.application)
        return self._handles[target.application]

    def _follow(self, target: Target, call: Generation) -> None:
        """Send a copy to a shadow; what becomes of it only counts."""

        async def copy() -> None:
            began = time.time()
            try:
                async with contextlib.aclosing(
                    self._pieces(target, replace(call, request_id=f"{call.request_id}-shadow"))
                ) as pieces:
                    first_s = None
                    async for piece in pieces:
                        if first_s is None and piece.text:
                            first_s = time.time() - began
                self._note(target, began, is_error=False, first_token_s=first_s)
            except (InputError, OverloadedError):
                pass
            except ModelyardError:
                self._note(target, began, is_error=True)

        task = asyncio.create_task(copy())
        self._shadows.add(task)
        task.add_done_callback(self._shadows.discard)

    def _note(self, target: Target, at_s: float, *, is_error: bool, first_token_s: float | None = None) -> None:
        if is_error and target.site:
            self._paused[target.application] = time.monotonic() + self._app.site_pause_s
        if any(other.is_canary and other.model == target.model for other in self._view.targets):
            self._calls.append((target.application, at_s, is_error, first_token_s))

    async def _look(self) -> None:
        """Wait for the first look; later ones go on by themselves."""
        if self._looking is None or self._looking.done():
            self._looked = asyncio.Event()
            self._looking = asyncio.create_task(self._look_on(self._looked))
        if not self._looked.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._looked.wait(), _LOOK_TIMEOUT_S)

    async def _look_on(self, looked: asyncio.Event) -> None:
        while True:
            try:
                details = await _details()
                targets = tuple(each.target for each in deployed(details).values())
                self._view = _View(targets, await asyncio.to_thread(self._judged, targets))
            except TimeoutError:
                logger.warning("Serve's controller has not said for %g s what is deployed", _LOOK_TIMEOUT_S)
            except (ray.exceptions.RayError, StorageError) as error:
                logger.warning("could not look at what is deployed: %s", error)
            finally:
                looked.set()
            await asyncio.sleep(self._app.refresh_s)

    def _judged(self, targets: Sequence[Target]) -> Mapping[str, Share]:
        """The shares, after canaries that do badly were withdrawn. On a thread."""
        canaries = [target for target in targets if target.is_canary]
        calls, self._calls = self._calls, []
        if not canaries:
            return {}
        limits = self._app.rollout
        self._shares.record(calls, limits.window_s)
        shares = self._shares.shares()
        for canary in canaries:
            share = shares.get(canary.application)
            if share is None or share.withdrawn or not share.percent:
                continue
            stable = [t.application for t in targets if t.model == canary.model and not t.is_canary and t.site is None]
            outcomes = self._shares.outcomes([canary.application, *stable], limits.window_s)
            theirs = [outcomes[name] for name in stable]
            why = verdict(outcomes[canary.application], theirs[0], limits) if theirs else None
            if why and self._shares.withdraw(canary.application, why):
                logger.warning("canary %s is withdrawn: %s", canary.application, why)
                shares = self._shares.shares()
        return shares


class _FailedError(UnavailableError):
    """A replica is there and fails on this call: the same one would again."""


class _Retry:
    """When to try another replica, and when to give up: at growing intervals, for `timeout_s` in all."""

    def __init__(self, timeout_s: float) -> None:
        self.number = 0
        self.failures: Counter[str] = Counter()
        """By application."""
        self._until = time.monotonic() + timeout_s

    async def again(self, error: UnavailableError, target: Target, num_targets: int) -> bool:
        """Wait a moment; False when the time is over, or every deployment has failed on the call itself."""
        self.failures[target.application] += 1
        if isinstance(error, _FailedError) and self.number + 1 >= num_targets:
            return False
        pause_s = min(0.1 * 2**self.number, 2.0)
        if time.monotonic() + pause_s > self._until:
            return False
        self.number += 1
        await asyncio.sleep(pause_s)
        return True


async def _details() -> Mapping[str, Any]:
    """What Serve's controller knows of all applications."""
    from ray.serve.context import _get_global_client

    client = _get_global_client()
    async with asyncio.timeout(_LOOK_TIMEOUT_S):
        details: Mapping[str, Any] = await client._controller.get_serve_instance_details.remote()
    return details


@contextlib.contextmanager
def _translated(target: Target) -> Iterator[None]:
    """Ray's and Serve's errors as ours."""
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, ModelyardError):
            raise cause from None
        reason = str(cause or error).strip().splitlines()[-1]
        raise _FailedError(f"{target.application} failed: {reason}") from error
    except BackPressureError as error:
        raise OverloadedError(f"too many calls wait for {target.model!r}", _RETRY_AFTER_S) from error
    except (DeploymentUnavailableError, *_LOST) as error:
        raise UnavailableError(
            f"a replica of {target.application} was lost", "try again; see modelyard serve status"
        ) from error
