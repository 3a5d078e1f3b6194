"""How anything names an artifact: `models:/tiny-gpt@production`, `models:/tiny-gpt/3`, `datasets:/pydocs`."""

from __future__ import annotations

import re
from typing import NamedTuple

from modelyard.artifacts.manifest import NAME_PATTERN, Kind
from modelyard.errors import ConfigError

_PATTERN = re.compile(
    rf"(?:(?P<scheme>[A-Za-z]+):/)?(?P<name>{NAME_PATTERN})(?:/(?P<version>[1-9][0-9]{{0,8}})|@(?P<alias>[^/@]+))?"
)
_ALIAS = re.compile(r"[A-Za-z0-9_-]{1,128}")
_FORMS = "write models:/name/3, models:/name@alias, models:/name (the newest), or the same with datasets:/"


class Reference(NamedTuple):
    """One artifact by name: with a version, with an alias, or the newest when both are None."""

    kind: Kind
    name: str
    version: int | None = None
    alias: str | None = None

    def __str__(self) -> str:
        if self.version is not None:
            return f"{self.kind}s:/{self.name}/{self.version}"
        return f"{self.kind}s:/{self.name}" + (f"@{self.alias}" if self.alias is not None else "")


def parse(text: str, kind: Kind | None = None) -> Reference:
    """Read a reference. Where `kind` is given the scheme may be left out (`tiny-gpt/3`), not contradict it.

    Raises:
        ConfigError: it is not of a known form; the error shows the forms.
    """
    match = _PATTERN.fullmatch(text)
    if match is None:
        raise ConfigError(f"{text!r} is not a reference", _FORMS)
    scheme, alias, version = match["scheme"], match["alias"], match["version"]
    if scheme is None and kind is None:
        raise ConfigError(f"{text!r} does not say whether it is a model or a dataset", _FORMS)
    named: Kind | None = {"models": "model", "datasets": "dataset", None: kind}.get(scheme)
    if named is None:
        raise ConfigError(f"{text!r}: unknown scheme {scheme!r}", _FORMS)
    if kind is not None and named != kind:
        raise ConfigError(f"{text!r} names a {named}, but a {kind} is needed here", _FORMS)
    if alias is not None:
        check_alias(alias)
    return Reference(named, match["name"], int(version) if version else None, alias)


def check_alias(alias: str) -> str:
    """The alias itself.

    Raises:
        ConfigError: it holds other characters than letters, digits, `_` and `-`, or is `latest` or like `v3`.
    """
    if not _ALIAS.fullmatch(alias):
        raise ConfigError(f"{alias!r} is not an alias", "use letters, digits, '_' and '-', e.g. production")
    if alias.lower() == "latest" or re.fullmatch(r"[vV][0-9]+", alias):
        raise ConfigError(f"the alias {alias!r} is reserved", "leave it out to get the newest version, or write /3")
    return alias
