"""Early stopping against full random search: training steps to the same accuracy on handwritten digits.

    python benchmarks/tuning.py [--quick] [--json FILE]

Both studies draw the same random settings of a small network (learning rate, weight decay, width, dropout) for the
UCI digits of scikit-learn and measure accuracy on the validation split. `random` trains every trial to its end;
`asha` stops the weaker ones at rungs and spends some of what it saves on twice as many trials, of which the first are
those of `random`. Trials run one after another, in one process, so the steps are exact and the figures do not depend
on the machine's speed. For each seed, `asha_steps_share` is the share of random search's steps after which ASHA first
has a trial as accurate as the best of random search; a seed in which it never has one counts as 1. `total` is what the
whole ASHA study took. Seeds are averaged.
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
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MAX_STEPS, RUNG, FACTOR = 135, 5, 3
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


def steps_to(trials: list[Any], target: float) -> int | None:
    """Steps of all trials, in the order they ran, until one first measured `target`."""
    spent = 0
    for trial in trials:
        for rung in trial.rungs:
            if rung.metrics["accuracy"] >= target:
                return spent + rung.step
        spent += trial.steps
    return None


def compare(seed: int, trials: int) -> dict[str, float]:
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
    full = list(studies["random"].trials)
    first = studies["asha"].trials[:trials]
    assert [t.params for t in full] == [t.params for t in first], "the studies drew other settings"
    best = {kind: max(r.metrics["accuracy"] for t in study.trials for r in t.rungs) for kind, study in studies.items()}
    reached = steps_to(list(studies["asha"].trials), best["random"])
    return {
        "share": 1.0 if reached is None else reached / spent_steps(full),
        "total": spent_steps(studies["asha"].trials) / spent_steps(full),
        "random_accuracy": best["random"],
        "asha_accuracy": best["asha"],
        "random_s": seconds["random"],
        "asha_s": seconds["asha"],
    }


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
            print(
                f"{seed:>4}  {one['share']:>6.1%}  {one['total']:>6.1%}  {one['random_accuracy']:>7.4f}  "
                f"{one['asha_accuracy']:>7.4f}  {one['random_s']:>8.1f}  {one['asha_s']:>6.1f}",
                flush=True,
            )
    figures = {name: statistics.mean(one[name] for one in results) for name in results[0]}
    print(f"mean  {figures['share']:>6.1%}  {figures['total']:>6.1%}  {figures['random_accuracy']:>7.4f}", end="  ")
    print(f"{figures['asha_accuracy']:>7.4f}")
    if options.json is not None:
        flat = {
            "asha_steps_share": figures["share"],
            "asha_total_share": figures["total"],
            "asha_accuracy": figures["asha_accuracy"],
            "random_accuracy": figures["random_accuracy"],
            "asha_wall_share": figures["asha_s"] / figures["random_s"],
        }
        options.json.write_text(json.dumps(flat, indent=1))


if __name__ == "__main__":
    main()
