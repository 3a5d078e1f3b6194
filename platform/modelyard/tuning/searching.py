"""From a study's config to Ray Tune's searchers and schedulers, and Optuna's."""

from __future__ import annotations

import random
from typing import Any

from ray import tune
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)
from ray.tune.search import BasicVariantGenerator, ConcurrencyLimiter, SearchAlgorithm, Searcher

from modelyard.extras import optional
from modelyard.tuning.config import Asha, MedianStopping, Pbt, StudyConfig
from modelyard.tuning.space import Dimension, Space

TIME = "step"
"""Key of a trial's result that counts optimizer steps."""


def require_optuna() -> None:
    """Refuse what needs Optuna where it is missing.

    Raises:
        MissingExtraError: with the extra that brings it.
    """
    optional("optuna", "optuna", "tune")


def param_space(config: StudyConfig, space: Space) -> dict[str, Any]:
    """Tune's search space: one flat key per field."""
    if config.search.kind == "grid":
        return {each.name: tune.grid_search(list(each.all() or ())) for each in space.dimensions}
    return {each.name: domain(each) for each in space.dimensions}


def num_trials(config: StudyConfig, space: Space) -> int:
    """How many trials the study has."""
    return sum(1 for _ in space.grid()) if config.search.kind == "grid" else config.trials


def domain(dimension: Dimension) -> Any:
    """Tune's distribution of one parameter."""
    low, high = dimension.low, dimension.high
    if dimension.kind == "word":
        return tune.choice(list(dimension.labels))
    if dimension.kind == "float":
        return tune.loguniform(low, high) if dimension.log else tune.uniform(low, high)
    return tune.lograndint(low, high + 1) if dimension.log else tune.randint(low, high + 1)


def searcher(config: StudyConfig, parallel: int) -> Searcher | SearchAlgorithm:
    """What proposes values, for `parallel` trials at a time.

    Raises:
        MissingExtraError: Optuna is not installed.
    """
    if config.search.kind != "tpe":
        return BasicVariantGenerator(max_concurrent=parallel, random_state=config.seed)
    require_optuna()
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(
        seed=config.seed, n_startup_trials=config.search.startup_trials, multivariate=False, constant_liar=True
    )
    if len(config.objectives) == 1:
        (objective,) = config.objectives
        found = OptunaSearch(metric=objective.metric, mode=objective.mode, sampler=sampler)
    else:
        metrics, modes = [each.metric for each in config.objectives], [each.mode for each in config.objectives]
        found = OptunaSearch(metric=metrics, mode=modes, sampler=sampler)
    return ConcurrencyLimiter(found, max_concurrent=parallel)


def scheduler(config: StudyConfig, space: Space, *, every_steps: int, max_steps: int) -> TrialScheduler:
    """What decides at each validation whether a trial goes on."""
    chosen, objective = config.scheduler, config.objectives[0]
    judged = {"time_attr": TIME, "metric": objective.metric, "mode": objective.mode}
    match chosen:
        case Asha():
            return AsyncHyperBandScheduler(
                **judged,
                max_t=max_steps + 1,  # a trial ends by itself, and then leaves a model
                grace_period=chosen.grace_steps or every_steps,
                reduction_factor=chosen.reduction_factor,
            )
        case MedianStopping():
            return MedianStoppingRule(
                **judged,
                grace_period=chosen.grace_steps or every_steps,
                min_samples_required=chosen.min_trials,
                hard_stop=True,
            )
        case Pbt():
            random.seed(config.seed)  # Tune's PBT draws from the process's own generator
            return PopulationBasedTraining(
                **judged,
                perturbation_interval=chosen.interval_steps or every_steps,
                hyperparam_mutations={each.name: _mutation(each) for each in space.dimensions},
                quantile_fraction=chosen.quantile,
                resample_probability=chosen.resample_probability,
                custom_explore_fn=Explore({each.name: each for each in space.dimensions}),
                log_config=False,
            )
        case _:
            return FIFOScheduler()


class Explore:
    """Keeps mutated values inside the space. A class, because Tune pickles it with its state."""

    def __init__(self, dimensions: dict[str, Dimension]) -> None:
        self._dimensions = dimensions

    def __call__(self, config: dict[str, Any]) -> dict[str, Any]:
        """The mutated config with every parameter within its limits."""
        return {n: self._dimensions[n].within(v) if n in self._dimensions else v for n, v in config.items()}


def _mutation(dimension: Dimension) -> Any:
    """PBT moves along a list by one place, and multiplies numbers by 0.8 or 1.2."""
    every = dimension.all()
    return list(every) if every is not None else domain(dimension)
