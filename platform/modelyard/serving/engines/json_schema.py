"""The JSON schemas that an engine may be given: a plain part of the language, checked before it gets there.

A schema comes from a caller, and one that the engine's grammar compiler refuses would stop the engine for everybody.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from modelyard.errors import InputError

_TYPES = frozenset({"object", "array", "string", "number", "integer", "boolean", "null"})
_NOTES = frozenset({"title", "description", "default", "examples", "$schema", "$id", "$defs", "definitions"})
_COUNTS = frozenset({"minLength", "maxLength", "minItems", "maxItems"})
_KNOWN = _NOTES | _COUNTS | {"type", "properties", "required", "additionalProperties", "items", "enum", "const"}
_MAX_DEPTH = 32
_MAX_COUNT = 10_000
_MAX_NODES = 2_000


def plain_schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema without notes, with every local `$ref` replaced by what it names.

    Raises:
        InputError: it uses a keyword or a value beyond the plain part, refers to itself, or is too large.
    """
    return _Plain(schema).node(schema, "schema", ())


class _Plain:
    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root
        self._nodes = 0

    def node(self, schema: Any, where: str, refs: tuple[str, ...]) -> dict[str, Any]:
        self._nodes += 1
        if self._nodes > _MAX_NODES or where.count(".") > _MAX_DEPTH:
            raise InputError(f"json_schema: it has more than {_MAX_NODES} parts or {_MAX_DEPTH} levels", "simplify it")
        if not isinstance(schema, Mapping):
            raise InputError(f"json_schema: {where} is {schema!r}, not an object")
        if "$ref" in schema:
            return self._resolve(schema["$ref"], where, refs)
        if "anyOf" in schema:
            options = schema["anyOf"]
            if not isinstance(options, list) or not options or set(schema) - _NOTES - {"anyOf"}:
                raise InputError(f"json_schema: {where}.anyOf must be a list of schemas, alone in its place")
            return {"anyOf": [self.node(one, f"{where}.anyOf", refs) for one in options]}
        if unknown := sorted(set(schema) - _KNOWN):
            raise InputError(f"json_schema: {where} uses {unknown[0]!r}", f"known: {', '.join(sorted(_KNOWN))}, anyOf")
        kinds = schema.get("type")
        if (kinds is not None and not set(kinds if isinstance(kinds, list) else [kinds]) <= _TYPES) or kinds == []:
            raise InputError(f"json_schema: {where}.type is {kinds!r}", f"known: {', '.join(sorted(_TYPES))}")
        plain = {name: value for name, value in schema.items() if name not in _NOTES}
        _check_counts(plain, where)
        _check_values(plain, where)
        if "properties" in plain:
            properties = plain["properties"]
            if not isinstance(properties, Mapping):
                raise InputError(f"json_schema: {where}.properties is no object")
            plain["properties"] = {name: self.node(one, f"{where}.{name}", refs) for name, one in properties.items()}
        if "items" in plain:
            plain["items"] = self.node(plain["items"], f"{where}.items", refs)
        _check_object(plain, where)
        return plain

    def _resolve(self, ref: Any, where: str, refs: tuple[str, ...]) -> dict[str, Any]:
        found: Any = self._root
        for part in str(ref).removeprefix("#/").split("/"):
            found = found.get(part) if isinstance(found, Mapping) else None
        if not str(ref).startswith("#/") or found is None or ref in refs:
            raise InputError(
                f"json_schema: {where} refers to {ref!r}", "refer to `#/$defs/...` in the same schema, not to itself"
            )
        return self.node(found, where, (*refs, ref))


def _check_counts(plain: Mapping[str, Any], where: str) -> None:
    for name in _COUNTS & set(plain):
        if type(plain[name]) is not int or not 0 <= plain[name] <= _MAX_COUNT:
            raise InputError(f"json_schema: {where}.{name} is {plain[name]!r}", f"give 0 to {_MAX_COUNT}")
    for of in ("Length", "Items"):
        if plain.get(f"min{of}", 0) > plain.get(f"max{of}", _MAX_COUNT):
            raise InputError(f"json_schema: {where} has min{of} above max{of}")


def _check_values(plain: Mapping[str, Any], where: str) -> None:
    values = plain.get("enum", [])
    if not isinstance(values, list) or ("enum" in plain and not values):
        raise InputError(f"json_schema: {where}.enum must be a list of values")
    for value in [*values, plain.get("const")]:
        if value is not None and not isinstance(value, str | int | float | bool):
            raise InputError(f"json_schema: {where} lists {value!r}, where plain values are possible")


def _check_object(plain: Mapping[str, Any], where: str) -> None:
    required = plain.get("required", [])
    if not isinstance(required, list) or (set(map(str, required)) - set(plain.get("properties", {}))):
        raise InputError(f"json_schema: {where}.required names what is not among its properties")
    if not isinstance(plain.get("additionalProperties", False), bool):
        raise InputError(f"json_schema: {where}.additionalProperties must be true or false")
