"""Which values a study tries: ranges and choices over any field of a training config. Pure.

    optimizer.learning_rate: {low: 1.0e-4, high: 0.1, log: true}
    task.hidden: [32, 64, 128]                          # a choice
    optimizer.momentum: {low: 0.5, high: 0.99, when: {optimizer.kind: sgd}}

A searcher sees every parameter as a plain number or word; `Space.decode` turns what it suggests into values of the
fields.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from modelyard.config import Config, parse
from modelyard.errors import ConfigError
from modelyard.training.config import TrainConfig

OWNED = ("name", "run")
"""Fields that a study sets itself."""
CHECKED_SAMPLES = 100
"""Combinations that are tried out against the training config before a trial starts."""
Scalar = bool | int | float | str | None


class Choice(Config):
    """One of several values, of any type the field takes; whole sections too."""

    values: tuple[Any, ...]
    when: dict[str, Any] = {}
    """Only where these other parameters have these values."""

    @field_validator("values")
    @classmethod
    def _some_values(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        if not values:
            raise ValueError("an empty choice: name at least one value in its list")
        return values


class Range(Config):
    """Every value from `low` to `high`, both included."""

    low: int | float
    high: int | float
    log: bool = False
    """Draw evenly over orders of magnitude."""
    step: int | float | None = Field(default=None, gt=0)
    """Only `low`, `low + step`, `low + 2 step`, ..."""
    when: dict[str, Any] = {}
    """Only where these other parameters have these values."""

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"low={self.low:g} must be below high={self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError(f"log needs low above 0 (got {self.low:g})")
        if self.log and self.step is not None:
            raise ValueError("log and step exclude each other")
        return self

    def steps(self) -> tuple[int | float, ...]:
        """All values of a stepped range."""
        assert self.step is not None
        count = math.floor((self.high - self.low) / self.step + 1e-9) + 1
        return tuple(self._rounded(self.low + index * self.step) for index in range(count))

    def _rounded(self, value: int | float) -> int | float:
        return value if isinstance(value, int) else float(f"{value:.12g}")


Kind = Literal["float", "int", "index", "word"]


@dataclass(frozen=True)
class Dimension:
    """One parameter as a searcher sees it.

    `float` and `int` are drawn from low..high; `index` is the number of a stepped value, `word` one of `labels`.
    """

    name: str
    kind: Kind
    low: int | float = 0
    high: int | float = 0
    log: bool = False
    values: tuple[Any, ...] = ()
    labels: tuple[Scalar, ...] = ()
    when: Mapping[str, Any] = field(default_factory=dict)

    def decode(self, raw: Any) -> Any:
        """The field's value for what a searcher suggests."""
        if self.kind == "word":
            return self.values[self.labels.index(raw)]
        if self.kind == "index":
            return self.values[int(raw)]
        return int(raw) if self.kind == "int" else float(raw)

    def within(self, raw: Any) -> Any:
        """`raw` moved to the nearest value this dimension has (PBT multiplies beyond the limits)."""
        if self.kind == "word":
            return raw
        limited = min(max(raw, self.low), self.high)
        return float(limited) if self.kind == "float" else round(limited)

    def draw(self, dice: random.Random) -> Any:
        """A random raw value."""
        if self.kind == "word":
            return dice.choice(self.labels)
        if self.log:
            drawn = math.exp(dice.uniform(math.log(self.low), math.log(self.high)))
        else:
            drawn = dice.uniform(self.low, self.high)
        return self.within(drawn)

    def all(self) -> tuple[Any, ...] | None:
        """Every raw value; None for a range without steps."""
        if self.kind == "word":
            return self.labels
        return tuple(range(len(self.values))) if self.kind == "index" else None

    def ends(self) -> tuple[Any, ...]:
        """Values of the field that have to be valid for the whole dimension to be."""
        return self.values if self.values else (self.decode(self.low), self.decode(self.high))


@dataclass(frozen=True)
class Space:
    """The parameters of a study over one training config, given as plain data."""

    base: Mapping[str, Any]
    dimensions: tuple[Dimension, ...]

    def decode(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Values by field; those whose condition does not hold are left out."""
        params = {each.name: each.decode(raw[each.name]) for each in self.dimensions if each.name in raw}
        by_name = {each.name: each for each in self.dimensions}
        return {name: value for name, value in params.items() if self._applies(by_name[name], params)}

    def config(self, params: Mapping[str, Any], **fields: Any) -> TrainConfig:
        """The training config of one trial.

        Raises:
            ConfigError: these values do not go together.
        """
        return parse(TrainConfig, {**lay(self.base, params), **fields}, source="trial")

    def draw(self, dice: random.Random) -> dict[str, Any]:
        """Random values by field."""
        return self.decode({each.name: each.draw(dice) for each in self.dimensions})

    def grid(self) -> Iterator[dict[str, Any]]:
        """Every combination of raw values.

        Raises:
            ConfigError: a range has no steps.
        """
        for each in self.dimensions:
            if each.all() is None:
                raise ConfigError(
                    f"space.{each.name}: a grid needs a list of values or a range with a step",
                    f"give {each.name} a step, or set search.kind to random or tpe",
                )
        names = [each.name for each in self.dimensions]
        for combination in itertools.product(*(each.all() or () for each in self.dimensions)):
            yield dict(zip(names, combination, strict=True))

    def _applies(self, dimension: Dimension, params: Mapping[str, Any]) -> bool:
        return all(
            params[name] == wanted if name in params else _get(self.base, name) == wanted
            for name, wanted in dimension.when.items()
        )


def space(base: Mapping[str, Any], parameters: Mapping[str, Choice | Range]) -> Space:
    """Check every parameter against the training config's own types, and make a space of them.

    Raises:
        ConfigError: a field is unknown (the nearest known one is named), a value is none that the field takes, two
            parameters overlap, or no combination of values is a valid config.
    """
    parse(TrainConfig, base, source="train")
    if not parameters:
        raise ConfigError("space: names no parameter", "add one, e.g. optimizer.learning_rate: [0.001, 0.01]")
    for name, parameter in parameters.items():
        _check_name(name, parameters)
        _check_condition(name, parameter, base, parameters)
    made = known_space(base, parameters)
    ends = [(dimension, value) for dimension in made.dimensions for value in dimension.ends()]
    doubtful = [(dimension, value) for dimension, value in ends if not _check_value(base, dimension, value)]
    for dimension, value in doubtful:
        _check_with_others(made, dimension, value)
    _check_combinations(made)
    return made


def known_space(base: Mapping[str, Any], parameters: Mapping[str, Choice | Range]) -> Space:
    """The space of parameters that `space` has checked before."""
    return Space(base, tuple(_dimension(name, each, base) for name, each in parameters.items()))


def lay(base: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `base` with dotted fields set."""
    laid: dict[str, Any] = copy.deepcopy(dict(base))
    for name in sorted(params, key=lambda name: name.count(".")):
        *parents, leaf = name.split(".")
        section = laid
        for parent in parents:
            if not isinstance(section.get(parent), dict):
                section[parent] = _spelled_out(parent, section.get(parent))
            section = section[parent]
        section[leaf] = params[name]
    return laid


def _spelled_out(name: str, value: Any) -> dict[str, Any]:
    """A section written in short (`workers: 2`) as the mapping it stands for."""
    return {"min": value, "max": value} if name == "workers" and isinstance(value, int) else {}


def _dimension(name: str, parameter: Choice | Range, base: Mapping[str, Any]) -> Dimension:
    if isinstance(parameter, Choice):
        labels = tuple(value if isinstance(value, Scalar) else json.dumps(value) for value in parameter.values)
        return Dimension(name, "word", values=parameter.values, labels=labels, when=parameter.when)
    if parameter.step is not None:
        values = parameter.steps()
        return Dimension(name, "index", 0, len(values) - 1, values=values, when=parameter.when)
    is_whole = isinstance(parameter.low, int) and isinstance(parameter.high, int)
    kind: Kind = "int" if is_whole and not _takes_fractions(base, name, parameter) else "float"
    return Dimension(name, kind, parameter.low, parameter.high, parameter.log, when=parameter.when)


def _takes_fractions(base: Mapping[str, Any], name: str, parameter: Range) -> bool:
    between = parameter.low + (parameter.high - parameter.low) / math.sqrt(3)
    try:
        parse(TrainConfig, lay(base, {**parameter.when, name: between}))
    except ConfigError as error:
        return "integer" not in error.problem
    return True


def _check_value(base: Mapping[str, Any], dimension: Dimension, value: Any) -> bool:
    """Refuse a value that its field cannot have; whether it also goes with the base config.

    Raises:
        ConfigError: the field is unknown, or the value is none that it takes.
    """
    name = dimension.name
    try:
        parse(TrainConfig, lay(base, {**dimension.when, name: value}), source="space")
    except ConfigError as error:
        problem = error.problem.removeprefix("space: ")
        field = problem.partition(":")[0]
        if "unknown key" in problem and f"{name}.".startswith(f"{field}."):
            raise ConfigError(f"space.{problem}", error.todo) from None
        if f"{field}.".startswith(f"{name}."):
            raise ConfigError(f"space.{problem}", f"change space.{name}") from None
        return False
    return True


def _check_with_others(made: Space, dimension: Dimension, value: Any) -> None:
    """Refuse a value that makes a valid config with no values of the other parameters.

    Raises:
        ConfigError: with the problem of the last combination.
    """
    dice, problem = random.Random(0), ""
    for _ in range(CHECKED_SAMPLES):
        try:
            made.config({**made.draw(dice), **dimension.when, dimension.name: value})
        except ConfigError as error:
            problem = error.problem.removeprefix("trial: ")
        else:
            return
    name = dimension.name
    raise ConfigError(f"space.{name}={value!r}: {problem}", f"change space.{name}, or what it does not go with")


def _check_name(name: str, others: Mapping[str, Any]) -> None:
    if name in OWNED:
        raise ConfigError(f"space.{name}: the study names its runs itself", "take it out")
    inside = next((other for other in others if other.startswith(f"{name}.")), None)
    if inside is not None:
        raise ConfigError(f"space: {inside} lies inside {name}, which is given as well", "keep one of the two")


def _check_condition(
    name: str, parameter: Choice | Range, base: Mapping[str, Any], parameters: Mapping[str, Choice | Range]
) -> None:
    for other, wanted in parameter.when.items():
        known = parameters.get(other)
        if known is None and _get(base, other) is None:
            raise ConfigError(
                f"space.{name}.when: {other!r} is neither a parameter nor set in the training config",
                f"add it to the space (known: {', '.join(sorted(parameters))})",
            )
        if isinstance(known, Choice) and wanted not in known.values:
            values = list(known.values)
            raise ConfigError(f"space.{name}.when: {other} is never {wanted!r}", f"it is one of {values}")


def _check_combinations(made: Space) -> None:
    dice = random.Random(0)
    problem: ConfigError | None = None
    for _ in range(CHECKED_SAMPLES):
        try:
            made.config(made.draw(dice))
        except ConfigError as error:
            problem = error
        else:
            return
    assert problem is not None
    raise ConfigError(
        f"space: none of {CHECKED_SAMPLES} combinations is a valid training config; the last: {problem.problem}",
        problem.todo,
    )


def _get(base: Mapping[str, Any], name: str) -> Any:
    value: Any = base
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def parameter_of(value: Any) -> Any:
    """Plain data of a config file as a parameter: a list is a choice, a mapping with `values` too."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return {"values": value}
    if not isinstance(value, Mapping):
        return {"values": [value]}
    return value
