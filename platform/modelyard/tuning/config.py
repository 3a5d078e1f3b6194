"""Everything a study can be told. Defaults live here and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from modelyard import config_file
from modelyard.config import Config, parse
from modelyard.errors import ConfigError, nearest
from modelyard.training.config import TrainConfig
from modelyard.tuning.space import Choice, Range, Space, parameter_of, space

Parameter = Annotated[
    Annotated[Choice, Tag("choice")] | Annotated[Range, Tag("range")],
    Discriminator(lambda value: "choice" if isinstance(value, Choice) or "values" in value else "range"),
]


class Objective(Config):
    """What makes a trial better than another."""

    metric: str
    """A validation metric of the task (`accuracy`, `perplexity`), or `train_loss`, `elapsed_s`, `rows_per_s`,
    `tokens_per_s`, `parameters`."""
    mode: Literal["min", "max"]


class Search(Config):
    """How the next values are found."""

    kind: Literal["tpe", "random", "grid"] = "tpe"
    """`tpe`: Optuna's tree-structured Parzen estimator (Bergstra et al., 2011), over Pareto fronts when there are
    several objectives. `grid`: every combination once."""
    startup_trials: int = Field(default=10, gt=0)
    """`tpe` only: random trials before it begins to learn."""


class NoStopping(Config):
    """Every trial trains to its end."""

    kind: Literal["none"] = "none"


class Asha(Config):
    """Successive halving without waiting (Li et al., 2020): only the best of a rung go on."""

    kind: Literal["asha"] = "asha"
    grace_steps: int | None = Field(default=None, gt=0)
    """Steps that every trial gets, the first rung; None takes `validation.every_steps`."""
    reduction_factor: float = Field(default=4, gt=1)
    """One trial in so many goes on from a rung; each rung is so many times longer."""


class MedianStopping(Config):
    """Stop a trial whose best is below the median of the others' means so far (Golovin et al., 2017)."""

    kind: Literal["median"] = "median"
    grace_steps: int | None = Field(default=None, gt=0)
    """Steps that every trial gets; None takes `validation.every_steps`."""
    min_trials: int = Field(default=3, gt=0)
    """Trials that must have come as far before one is stopped."""


class Pbt(Config):
    """Population-based training (Jaderberg et al., 2017): the worst go on from checkpoints of the best, mutated.

    All trials run at once, whatever `parallel` says.
    """

    kind: Literal["pbt"] = "pbt"
    interval_steps: int | None = Field(default=None, gt=0)
    """Steps between exploitations; None takes `validation.every_steps`."""
    quantile: float = Field(default=0.25, gt=0, le=0.5)
    """Share of the population that is replaced, and that it is replaced from."""
    resample_probability: float = Field(default=0.25, ge=0, le=1)
    """Chance that a value is drawn anew instead of moved by a fifth."""


Scheduler = Annotated[NoStopping | Asha | MedianStopping | Pbt, Field(discriminator="kind")]

COSTS = ("elapsed_s", "rows_per_s", "tokens_per_s")
"""Figures of every trial that the training loop measures."""
_ALWAYS = (*COSTS, "train_loss", "parameters")
_PARAMETER_KEYS = {*Choice.model_fields, *Range.model_fields}
_MUTABLE = ("optimizer.", "schedule.", "training.gradient_clipping", "training.micro_batch_size")
"""What may change in the middle of a run: everything else changes the model or what it is measured on."""


class StudyConfig(Config):
    """One study: the file behind `modelyard tune FILE`."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the study, by which it is shown and resumed."""
    base: str | None = None
    """Path of the training config that trials start from; None takes all of it from `train`."""
    train: dict[str, Any] = {}
    """Fields of the training config, laid over those of `base`."""
    space: dict[str, Parameter]
    """What is tried, by dotted field: a list of values, or `{low, high, log, step}`."""
    objectives: tuple[Objective, ...] = ()
    """Several make a Pareto front; none takes the task's own."""
    search: Search = Search()
    scheduler: Scheduler = NoStopping()
    trials: int = Field(default=20, gt=0)
    """How many combinations are tried; of a `grid`, all are."""
    parallel: int | None = Field(default=None, gt=0)
    """Trials that run at once; None takes as many as the cluster holds."""
    time_budget_s: float | None = Field(default=None, gt=0)
    """Seconds after which no trial goes on."""
    seed: int = Field(default=0, ge=0)
    """Seeds the search. Trials take theirs from the training config."""
    register_best: bool = True
    """Register the best trial's model."""

    @field_validator("search", "scheduler", mode="before")
    @classmethod
    def _a_word_is_a_kind(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value

    @field_validator("space", mode="before")
    @classmethod
    def _lists_are_choices(cls, value: Any) -> Any:
        return {name: parameter_of(each) for name, each in _by_field(value)} if isinstance(value, Mapping) else value

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.scheduler.kind == "pbt" and self.search.kind != "random":
            raise ValueError(f"scheduler pbt moves values itself: set search.kind=random (got {self.search.kind})")
        if self.scheduler.kind != "none" and len(self.objectives) > 1:
            raise ValueError(
                f"scheduler {self.scheduler.kind} compares trials by one objective (got {len(self.objectives)}): "
                "keep one, or set scheduler.kind=none"
            )
        if self.scheduler.kind == "pbt" and self.trials < 2:
            raise ValueError(f"scheduler pbt needs a population: set trials to 2 or more (got {self.trials})")
        return self

    def training(self) -> dict[str, Any]:
        """The training config as plain data: `base` with `train` laid over it.

        Raises:
            ConfigError: `base` cannot be read.
        """
        return _merged(config_file.read(Path(self.base)) if self.base is not None else {}, self.train)


def resolve(config: StudyConfig) -> tuple[StudyConfig, Space]:
    """The study with its training config inside and its objectives named, and its space; everything is checked.

    Raises:
        ConfigError: the training config, the space, or how the two and the scheduler go together.
    """
    plain = config.training()
    base = parse(TrainConfig, plain, source="train")
    metric, mode = base.task.objective
    objectives = config.objectives or (Objective(metric=metric, mode=mode),)
    for number, objective in enumerate(objectives):
        known = (*base.task.metric_names, *_ALWAYS)
        if base.task.metric_names and "task.kind" not in config.space and objective.metric not in known:
            raise ConfigError(
                f"objectives.{number}.metric: task {base.task.kind} has no {objective.metric!r}; "
                f"{nearest(objective.metric, known)}",
                f"name one of {', '.join(known)}",
            )
    every = base.validation.every_steps
    if config.scheduler.kind != "none" and every == 0:
        raise ConfigError(
            f"scheduler {config.scheduler.kind} needs to see trials on the way, but train.validation.every_steps is 0",
            "set train.validation.every_steps, the distance of the looks",
        )
    made = space(plain, config.space)
    if config.scheduler.kind == "pbt":
        for each in made.dimensions:
            if each.name == "optimizer.kind" or not (each.name.startswith(_MUTABLE) or each.name.endswith("dropout")):
                raise ConfigError(
                    f"space.{each.name}: pbt changes values in the middle of a run, where this one cannot change",
                    f"it may move {', '.join(f'{name}*' for name in _MUTABLE)} and dropouts; or use scheduler asha",
                )
    if config.search.kind == "grid":
        next(made.grid())
    return config.with_changes(base=None, train=plain, objectives=objectives), made


def _by_field(space: Mapping[str, Any], section: str = "") -> Iterator[tuple[str, Any]]:
    """What is tried, by dotted field: overrides of the command line come as sections within sections."""
    for name, value in space.items():
        if isinstance(value, Mapping) and value and not set(value) & _PARAMETER_KEYS:
            yield from _by_field(value, f"{section}{name}.")
        else:
            yield f"{section}{name}", value


def _merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for name, value in over.items():
        old = merged.get(name)
        merged[name] = _merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged
