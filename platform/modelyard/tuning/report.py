"""A study as pictures: parallel coordinates, what each parameter mattered, and the trials' curves."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from modelyard.config import settings
from modelyard.tuning.config import Objective, StudyConfig
from modelyard.tuning.space import Dimension, known_space
from modelyard.tuning.study import Trial, TrialStatus, best
from modelyard.tuning.tables import figure, short, shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

LEAST_TRIALS = 4
"""Trials below which importance says nothing."""
_STATUS_STYLE = {TrialStatus.DONE: "-", TrialStatus.STOPPED: ":", TrialStatus.RUNNING: "--"}


@dataclass(frozen=True)
class Pictures:
    """PNG files in the local home; None where there was too little to draw."""

    parallel: Path | None
    importance: Path | None
    curves: Path | None


def pictures(name: str, config: StudyConfig, trials: Sequence[Trial], folder: Path | None = None) -> Pictures:
    """Draw all pictures of a study into `folder`, by default `<home>/studies/<name>`."""
    folder = folder or settings().home / "studies" / name
    folder.mkdir(parents=True, exist_ok=True)
    dimensions = known_space(config.train, config.space).dimensions
    objective = config.objectives[0]
    return Pictures(
        parallel=parallel_coordinates(dimensions, trials, config.objectives, folder / "parallel.png", name),
        importance=importance_bars(dimensions, trials, objective, folder / "importance.png", name),
        curves=curves(trials, objective, folder / "curves.png", name),
    )


def importance(dimensions: Sequence[Dimension], trials: Sequence[Trial], objective: Objective) -> dict[str, float]:
    """Share of the objective's variation that each parameter explains: Optuna's fANOVA (Hutter et al., 2014).

    Over trials that trained to their end, or over all when too few did. Empty with too few trials, with values
    that do not differ, or without Optuna (or scikit-learn, whose trees it uses).
    """
    scored = [trial for trial in trials if trial.value(objective) is not None]
    finished = [trial for trial in scored if trial.status is TrialStatus.DONE]
    used = finished if len(finished) >= max(LEAST_TRIALS, 2 * len(dimensions)) else scored
    always = [each for each in dimensions if all(each.name in trial.params for trial in used)]
    values = {trial.value(objective) for trial in used}
    if len(used) < LEAST_TRIALS or len(values) < 2 or not always:
        return {}
    try:
        import optuna
        from optuna.importance import FanovaImportanceEvaluator

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(direction="maximize" if objective.mode == "max" else "minimize")
        for trial in used:
            study.add_trial(_optuna_trial(optuna, always, trial, objective))
        shares = optuna.importance.get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0))
    except ImportError as error:
        logger.info("no importance without %s", error.name)
        return {}
    return {name: float(share) for name, share in shares.items()}


def _optuna_trial(optuna: Any, dimensions: Sequence[Dimension], trial: Trial, objective: Objective) -> Any:
    distributions, params = {}, {}
    for each in dimensions:
        value = trial.params[each.name]
        if each.values:
            distributions[each.name] = optuna.distributions.CategoricalDistribution([shown(v) for v in each.values])
            params[each.name] = shown(value)
        elif each.kind == "int":
            distributions[each.name] = optuna.distributions.IntDistribution(each.low, each.high, log=each.log)
            params[each.name] = value
        else:
            distributions[each.name] = optuna.distributions.FloatDistribution(each.low, each.high, log=each.log)
            params[each.name] = value
    return optuna.trial.create_trial(params=params, distributions=distributions, value=trial.value(objective))


def importance_bars(
    dimensions: Sequence[Dimension], trials: Sequence[Trial], objective: Objective, path: Path, title: str
) -> Path | None:
    """Draw `importance` as bars. None with too little to say."""
    shares = importance(dimensions, trials, objective)
    if not shares:
        return None
    names = sorted(shares, key=lambda name: shares[name])
    drawing, axes = _figure(8, 1.3 + 0.45 * len(names))
    bars = axes.barh([short(name) for name in names], [shares[name] for name in names], color="tab:blue")
    axes.bar_label(bars, labels=[f"{shares[name]:.0%}" for name in names], padding=4)
    axes.set(
        xlabel=f"share of the variation of {objective.metric}",
        title=f"{title}: what mattered",
        xlim=(0, 1.15 * max(shares.values())),
    )
    axes.spines[["top", "right"]].set_visible(False)
    return _saved(drawing, path)


def curves(trials: Sequence[Trial], objective: Objective, path: Path, title: str) -> Path | None:
    """Draw the objective over steps of every trial: solid when it trained to its end, dotted when it was stopped."""
    measured = [(trial, _series(trial, objective)) for trial in trials]
    measured = [(trial, series) for trial, series in measured if series]
    if not measured:
        return None
    drawing, axes = _figure(8, 4.5)
    chosen = {trial.trial_id for trial in best(trials, [objective])}
    for trial, series in measured:
        is_best = trial.trial_id in chosen
        axes.plot(
            *zip(*series, strict=True),
            _STATUS_STYLE.get(trial.status, ":"),
            marker="o",
            markersize=3,
            color="tab:red" if is_best else "tab:blue",
            linewidth=2.0 if is_best else 0.9,
            alpha=1.0 if is_best else 0.5,
            zorder=3 if is_best else 2,
            label=f"trial {trial.number}, the best" if is_best else None,
        )
    axes.set(xlabel="step", ylabel=objective.metric, title=f"{title}: {_counted(trials)}")
    axes.grid(alpha=0.3)
    if chosen:
        axes.legend()
    return _saved(drawing, path)


def parallel_coordinates(
    dimensions: Sequence[Dimension],
    trials: Sequence[Trial],
    objectives: Sequence[Objective],
    path: Path,
    title: str,
) -> Path | None:
    """Draw one line per trial through its parameters and its objectives; colour is the first objective."""
    shown_trials = [trial for trial in trials if all(trial.value(each) is not None for each in objectives)]
    if not shown_trials:
        return None
    axes_of = [_parameter_axis(each) for each in dimensions] + [
        _objective_axis(each, shown_trials) for each in objectives
    ]
    drawing, axes = _figure(max(8.0, 1.9 * len(axes_of)), 5)
    colour, mappable, extend = _colours(objectives[0], shown_trials)
    for trial in sorted(shown_trials, key=lambda trial: _goodness(trial, objectives[0])):
        heights = [axis.height(trial) for axis in axes_of]
        stopped = trial.status is not TrialStatus.DONE
        axes.plot(
            range(len(axes_of)),
            heights,
            color=colour(trial.value(objectives[0]) or 0.0),
            linewidth=1.0 if stopped else 1.8,
            alpha=0.55 if stopped else 0.95,
            linestyle=":" if stopped else "-",
        )
    for index, axis in enumerate(axes_of):
        axes.axvline(index, color="black", linewidth=0.8, zorder=1)
        for height, label in axis.ticks:
            axes.annotate(
                label,
                (index, height),
                xytext=(-4, 0),
                textcoords="offset points",
                ha="right",
                va="center",
                fontsize=8,
                bbox={"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 0.8},
            )
    axes.set_xticks(range(len(axes_of)), [axis.name for axis in axes_of])
    axes.set(yticks=[], ylim=(-0.06, 1.06), xlim=(-0.5, len(axes_of) - 0.85), title=f"{title}: {_counted(trials)}")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    if any(trial.status is not TrialStatus.DONE for trial in shown_trials):
        axes.set_xlabel("solid: trained to the end; dotted: stopped early")
    if extend is not None:
        drawing.colorbar(mappable, ax=axes, label=objectives[0].metric, pad=0.02, extend=extend)
    return _saved(drawing, path)


@dataclass(frozen=True)
class _Axis:
    name: str
    height: Callable[[Trial], float]
    """Of a trial's value, 0..1; NaN where the trial has none."""
    ticks: list[tuple[float, str]]


def _parameter_axis(dimension: Dimension) -> _Axis:
    if dimension.values:
        names = [shown(value) for value in dimension.values]
        last = max(len(names) - 1, 1)
        heights = {name: index / last for index, name in enumerate(names)}
        few = range(0, len(names), max(1, len(names) // 8))
        return _Axis(
            short(dimension.name),
            lambda trial: heights.get(shown(trial.params.get(dimension.name)), math.nan),
            [(index / last, names[index]) for index in few],
        )
    scale: Callable[[float], float] = math.log10 if dimension.log else float
    low, high = scale(dimension.low), scale(dimension.high)
    inverse: Callable[[float], float] = (lambda x: 10.0**x) if dimension.log else (lambda x: x)

    def height(trial: Trial) -> float:
        value = trial.params.get(dimension.name)
        return math.nan if value is None else (scale(value) - low) / (high - low)

    ticks = [(share, shown(float(f"{inverse(low + share * (high - low)):.3g}"))) for share in (0, 0.25, 0.5, 0.75, 1)]
    return _Axis(short(dimension.name), height, ticks)


def _objective_axis(objective: Objective, trials: Sequence[Trial]) -> _Axis:
    values = [value for trial in trials if (value := trial.value(objective)) is not None]
    low, high = min(values), max(values)
    if low == high:
        return _Axis(objective.metric, lambda _: 0.5, [(0.5, figure(low))])
    return _Axis(
        objective.metric,
        lambda trial: ((trial.value(objective) or 0.0) - low) / (high - low),
        [(share, figure(low + share * (high - low))) for share in (0, 0.25, 0.5, 0.75, 1)],
    )


def _counted(trials: Sequence[Trial]) -> str:
    """`12 trials, 3 stopped early, 1 failed`."""
    counts = {"stopped early": TrialStatus.STOPPED, "failed": TrialStatus.FAILED}
    of = {word: sum(trial.status is status for trial in trials) for word, status in counts.items()}
    words = [f"{len(trials)} trial{'s' * (len(trials) != 1)}", *(f"{n} {word}" for word, n in of.items() if n)]
    return ", ".join(words)


def _goodness(trial: Trial, objective: Objective) -> float:
    value = trial.value(objective) or 0.0
    return value if objective.mode == "max" else -value


def _colours(objective: Objective, trials: Sequence[Trial]) -> tuple[Any, Any, str | None]:
    """Colours over the better three quarters of the values, so that hopeless trials do not take the whole scale.

    The best is the brightest. Also the end of the scale that has values beyond it; None without a scale.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    values = [trial.value(objective) or 0.0 for trial in trials]
    more = objective.mode == "max"
    low, high = (np.percentile(values, 25), max(values)) if more else (min(values), np.percentile(values, 75))
    norm = Normalize(low, high if high > low else low + 1e-9, clip=True)
    mappable = ScalarMappable(norm, colormaps["viridis" if more else "viridis_r"])
    return mappable.to_rgba, mappable, ("min" if more else "max") if high > low else None


def _series(trial: Trial, objective: Objective) -> list[tuple[int, float]]:
    points = [(rung.step, rung.metrics.get(objective.metric, math.nan)) for rung in trial.rungs]
    return [(step, value) for step, value in points if math.isfinite(value)]


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(drawing)
    return drawing, drawing.add_subplot()


def _saved(drawing: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(path, dpi=120)
    return path
