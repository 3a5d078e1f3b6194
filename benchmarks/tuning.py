"""Early stopping against full random search: training steps to the same accuracy on handwritten digits.

    python benchmarks/tuning.py [--quick] [--json FILE]

Both studies draw the same random settings of a small network (learning rate, weight decay, width, dropout) for the
UCI digits of scikit-learn and measure accuracy on the validation split. `random` trains every trial to its end;
`asha` stops the weaker ones at rungs and spends some of what it saves on more trials, of which the first are those of
`random`. Trials run one after another, in one process, so the steps are exact and the figures do not depend on the
machine's speed. `share` is the part of random search's steps after which ASHA's best accuracy so far is that of the
whole random search: in the table for each seed (`-`: never), at its end for the mean of the seeds' curves, 1 when
that never is. `total` is what the whole ASHA study took.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modelyard.tuning.study import Trial

ROOT = Path(__file__).resolve().parent.parent
MAX_STEPS, RUNG, FACTOR = 405, 45, 3
MORE = 2
"""Trials of ASHA for each of random search."""
SPACE = {
    "optimizer.learning_rate": {"low": 1e-5, "high": 0.3, "log": True},
    "optimizer.weight_decay": {"low": 1e-4, "high": 0.5, "log": True},
    "task.channels": [[4, 8], [8, 16]],
    "task.hidden": [16, 32, 64],
    "task.dropout": {"low": 0.0, "high": 0.6, "step": 0.1},
}


def study_config(kind: str, seed: int, trials: int) -> dict[str, Any]:
    """A study of one-process trials; both kinds draw the same settings for the same seed."""
    schedulers = {"random": {"kind": "none"}, "asha": {"kind": "asha", "grace_steps": RUNG, "reduction_factor": FACTOR}}
    return {
        "name": f"{kind}-{seed}",
        "train": {
            "name": "digits",
            "dataset": "datasets:/digits",
            "task": {"kind": "image_classification"},
            "workers": 1,
            "training": {
                "max_steps": MAX_STEPS,
                "global_batch_size": 32,
                "micro_batch_size": 32,
                "zero_stage": 0,
                "log_every_steps": RUNG,
                "noise_every_steps": 0,
            },
            "schedule": {"kind": "constant"},
            "validation": {"every_steps": RUNG},
            "checkpoint": {"every_s": None, "keep_best": False},
        },
        "space": SPACE,
        "search": {"kind": "random"},
        "scheduler": schedulers[kind],
        "trials": trials,
        "parallel": 1,
        "seed": seed,
        "register_best": False,
    }


Curve = list[tuple[float, float]]
"""After which share of random search's steps the best accuracy so far is which."""


def curve_of(trials: Sequence[Trial], full_steps: int) -> Curve:
    """The best accuracy so far over all trials' steps, in the order they ran."""
    spent, best, curve = 0, 0.0, []
    for trial in trials:
        for rung in trial.rungs:
            best = max(best, rung.metrics["accuracy"])
            curve.append(((spent + rung.step) / full_steps, best))
        spent += trial.steps
    return curve


def mean_share(curves: Sequence[Curve], target: float) -> float | None:
    """The share at which the mean of the curves first is `target`; None when it never is."""
    for share in sorted({share for curve in curves for share, _ in curve}):
        best = [max((value for at, value in curve if at <= share), default=0.0) for curve in curves]
        if statistics.mean(best) >= target - 1e-12:
            return share
    return None


@dataclass(frozen=True)
class Compared:
    """Both studies of one seed."""

    random_accuracy: float
    asha: Curve
    total: float
    random_s: float
    asha_s: float

    @property
    def share(self) -> float | None:
        """Of random search's steps, until ASHA was as good; None when it never was."""
        return mean_share([self.asha], self.random_accuracy)


def compare(seed: int, trials: int) -> Compared:
    """Run both studies for one seed."""
    from modelyard.config import parse
    from modelyard.tuning import StudyConfig, tune
    from modelyard.tuning.study import spent_steps

    studies, seconds = {}, {}
    for kind in ("random", "asha"):
        began = time.monotonic()
        config = study_config(kind, seed, trials * (MORE if kind == "asha" else 1))
        studies[kind] = tune(parse(StudyConfig, config), progress=False)
        seconds[kind] = time.monotonic() - began
    full, stopped = studies["random"].trials, studies["asha"].trials
    assert [t.params for t in full] == [t.params for t in stopped[:trials]], "the studies drew other settings"
    steps = spent_steps(full)
    return Compared(
        random_accuracy=curve_of(full, steps)[-1][1],
        asha=curve_of(stopped, steps),
        total=spent_steps(stopped) / steps,
        random_s=seconds["random"],
        asha_s=seconds["asha"],
    )


def main() -> None:
    """Compare over seeds and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed instead of five")
    parser.add_argument("--trials", type=int, default=27)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    seeds = range(1) if options.quick else range(5)
    with tempfile.TemporaryDirectory(prefix="modelyard-tuning-") as home:
        os.environ.update({"MODELYARD_HOME": home, "RAY_ADDRESS": "local", "OMP_NUM_THREADS": "1"})
        for name in ("MODELYARD_STORE", "MODELYARD_TRACKING_URI"):
            os.environ.pop(name, None)
        prepare = "from modelyard.cli.main import main; main()"
        config = str(ROOT / "jobs" / "configs" / "digits_data.yaml")
        subprocess.run([sys.executable, "-c", prepare, "data", "prepare", "--config", config], check=True, stdout=2)
        results = []
        print(f"{options.trials} trials of {MAX_STEPS} steps against {MORE} times as many; rungs at {RUNG}, x{FACTOR}")
        print(f"{'seed':>4}  {'share':>6}  {'total':>6}  {'random':>7}  {'asha':>7}  {'random s':>8}  {'asha s':>6}")
        for seed in seeds:
            one = compare(seed, options.trials)
            results.append(one)
            reached = "-" if one.share is None else f"{one.share:.1%}"
            print(
                f"{seed:>4}  {reached:>6}  {one.total:>6.1%}  {one.random_accuracy:>7.4f}  {one.asha[-1][1]:>7.4f}  "
                f"{one.random_s:>8.1f}  {one.asha_s:>6.1f}",
                flush=True,
            )
    target = statistics.mean(one.random_accuracy for one in results)
    share = mean_share([one.asha for one in results], target)
    figures = {
        "asha_steps_share": 1.0 if share is None else share,
        "asha_total_share": statistics.mean(one.total for one in results),
        "asha_accuracy": statistics.mean(one.asha[-1][1] for one in results),
        "random_accuracy": target,
        "asha_wall_share": sum(one.asha_s for one in results) / sum(one.random_s for one in results),
    }
    print(
        f"mean  {figures['asha_steps_share']:>6.1%}  {figures['asha_total_share']:>6.1%}  {target:>7.4f}  "
        f"{figures['asha_accuracy']:>7.4f}"
    )
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
