"""From OpenAI's bodies to `Generation`: defaults filled in, and everything the model behind cannot do refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from modelyard.serving.gateway.errors import invalid
from modelyard.serving.gateway.schemas import ChatBody, CompletionBody, JsonFormat, SchemaFormat
from modelyard.serving.gateway.settings import GatewaySettings
from modelyard.serving.protocol import Generation, Sampling, ServedModel

MAX_STOPS = 4
COMPLETION_TOKENS = 16
"""OpenAI's default for `/v1/completions`."""
_GENERATING = "causal_lm"
_PARAMETERS = {"json_schema": "response_format"}
"""What callers write to ask for an engine's feature, where it is named otherwise."""


def chat(
    body: ChatBody, model: ServedModel, settings: GatewaySettings, request_id: str, site: str | None
) -> Generation:
    """One call for a chat.

    Raises:
        CallError: 400, names the parameter and what the model or the gateway allows.
    """
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise invalid("max_tokens", "give `max_tokens` or `max_completion_tokens`, not both")
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("top_logprobs", "`top_logprobs` needs `logprobs: true`")
    name = "max_tokens" if body.max_tokens is not None else "max_completion_tokens"
    length = body.max_tokens if body.max_tokens is not None else body.max_completion_tokens
    sampling = _sampling(
        body,
        model,
        max_tokens=_length(name, length, settings.default_max_tokens, model),
        top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        json_schema=_schema(body),
    )
    return Generation(
        request_id=request_id,
        sampling=sampling,
        messages=[_message(message.model_dump(exclude_none=True)) for message in body.messages],
        stop=_stop(body.stop),
        num_choices=_choices(body.n, settings),
        site=site,
        is_streamed=bool(body.stream),
    )


def completions(
    body: CompletionBody, model: ServedModel, settings: GatewaySettings, request_id: str, site: str | None
) -> list[Generation]:
    """One call for each prompt.

    Raises:
        CallError: 400, names the parameter and what the model or the gateway allows.
    """
    prompts = prompts_in(body.prompt, "prompt", settings.max_prompts, "max_prompts")
    sampling = _sampling(
        body,
        model,
        max_tokens=_length("max_tokens", body.max_tokens, COMPLETION_TOKENS, model),
        top_logprobs=body.logprobs,
        json_schema=None,
    )
    stop, num_choices = _stop(body.stop), _choices(body.n, settings)
    return [
        Generation(
            request_id=request_id if len(prompts) == 1 else f"{request_id}-{number}",
            sampling=sampling,
            prompt=prompt,
            stop=stop,
            num_choices=num_choices,
            echo=bool(body.echo),
            site=site,
            is_streamed=bool(body.stream),
        )
        for number, prompt in enumerate(prompts)
    ]


def prompts_in(given: Any, param: str, most: int, setting: str) -> list[str | list[int]]:
    """The texts, or sequences of token ids, in OpenAI's four ways to write them."""
    prompts = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else list(given)
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise invalid(param, f"`{param}` is empty, or holds something empty")
    if len(prompts) > most:
        raise invalid(param, f"`{param}` holds {len(prompts)}, more than {most} (the gateway's `{setting}`)")
    return prompts


def prompt_bytes(calls: Sequence[Generation]) -> tuple[int, int]:
    """Bytes of text and number of messages, to estimate tokens from."""
    size = messages = 0
    for call in calls:
        if isinstance(call.prompt, str):
            size += len(call.prompt.encode())
        elif call.prompt is not None:
            size += 3 * len(call.prompt)  # known exactly: `estimate_tokens` divides by 3
        for message in call.messages or ():
            size += len(str(message["content"]).encode())
            messages += 1
    return size, messages


def _sampling(
    body: ChatBody | CompletionBody,
    model: ServedModel,
    *,
    max_tokens: int,
    top_logprobs: int | None,
    json_schema: Mapping[str, Any] | None,
) -> Sampling:
    if model.task != _GENERATING:
        where = f"ask it at /v1/predict/{model.name}"
        raise invalid("model", f"{model.name!r} does {model.task} and generates no text; {where}", "unsupported_value")
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options", "`stream_options` needs `stream: true`")
    asked = {
        "logprobs": top_logprobs,
        "top_logprobs": top_logprobs or None,
        "seed": body.seed,
        "json_schema": json_schema,
    }
    for feature, value in asked.items():
        if value is not None and feature not in model.features:
            param = _PARAMETERS.get(feature, feature)
            problem = f"the engine {model.engine!r} of {model.name!r} cannot do `{param}` ({feature})"
            raise invalid(param, f"{problem}; leave it out", "unsupported_parameter")
    return Sampling(
        max_tokens=max_tokens,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=body.top_k or 0,
        seed=body.seed,
        top_logprobs=top_logprobs,
        json_schema=json_schema,
    )


def _length(param: str, given: int | None, default: int, model: ServedModel) -> int:
    context = model.context_tokens
    if given is None:
        return default if context is None else min(default, context)
    if context is not None and given > context:
        raise invalid(param, f"`{param}` is {given}; the context of {model.name!r} holds {context} tokens")
    return given


def _choices(given: int | None, settings: GatewaySettings) -> int:
    if given is not None and given > settings.max_choices:
        raise invalid("n", f"`n` is {given}, more than {settings.max_choices} (the gateway's `max_choices`)")
    return given or 1


def _stop(given: str | list[str] | None) -> tuple[str, ...]:
    stops = () if given is None else (given,) if isinstance(given, str) else tuple(given)
    if len(stops) > MAX_STOPS:
        raise invalid("stop", f"`stop` holds {len(stops)} texts, more than {MAX_STOPS}")
    if len(set(stops)) < len(stops):
        raise invalid("stop", "`stop` holds a text twice")
    return stops


def _schema(body: ChatBody) -> Mapping[str, Any] | None:
    match body.response_format:
        case SchemaFormat(json_schema=wanted):
            return wanted.schema_
        case JsonFormat():
            return {"type": "object"}
    return None


def _message(message: dict[str, Any]) -> dict[str, Any]:
    """Text parts joined and OpenAI's newer name of the system role put back: chat templates know no others."""
    if not isinstance(message["content"], str):
        message["content"] = "\n".join(part["text"] for part in message["content"])
    if message["role"] == "developer":
        message["role"] = "system"
    return message
