"""The calls of the API: each proves its caller, reads its body, and asks the backend within its bounds."""

from __future__ import annotations

import array
import asyncio
import base64
import contextlib
import json
import re
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from starlette.types import Send

from modelyard.security import Caller
from modelyard.serving.gateway import body, images, schemas, streams, translation
from modelyard.serving.gateway.authentication import Authentication
from modelyard.serving.gateway.budgets import Budgets, Reservation
from modelyard.serving.gateway.catalogue import Catalogue
from modelyard.serving.gateway.errors import invalid, timed_out
from modelyard.serving.gateway.exchange import SITE_HEADER, exchange_of, send_whole
from modelyard.serving.gateway.framing import usage_object
from modelyard.serving.gateway.limits import estimate_tokens
from modelyard.serving.gateway.metrics import Metrics
from modelyard.serving.gateway.settings import GatewaySettings
from modelyard.serving.gateway.text import TextAnswer
from modelyard.serving.protocol import Backend, ServedModel
from modelyard.tasks import uploads_of

_JSON = {"content-type": "application/json"}
_SITE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


class Calls:
    """The API's calls over one backend."""

    def __init__(
        self,
        backend: Backend,
        settings: GatewaySettings,
        authentication: Authentication,
        budgets: Budgets | None,
        metrics: Metrics,
    ) -> None:
        """Without `budgets` nothing is limited."""
        self._backend, self._settings, self._authentication = backend, settings, authentication
        self._budgets, self._metrics = budgets, metrics
        self.catalogue = Catalogue(backend, settings)

    async def list_models(self, request: Request, send: Send) -> None:
        """`GET /v1/models`: those the caller may use."""
        caller = await self._caller(request)
        known = await self.catalogue.models()
        listed = [_listed(known[name]) for name in caller.visible(known)]
        await _send_json(send, {"object": "list", "data": listed})

    async def show_model(self, request: Request, send: Send) -> None:
        """`GET /v1/models/{model}`."""
        caller = await self._caller(request)
        model = await self.catalogue.find(request.path_params["model"], caller, caller.work[0])
        exchange_of(request).model = model.name
        await _send_json(send, _listed(model))

    async def chat(self, request: Request, send: Send) -> None:
        """`POST /v1/chat/completions`."""
        caller = await self._caller(request)
        wanted = schemas.read(schemas.ChatBody, await self._json(request))
        await streams.until_gone(request.receive, self._text(request, send, caller, wanted))

    async def complete(self, request: Request, send: Send) -> None:
        """`POST /v1/completions`."""
        caller = await self._caller(request)
        wanted = schemas.read(schemas.CompletionBody, await self._json(request))
        await streams.until_gone(request.receive, self._text(request, send, caller, wanted))

    async def embed(self, request: Request, send: Send) -> None:
        """`POST /v1/embeddings`."""
        caller = await self._caller(request)
        wanted = schemas.read(schemas.EmbeddingBody, await self._json(request))
        await streams.until_gone(request.receive, self._embed(request, send, caller, wanted))

    async def predict(self, request: Request, send: Send) -> None:
        """`POST /v1/predict/{model}`."""
        caller = await self._caller(request)
        model = await self.catalogue.find(request.path_params["model"], caller, "predict")
        exchange_of(request).model = model.name
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind == "multipart/form-data":
            inputs: list[Any] = await self._uploads(request)
        else:
            inputs = schemas.read(schemas.PredictionBody, await self._json(request)).inputs
        if len(inputs) > self._settings.max_inputs:
            limit = self._settings.max_inputs
            raise invalid("inputs", f"`inputs` holds {len(inputs)}, more than {limit} (the gateway's `max_inputs`)")
        await streams.until_gone(request.receive, self._predict(request, send, caller, model, inputs))

    async def _text(
        self, request: Request, send: Send, caller: Caller, wanted: schemas.ChatBody | schemas.CompletionBody
    ) -> None:
        exchange, settings = exchange_of(request), self._settings
        model = await self.catalogue.find(wanted.model, caller, "generate")
        exchange.model = model.name
        if isinstance(wanted, schemas.ChatBody):
            calls = [translation.chat(wanted, model, settings, exchange.request_id, _site(request, caller))]
        else:
            calls = translation.completions(wanted, model, settings, exchange.request_id, _site(request, caller))
        each = calls[0].num_choices
        num_choices = each * len(calls)
        tokens = estimate_tokens(*translation.prompt_bytes(calls)) + num_choices * calls[0].sampling.max_tokens
        async with self._reserved(caller, tokens) as reservation:
            answer = TextAnswer(
                exchange=exchange,
                metrics=self._metrics,
                is_chat=isinstance(wanted, schemas.ChatBody),
                model=model.name,
                num_choices=num_choices,
                is_streamed=bool(wanted.stream),
                include_usage=bool(wanted.stream_options and wanted.stream_options.include_usage),
                timeout_s=settings.request_timeout_s,
                headers=reservation.headers,
            )
            generated = [self._backend.generate(model.name, call) for call in calls]
            pieces: AsyncIterator[Any] = generated[0] if len(generated) == 1 else streams.joined(generated, each)
            try:
                await answer.send(pieces, send)
            finally:
                self._settle(reservation, answer.tokens)

    async def _embed(self, request: Request, send: Send, caller: Caller, wanted: schemas.EmbeddingBody) -> None:
        exchange, settings = exchange_of(request), self._settings
        model = await self.catalogue.find(wanted.model, caller, "embed")
        exchange.model = model.name
        texts = translation.prompts_in(wanted.input, "input", settings.max_inputs, "max_inputs")
        size = sum(len(text.encode()) if isinstance(text, str) else 3 * len(text) for text in texts)
        async with self._reserved(caller, estimate_tokens(size, 0)) as reservation:
            async with _bounded(settings.request_timeout_s):
                vectors, usage = await self._backend.embed(
                    model.name, texts, site=_site(request, caller), on_site=exchange.answered_at
                )
            exchange.prompt_tokens = usage.prompt_tokens
            self._settle(reservation, usage.prompt_tokens)
        as_text = wanted.encoding_format == "base64"
        data = [
            {"object": "embedding", "index": index, "embedding": _packed(vector) if as_text else vector}
            for index, vector in enumerate(vectors)
        ]
        counts = {key: n for key, n in usage_object(usage).items() if key != "completion_tokens"}
        answer = {"object": "list", "data": data, "model": model.name, "usage": counts}
        await _send_json(send, answer, reservation.headers)

    async def _predict(
        self, request: Request, send: Send, caller: Caller, model: ServedModel, inputs: list[Any]
    ) -> None:
        settings = self._settings
        async with self._reserved(caller, None) as reservation, _bounded(settings.request_timeout_s):
            takes, has_files = uploads_of(model.task), any(isinstance(value, bytes) for value in inputs)
            if takes == "pictures" or (has_files and takes != "files"):
                files = [
                    value if isinstance(value, bytes) else images.from_base64(value, f"inputs.{number}")
                    for number, value in enumerate(inputs)
                ]
                inputs = await asyncio.to_thread(images.decode, files, settings.max_image_pixels)
            answers = await self._backend.predict(
                model.name, inputs, site=_site(request, caller), on_site=exchange_of(request).answered_at
            )
        data = [{"object": "prediction", "index": index, "output": answer} for index, answer in enumerate(answers)]
        answer = {"object": "list", "created": int(time.time()), "data": data, "model": model.name}
        await _send_json(send, answer, reservation.headers)

    async def _caller(self, request: Request) -> Caller:
        exchange = exchange_of(request)
        exchange.caller = await self._authentication.caller(request.headers.get("authorization"))
        return exchange.caller

    async def _json(self, request: Request) -> dict[str, Any]:
        whole = await body.read(request, self._settings)
        return body.parse_json(whole, request.headers.get("content-type", ""), self._settings.max_json_depth)

    async def _uploads(self, request: Request) -> list[Any]:
        """The files of a form, in order; its other fields are refused."""
        whole = await body.read(request, self._settings)

        async def once() -> AsyncGenerator[bytes, None]:
            yield whole

        limit = self._settings.max_inputs
        try:
            form = await MultiPartParser(request.headers, once(), max_files=limit, max_fields=0).parse()
        except (MultiPartException, KeyError, ValueError, UnicodeError):
            raise invalid("inputs", f"the body is no form of 1 to {limit} files (`max_inputs`) alone") from None
        files = []
        for _, value in form.multi_items():
            if not isinstance(value, str):
                files.append(await value.read())
        await form.close()
        if not files:
            raise invalid("inputs", "the form holds no file", "missing_parameter")
        return files

    @contextlib.asynccontextmanager
    async def _reserved(self, caller: Caller, tokens: int | None) -> AsyncGenerator[Reservation, None]:
        """Hold one request and `tokens` for a call; what `_settle` did not count goes back at the end."""
        if self._budgets is None:
            yield Reservation()
            return
        quota = await self._authentication.quota(caller)
        reservation = await self._budgets.reserve(caller, quota, tokens)
        try:
            yield reservation
        finally:
            self._budgets.settle(reservation, None)

    def _settle(self, reservation: Reservation, tokens: int | None) -> None:
        if self._budgets is not None:
            self._budgets.settle(reservation, tokens)


def _site(request: Request, caller: Caller) -> str | None:
    """Where the call should be answered: the site that it names, else that of its key."""
    named = request.headers.get(SITE_HEADER, "")
    return named if _SITE.fullmatch(named) else caller.site


@contextlib.asynccontextmanager
async def _bounded(seconds: float) -> AsyncGenerator[None, None]:
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise timed_out("the answer", seconds, "request_timeout_s") from None


def _listed(model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created_s,
        "owned_by": "modelyard",
        "reference": model.reference,
        "task": model.task,
        "engine": model.engine,
        "context_tokens": model.context_tokens,
        "features": sorted(model.features),
    }


def _packed(vector: Sequence[float]) -> str:
    """Little-endian float32 in base64, as OpenAI's client expects it."""
    numbers = array.array("f", vector)
    if sys.byteorder == "big":
        numbers.byteswap()
    return base64.b64encode(numbers.tobytes()).decode()


async def _send_json(send: Send, answer: Any, headers: dict[str, str] | None = None) -> None:
    text = json.dumps(answer, default=_plain, allow_nan=False)
    await send_whole(send, 200, {**_JSON, **(headers or {})}, text.encode())


def _plain(value: Any) -> Any:
    """Numbers and arrays of numpy, which json does not know."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"a prediction holds a {type(value).__name__}, which is no JSON")
