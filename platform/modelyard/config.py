"""Typed configs: frozen, unknown keys refused, YAML in, dotted overrides on the command line.

A config class is the only place where a default lives. A bad value is refused here, on the driver, before
anything is asked of a cluster::

    class Limits(Config):
        max_steps: int = Field(default=100, gt=0)
        \"\"\"Optimizer steps; the run ends there.\"\"\"

    load(Limits, "limits.yaml", ["--max_steps=20"])
"""

from __future__ import annotations

import hashlib
import json
import os
import reprlib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Tag, ValidationError, model_validator

from modelyard import config_file
from modelyard.errors import ConfigError, nearest

ENV_HOME = "MODELYARD_HOME"
ENV_STORE = "MODELYARD_STORE"
ENV_TRACKING = "MODELYARD_TRACKING_URI"


class Config(BaseModel):
    """Base of every config: immutable, closed, with the docstring under each field as its help text."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _complete_sections(cls, data: Any) -> Any:
        """Lay a section given in part over the field's own default, not over the defaults of its class.

        With `optimizer: AdamW | SGD = AdamW(lr=0.1)`, `{"optimizer": {"beta1": 0.8}}` keeps kind and lr.
        """
        if not isinstance(data, Mapping):
            return data
        completed = dict(data)
        for name, field in cls.model_fields.items():
            if isinstance(data.get(name), Mapping) and isinstance(field.default, Config):
                completed[name] = _laid_over(field.default, data[name])
        return completed

    def digest(self) -> str:
        """SHA-256 (hex) of the config as canonical JSON; equal configs have equal digests."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def to_yaml(self) -> str:
        """The config with every default filled in, as YAML that `load` reads back to an equal config."""
        return config_file.to_yaml(self.model_dump(mode="json"))

    def with_changes(self, **changes: Any) -> Self:
        """A copy with top-level fields replaced, validated again (unlike `model_copy`)."""
        return parse(type(self), {**self.model_dump(), **changes})


class Settings(Config):
    """Where a person's artifacts, runs and records live; read from the environment in `settings`."""

    home: Path
    """Folder for everything local: `MODELYARD_HOME`, default `~/.modelyard`."""
    store: str
    """Folder or URI (`s3://bucket/prefix`) of artifacts and runs: `MODELYARD_STORE`, else `<home>/store`."""
    tracking_uri: str
    """MLflow tracking URI: `MODELYARD_TRACKING_URI`, default `sqlite:///<home>/mlflow.db`."""

    @property
    def cache(self) -> Path:
        """Node-local folder for verified copies of remote artifacts."""
        return self.home / "cache"


def settings() -> Settings:
    """The settings of this process. Read each time, so that a test or a job may change the environment."""
    home = Path(os.environ.get(ENV_HOME) or Path.home() / ".modelyard").expanduser().absolute()
    return Settings(
        home=home,
        store=os.environ.get(ENV_STORE) or str(home / "store"),
        tracking_uri=os.environ.get(ENV_TRACKING) or f"sqlite:///{home / 'mlflow.db'}",
    )


ConfigT = TypeVar("ConfigT", bound=BaseModel)
_Location = Sequence[str | int]


def load(config_type: type[ConfigT], path: str | Path | None, overrides: Sequence[str] = ()) -> ConfigT:
    """Read a YAML file and apply dotted overrides (`--training.max_steps=20`; the dashes may be left out).

    Raises:
        ConfigError: the file cannot be read, a key is unknown (the nearest known one is suggested), or a
            value is refused (field, value and limit are named).
    """
    data = config_file.read(Path(path)) if path is not None else {}
    for override in overrides:
        config_file.apply_override(data, override)
    sources = ([str(path)] if path is not None else []) + (["command line"] if overrides else [])
    return parse(config_type, data, source=" + ".join(sources) or "no config file")


def parse(config_type: type[ConfigT], data: Mapping[str, Any], source: str = "config") -> ConfigT:
    """Build a config from plain data, translating pydantic's report into one `ConfigError`."""
    try:
        return config_type.model_validate(data)
    except ValidationError as error:
        details = _told(error)
        found = [_explain(config_type, detail) for detail in details]
        lines = [f"{field}: {problem}" if field else problem for field, problem in found]
        problem = lines[0] if len(lines) == 1 else "\n  ".join([f"{len(lines)} problems", *lines])
        field, first = found[0][0], details[0]["type"]
        todo = f"change {field} in the config file, or pass --{field}=VALUE" if field else "change one of these values"
        if first == "extra_forbidden":
            todo = "correct its name, or take it out; --print-config shows every field"
        raise ConfigError(f"{source}: {problem}", todo) from None


def _told(error: ValidationError) -> list[dict[str, Any]]:
    """All that was refused, without a list that is too short only because its items were refused."""
    details: list[dict[str, Any]] = [dict(detail) for detail in error.errors()]
    places = [detail["loc"] for detail in details]

    def holds_another(place: tuple[str | int, ...]) -> bool:
        return any(len(each) > len(place) and each[: len(place)] == place for each in places)

    return [each for each in details if each["type"] != "too_short" or not holds_another(each["loc"])]


def _laid_over(default: Config, given: Mapping[str, Any]) -> Mapping[str, Any]:
    kind = getattr(default, "kind", None)
    if given.get("kind", kind) != kind:
        return given  # another member of the union: nothing of the default applies to it
    merged = {name: getattr(default, name) for name in default.model_fields_set}
    if kind is not None:
        merged["kind"] = kind
    for name, value in given.items():
        under = merged.get(name)
        if isinstance(value, Mapping) and isinstance(under, Config):
            value = _laid_over(under, value)
        merged[name] = value
    return merged


def _explain(config_type: type[BaseModel], detail: dict[str, Any]) -> tuple[str, str]:
    """The dotted field of one pydantic error, and what is wrong with it: value, limit, nearest known name."""
    location, kind, context = detail["loc"], detail["type"], detail.get("ctx", {})
    field, value = ".".join(next(_ends(config_type, location))[0]), detail.get("input")
    if kind == "extra_forbidden":
        owner = next(_owners(config_type, location[:-1]), None)
        return field, f"unknown key; {nearest(str(location[-1]), owner.model_fields if owner else ())}"
    if kind == "missing":
        return field, "required, but not given"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        tags = sorted(tag for owner in _owners(config_type, location) if (tag := _tag(owner)))
        field = f"{field}.{str(context['discriminator']).strip(chr(39))}".lstrip(".")
        if kind == "union_tag_not_found":
            return field, f"required, but not given; known: {', '.join(tags)}"
        return field, f"unknown value {context['tag']!r}; {nearest(str(context['tag']), tags)}"
    message = str(detail["msg"]).removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if kind in ("tuple_type", "list_type"):
        message = f"should be a list, for example [{value}]"
    if kind == "string_type" and isinstance(value, bool | int | float):
        message += ", in quotes"
    return field, message if isinstance(value, Mapping | BaseModel) else f"{message} (got {reprlib.repr(value)})"


def _owners(annotation: Any, location: _Location) -> Iterator[type[BaseModel]]:
    """The config classes at a pydantic error location: one, or all members of a union."""
    for _, end in _ends(annotation, location):
        if isinstance(end, type) and issubclass(end, BaseModel):
            yield end


def _ends(annotation: Any, location: _Location, keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Where a pydantic error location may lead: the keys a person writes to get there, and the type there.

    Pydantic's locations also name the chosen member of a union, which is no key.
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        yield from _ends(arguments[0], location, keys)
    elif origin in (typing.Union, types.UnionType):
        members = [member for member in arguments if member is not types.NoneType]
        has_choice = len(members) > 1 and len(location) > 0
        named = [member for member in members if has_choice and str(location[0]) in (_tag(member), _name(member))]
        for member in named or members:
            yield from _ends(member, location[1:] if has_choice else location, keys)
    elif not location:
        yield keys, annotation
    elif origin is not None:  # a list, tuple or dict: the next part is the index or the key
        yield from _ends(_item(arguments, location[0]), location[1:], (*keys, str(location[0])))
    elif field := getattr(annotation, "model_fields", {}).get(str(location[0])):
        yield from _ends(field.annotation, location[1:], (*keys, str(location[0])))
    else:
        yield (*keys, *map(str, location)), None


def _item(arguments: tuple[Any, ...], key: str | int) -> Any:
    """The type at `key` of a container with these type arguments."""
    if isinstance(key, int) and key < len(arguments) and Ellipsis not in arguments:
        return arguments[key]
    return arguments[0 if Ellipsis in arguments else -1]


def _tag(annotation: Any) -> str | None:
    """The name by which a discriminated union knows this member: a pydantic `Tag`, or the value of `kind`."""
    if typing.get_origin(annotation) is typing.Annotated:
        inner, *extras = typing.get_args(annotation)
        return next((extra.tag for extra in extras if isinstance(extra, Tag)), None) or _tag(inner)
    field = getattr(annotation, "model_fields", {}).get("kind")
    literals = () if field is None else typing.get_args(field.annotation)
    return str(literals[0]) if literals else None


def _name(annotation: Any) -> str | None:
    return getattr(annotation, "__name__", None)  # what pydantic puts into a location for a union without tags
