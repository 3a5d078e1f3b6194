"""The bodies of the OpenAI API that this gateway reads, and what it does with the parameters it cannot honour.

A parameter that would change the answer and is not supported is refused, never dropped: `UNSUPPORTED` lists them with
the values that mean "not used", which pass. Parameters that change no answer (`IGNORED`) are read past.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from modelyard.errors import nearest
from modelyard.serving.gateway.errors import CallError, invalid

IGNORED = (
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "safety_identifier",
    "service_tier",
    "user",
)
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "dimensions": (),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": (),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}
"""Parameter -> the values beside null with which it does nothing."""


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value  # 5.0 is an integer in JSON


Whole = Annotated[int, BeforeValidator(_whole)]
Token = Annotated[int, BeforeValidator(_whole), Field(ge=0, lt=2**31)]
StopText = Annotated[str, Field(min_length=1, max_length=256)]
Text = Annotated[str, Field(min_length=1)]


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class TextPart(_Body):
    """A part of a message."""

    type: Literal["text"]
    text: str


_OF_ANSWERS = ("annotations", "audio", "function_call", "refusal", "tool_calls")


class Message(_Body):
    """A turn of a chat; an answer's message may come back with the fields that OpenAI's client adds as null."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = Field(default=None, max_length=128)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, found: Any) -> Any:
        if not isinstance(found, dict):
            return found
        return {key: value for key, value in found.items() if value is not None or key not in _OF_ANSWERS}


class StreamOptions(_Body):
    """What a stream says beside text."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


class JsonSchema(_Body):
    """A schema for the answer."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class TextFormat(_Body):
    """Any text."""

    type: Literal["text"]


class JsonFormat(_Body):
    """Any JSON object, where the engine can."""

    type: Literal["json_object"]


class SchemaFormat(_Body):
    """JSON of a schema, where the engine can."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


class _Generation(_Body):
    model: str = Field(min_length=1, max_length=256)
    max_tokens: Whole | None = Field(default=None, ge=1, lt=2**31)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: Whole | None = Field(default=None, ge=0, lt=2**31)
    """Not OpenAI's: sample from the k likeliest tokens; 0 from all."""
    n: Whole | None = Field(default=None, ge=1, lt=2**31)
    seed: Whole | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: StopText | list[StopText] | None = Field(default=None, max_length=256)
    stream: bool | None = None
    stream_options: StreamOptions | None = None


class ChatBody(_Generation):
    """`POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1, max_length=4_096)
    max_completion_tokens: Whole | None = Field(default=None, ge=1, lt=2**31)
    logprobs: bool | None = None
    top_logprobs: Whole | None = Field(default=None, ge=0, le=20)
    response_format: Annotated[TextFormat | JsonFormat | SchemaFormat, Field(discriminator="type")] | None = None


class CompletionBody(_Generation):
    """`POST /v1/completions`."""

    prompt: Text | list[Token] | list[Text] | list[list[Token]]
    logprobs: Whole | None = Field(default=None, ge=0, le=5)
    echo: bool | None = None


class EmbeddingBody(_Body):
    """`POST /v1/embeddings`."""

    model: str = Field(min_length=1, max_length=256)
    input: Text | list[Token] | list[Text] | list[list[Token]]
    encoding_format: Literal["float", "base64"] | None = None


class PredictionBody(_Body):
    """`POST /v1/predict/{model}`: for image models each input is an image file in base64, plain or as a data URL."""

    inputs: list[Any] = Field(min_length=1)


BodyT = TypeVar("BodyT", bound=_Body)


def read(kind: type[BodyT], found: dict[str, Any]) -> BodyT:
    """A body of this kind.

    Raises:
        CallError: 400, names the parameter.
    """
    known = kind.model_fields
    for name in [name for name in found if name not in known]:
        value = found[name]
        if name in UNSUPPORTED and value is not None and value not in UNSUPPORTED[name]:
            raise invalid(name, f"`{name}` is not supported here; leave it out", "unsupported_parameter")
        if name not in UNSUPPORTED and name not in IGNORED:
            shown = name[:64]
            hint = nearest(shown, known)
            raise invalid(shown, f"there is no parameter `{shown}`; {hint}", "unknown_parameter")
    try:
        return kind.model_validate({name: value for name, value in found.items() if name in known})
    except ValidationError as error:
        raise _explained(error, found) from None


def _explained(error: ValidationError, found: Any) -> CallError:
    """The error that lies deepest: of a union's members, the one the caller meant fails furthest in."""
    details = error.errors(include_url=False, include_context=False, include_input=False)
    paths = [_path(detail["loc"], found, is_missing=detail["type"] == "missing") for detail in details]
    path = max(paths, key=len)  # the first of several
    detail = details[paths.index(path)]
    param = ".".join(path)[:128]
    code = "missing_parameter" if detail["type"] == "missing" else "invalid_value"
    return invalid(param or None, f"`{param}`: {detail['msg'][:1].lower()}{detail['msg'][1:]}", code)


def _path(location: Sequence[str | int], value: Any, *, is_missing: bool) -> list[str]:
    """Pydantic's location without the names of union members, which no caller writes."""
    path = []
    for number, part in enumerate(location):
        is_there = part in value if isinstance(value, dict) else isinstance(value, list) and isinstance(part, int)
        if is_there:
            value = value[part]
        if is_there or (is_missing and number == len(location) - 1):
            path.append(str(part))
    return path
