"""Config files and overrides as plain data: YAML in, YAML out, `section.field=value` in between.

YAML's scalars are those of version 1.2, so `1e-3` is a number and `no` and `2024-01-01` are words; a key
given twice is refused.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from modelyard.errors import ConfigError


def read(path: Path) -> dict[str, Any]:
    """The mapping a YAML file holds; an empty file is an empty mapping.

    Raises:
        ConfigError: the file is missing, unreadable, not YAML, not a mapping, or gives a key twice.
    """
    name = f"config file {str(path)!r}"
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise ConfigError(f"{name} does not exist", "check the path") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{name} is not valid YAML: {error}", "correct that line") from error
    except RecursionError:
        raise ConfigError(f"{name} is nested too deeply to read", "flatten it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{name} cannot be read: {error}", "it must be a readable UTF-8 text file") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{name} holds a {type(data).__name__}", "it must hold `key: value` pairs")
    return data


def to_yaml(data: Any) -> str:
    """Plain data as YAML that `read` gives back unchanged."""
    return str(yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True))


def apply_override(data: dict[str, Any], override: str) -> None:
    """Set one field of `data` in place from `--section.field=value`, creating the sections it names.

    Items of a list that is there have numbers from 0: `--steps.0.codes=int4`.

    Raises:
        ConfigError: the override is not of that form, or goes through a value that is not a section.
    """
    key, separator, text = override.removeprefix("--").partition("=")
    *parents, leaf = key.split(".")
    if not separator or not leaf or not all(parents):
        raise ConfigError(f"override {override!r} is not complete", "write it as --section.field=value")
    place: Any = data
    for parent in parents:
        if isinstance(place, dict) and place.get(parent) is None:
            place[parent] = {}
        place = place[_key(place, parent, override)]
        if not isinstance(place, dict | list):
            raise ConfigError(
                f"override {override!r}: {parent!r} holds {place!r} here, not a section",
                f"give {parent!r} as a whole, in YAML's inline form",
            )
    try:
        place[_key(place, leaf, override)] = _value(text)
    except yaml.YAMLError as error:
        problem = f"override {override!r} has a value that is not YAML: {error}"
        raise ConfigError(problem, "close its brackets and quotes") from error


def _key(place: dict[str, Any] | list[Any], name: str, override: str) -> Any:
    """What leads to `name` in a section, or to an item of a list by its number."""
    if isinstance(place, dict):
        return name
    if not (name.isdigit() and int(name) < len(place)):
        problem = f"override {override!r}: {name!r} is no number of the list's {len(place)} items"
        raise ConfigError(
            problem, f"count from 0 to {len(place) - 1}, or give the list as a whole, in YAML's inline form"
        )
    return int(name)


def _value(text: str) -> Any:
    """YAML when the text is bracketed or quoted, else one scalar whatever characters are in it."""
    if text.lstrip()[:1] in ("[", "{", '"', "'"):
        return yaml.load(text, Loader=_Loader)
    loader = _Loader("")
    tag = loader.resolve(yaml.ScalarNode, text, (True, False))  # type: ignore[no-untyped-call]
    return loader.construct_object(yaml.ScalarNode(tag, text))


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # none of version 1.1; filled below

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As `SafeLoader`, refusing a key given twice."""
        first: dict[str, yaml.Node] = {}
        for key, _ in node.value:
            if first.setdefault(str(key.value), key) is not key:
                problem = f"the key {key.value!r} is given twice"
                raise yaml.constructor.ConstructorError(problem=problem, problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)

    def construct_int(self, node: yaml.ScalarNode) -> int:
        """Decimal whatever the leading zeros; `0x` and `0o` as in Python."""
        digits = str(node.value).replace("_", "")
        return int(digits, 0) if digits.lstrip("+-")[:2] in ("0x", "0o") else int(digits)


class _Dumper(yaml.SafeDumper):
    """Quotes every string that `_Loader` would read as something else."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """Escape the line breaks that only Unicode knows: PyYAML writes them as they are and reads back a space."""
        style = '"' if any(char in text for char in "\x85\u2028\u2029") else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style)


_SCALARS = {  # in this order: what looks like an integer is not a float
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "int": (r"[-+]?[0-9][0-9_]*|[-+]?0o[0-7]+|[-+]?0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9_]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    "merge": (r"<<", ["<"]),
}
for _name, (_pattern, _first) in _SCALARS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(rf"(?:{_pattern})\Z"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_int)
_Dumper.add_representer(str, _Dumper.represent_text)
