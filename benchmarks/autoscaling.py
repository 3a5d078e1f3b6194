"""Our autoscaling policy beside Ray Serve's default, a queue scaler, a fixed fleet and a clairvoyant lower bound.

    python benchmarks/autoscaling.py --trace DIR [--quick] [--no-live] [--json FILE] [--png FILE]

DIR holds AzureLLMInferenceTrace_code.csv and AzureLLMInferenceTrace_conv.csv (github.com/Azure/AzurePublicDataset);
without it generated traces take their place. The fleets are simulated (modelyard.serving.autoscaling.replay), a replica
being SmolLM2-135M on one CPU thread as measured: OpenVINO Q8_0, 48 tokens/s alone, 258 in a batch of 16, 115 prompt
tokens in 0.209 s; prompts are read in chunks of 64 tokens, so that a full batch keeps the objective for tokens; 13 s
from the decision to the first answer. All policies start with the same fleet and keep one replica at least. Each is
run over its own dial: the percentile promised (ours), target_ongoing_requests (Serve), requests for a replica (queue),
replicas (fixed).

The constants of our policy were chosen on the code trace and on generated ones; conv is held out. An hour holds no
daily season, so the seasonal part of the forecast is idle here.

The live part (left out by --quick) sends a burst to a real Serve deployment whose replicas sleep. That is honest for
one thing only: how long the control loop takes from the burst to the decision and to the first new replica.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import ray
from ray import serve

from modelyard.errors import WaitTimeoutError
from modelyard.serving.autoscaling.baselines import Fixed, Ours, Planned, QueueScaler, ServeDefault
from modelyard.serving.autoscaling.capacity import request_work_s
from modelyard.serving.autoscaling.clairvoyant import lower_bound
from modelyard.serving.autoscaling.demand import BIN_S, Forecast
from modelyard.serving.autoscaling.model import Capacity, Objective, PoolConfig, ScalingConfig
from modelyard.serving.autoscaling.replay import Controller, Replay, ReplicaModel
from modelyard.serving.autoscaling.serve import ReplicaStats, autoscaling_config
from modelyard.serving.autoscaling.traces import Burst, Generator, Trace, read_azure
from modelyard.serving.protocol import EngineStats

CAPACITY = Capacity(prompt_token_s=0.209 / 115, step_s=0.0181, sequence_s=0.00275)
REPLICA = ReplicaModel(capacity=CAPACITY, slots=16, chunk_tokens=64, cold_start_s=13.0)
OBJECTIVE = Objective(ttft_s=5.0, ttft_per_1k_tokens_s=3.6, token_s=0.2, percentile=0.99)
"""An idle replica reads 1,000 tokens in 1.8 s: five seconds on top of twice that."""
MAX_REPLICAS = 200
MAY_MISS = 0.01
POOL = "model"


class Point(NamedTuple):
    """One replay: the dial, and what came of it."""

    dial: float
    hours: float
    missed: float
    wait_s: float
    ttft_s: float
    changes: int


def replay(trace: Trace, controller: Controller, initial: int, model: ReplicaModel, dial: float) -> Point:
    promised = controller.policy.config.objective if isinstance(controller, Ours) else OBJECTIVE
    outcome = Replay(trace, controller, {POOL: model}, {POOL: initial}, promised).run()
    missed = outcome.missed_share(OBJECTIVE)
    return Point(dial, outcome.replica_hours, missed, outcome.wait_s(0.99), outcome.ttft_s(0.99), outcome.changes)


def work_s(trace: Trace, model: ReplicaModel, until_s: float) -> float:
    """Replica-seconds of work that arrive until then."""
    come = (one for one in trace.requests if one.arrival_s < until_s)
    return sum(request_work_s(model.capacity, model.slots, one.prompt_tokens, one.output_tokens) for one in come)


def ours(percentile: float, model: ReplicaModel) -> Ours:
    pool = PoolConfig(
        name=POOL,
        max_replicas=MAX_REPLICAS,
        slots=model.slots,
        cold_start_s=model.cold_start_s,
        capacity=model.capacity,
    )
    return Ours(ScalingConfig(pools=(pool,), objective=OBJECTIVE.with_changes(percentile=percentile)))


def curves(trace: Trace, model: ReplicaModel, initial: int, quick: bool) -> dict[str, list[Point]]:
    """Each policy over its dial."""
    mean = work_s(trace, model, trace.duration_s) / trace.duration_s
    families: dict[str, tuple[Sequence[float], Callable[[float], Controller]]] = {
        "ours": ((0.02, 0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999), lambda dial: ours(dial, model)),
        "Serve's default": (
            (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12),
            lambda dial: ServeDefault(1, MAX_REPLICAS, target_ongoing_requests=dial),
        ),
        "queue scaler": ((1, 2, 3, 4, 6, 8, 10), lambda dial: QueueScaler(1, MAX_REPLICAS, dial)),
        "fixed": (
            [round(mean * factor) for factor in (1.0, 1.1, 1.25, 1.5, 2, 3, 4, 6, 8, 10)],
            lambda dial: Fixed(int(dial)),
        ),
    }
    found: dict[str, list[Point]] = {}
    for name, (dials, make) in families.items():
        chosen = dials[::2] if quick else dials
        found[name] = [
            replay(trace, make(dial), int(dial) if name == "fixed" else initial, model, dial) for dial in chosen
        ]
    return found


def frontier(points: Sequence[Point]) -> tuple[np.ndarray, np.ndarray]:
    """Hours and missed shares of a policy's best points: none has fewer hours and fewer misses."""
    best: list[Point] = []
    for point in sorted(points, key=lambda one: (one.hours, one.missed)):
        if not best or point.missed < best[-1].missed:
            best.append(point)
    return np.array([one.hours for one in best]), np.array([one.missed for one in best])


def missed_at(points: Sequence[Point], hours: np.ndarray) -> np.ndarray:
    """Missed share at these replica-hours, between a policy's best points."""
    return np.interp(hours, *frontier(points))


def over(one: Sequence[Point], other: Sequence[Point]) -> tuple[float, float, tuple[float, float]]:
    """Misses of one policy over the other's at equal replica-hours: mean and worst over the range in which both ran.

    Where a policy gets no better by more replica-hours, its best cheaper point counts.
    """
    low = max(min(point.hours for point in points) for points in (one, other))
    high = min(max(point.hours for point in points) for points in (one, other))
    if high <= low:
        return float("nan"), float("nan"), (low, high)
    hours = np.linspace(low, high, 200)
    mine, theirs = missed_at(one, hours), missed_at(other, hours)
    return float(mine.mean() / theirs.mean()), float((mine / np.maximum(theirs, 1e-9)).max()), (low, high)


def clairvoyant_plan(trace: Trace, model: ReplicaModel, initial: int) -> Point | None:
    """A fleet that knows the future and exists: the work of each second, averaged over a window around it, times the
    least factor whose replay misses few enough; the window with the fewest replica-hours.
    """
    work = np.zeros(int(trace.duration_s) + 1)
    for one in trace.requests:
        seconds = request_work_s(model.capacity, model.slots, one.prompt_tokens, one.output_tokens)
        work[int(one.arrival_s)] += seconds
    plans: list[Point] = []
    for window_s in (15, 30, 60, 120, 300):
        mean = np.convolve(work, np.ones(window_s) / window_s, "same")
        for factor in np.arange(1.0, 3.0, 0.05):
            replicas = np.maximum(1, np.ceil(mean * factor)).astype(int).tolist()
            point = replay(trace, Planned(replicas, POOL, model.cold_start_s), initial, model, factor)
            if point.missed <= MAY_MISS:
                plans.append(point)
                break
    return min(plans, key=lambda one: one.hours, default=None)


def report(trace: Trace, model: ReplicaModel, quick: bool, figures: dict[str, float], prefix: str) -> Any:
    """Everything about one trace, printed; figures go in under the prefix."""
    initial = max(1, round(1.2 * work_s(trace, model, 300.0) / 300))
    bound = lower_bound(trace, model, OBJECTIVE, initial=initial, min_replicas=1, missed_share=MAY_MISS)
    plan = None if quick else clairvoyant_plan(trace, model, initial)
    print(f"\n{trace.name}: {len(trace.requests):,} requests in {trace.duration_s / 60:.0f} min, cold start", end=" ")
    print(f"{model.cold_start_s:g} s, {initial} replicas to begin with")
    found = curves(trace, model, initial, quick)
    print(f"  {'':<18}{'dial':>8}{'replica-h':>11}{'missed':>9}{'p99 wait s':>12}{'p99 TTFT s':>12}{'changes':>9}")
    for name, points in found.items():
        for one in points:
            print(
                f"  {name:<18}{one.dial:>8g}{one.hours:>11.2f}{one.missed:>9.2%}{one.wait_s:>12.1f}{one.ttft_s:>12.1f}"
                f"{one.changes:>9}"
            )
    print(
        f"  clairvoyant bound, {MAY_MISS:.0%} missed: {bound.replica_hours:.2f} replica-h; work {bound.work_hours:.2f}"
    )
    if plan:
        print(f"  a plan that knows the future, replayed: {plan.hours:.2f} replica-h, {plan.missed:.2%} missed")
    for name in ("Serve's default", "queue scaler", "fixed"):
        mean, worst, (low, high) = over(found["ours"], found[name])
        print(
            f"  missed, ours over {name} at equal replica-h ({low:.1f} to {high:.1f}): {mean:.2f}, at worst {worst:.2f}"
        )
        figures[f"{prefix}missed_over_{name.replace(chr(39), '').replace(' ', '_').lower()}"] = mean
    good = [one for one in found["ours"] if one.missed <= MAY_MISS]
    least = min(good, key=lambda one: one.hours) if good else min(found["ours"], key=lambda one: one.missed)
    print(f"  ours, cheapest with at most {MAY_MISS:.0%} missed: {least}" if good else f"  ours at best: {least}")
    figures[f"{prefix}missed_share"] = least.missed
    figures[f"{prefix}replica_hours_over_clairvoyant"] = least.hours / bound.replica_hours
    if plan:
        figures[f"{prefix}replica_hours_over_clairvoyant_plan"] = least.hours / plan.hours
    promised = next((one for one in found["ours"] if one.dial == OBJECTIVE.percentile), None)
    if promised:
        figures[f"{prefix}missed_share_at_default"] = promised.missed
        figures[f"{prefix}replica_hours_at_default"] = promised.hours
    return found, bound


def draw(results: dict[str, Any], path: Path) -> None:
    figure, axes = plt.subplots(1, len(results), figsize=(6 * len(results), 4.5), squeeze=False)
    for axis, (name, (found, bound)) in zip(axes[0], results.items(), strict=True):
        for policy, points in found.items():
            hours, missed = frontier(points)
            axis.plot(hours, 100 * np.maximum(missed, 1e-5), marker="o", label=policy)
        axis.axvline(bound.replica_hours, color="black", linestyle=":", label="clairvoyant bound, 1 % missed")
        axis.set(title=name, xlabel="replica-hours", ylabel="missed objectives, %", yscale="log", xlim=(0, None))
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    print(f"\ncurves drawn in {path}")


# --- forecasts ------------------------------------------------------------------------------------------------------


def compare_forecasts(traces: Sequence[Trace], horizon_s: float = 20.0) -> None:
    """Our bank of smoothers beside statsmodels' exponential smoothing (damped trend, refitted every minute)."""
    try:
        from statsmodels.tsa.holtwinters import ExponentialSmoothing
    except ImportError:
        print("\nforecasts: statsmodels is not installed, so ours is not compared with it")
        return
    ahead = round(horizon_s / BIN_S)
    print(f"\nForecast {horizon_s:g} s ahead of the work in {BIN_S:g} s: root mean square error, replicas of work")
    for trace in traces:
        bins = np.zeros(int(trace.duration_s / BIN_S))
        for one in trace.requests:
            index = int(one.arrival_s / BIN_S)
            if index < len(bins):
                bins[index] += one.prompt_tokens * CAPACITY.prompt_token_s + one.output_tokens * 0.00388
        bins /= BIN_S
        forecast, mine, theirs, last, truth = Forecast(horizon_s, None), [], [], [], []
        alpha = None
        for index, value in enumerate(bins[:-ahead]):
            forecast.add(index * BIN_S, value)
            if index < 30:
                continue
            refit = alpha is None or index % 6 == 0
            model = ExponentialSmoothing(
                bins[: index + 1], trend="add", damped_trend=True, initialization_method="estimated"
            )
            fitted = model.fit() if refit else model.fit(**alpha, optimized=False)
            if refit:
                names = ("smoothing_level", "smoothing_trend", "damping_trend")
                alpha = {name: fitted.params[name] for name in names}
                alpha["initial_level"] = None
                alpha = {name: value for name, value in alpha.items() if value is not None}
            mine.append(forecast.at(index * BIN_S, horizon_s))
            theirs.append(max(0.0, float(fitted.forecast(ahead)[-1])))
            last.append(value)
            truth.append(bins[index + ahead])

        def error(guess: Sequence[float], truth: Sequence[float] = truth) -> float:
            return float(np.sqrt(np.mean((np.array(guess) - np.array(truth)) ** 2)))

        print(
            f"  {trace.name:<32} ours {error(mine):.3f}, statsmodels {error(theirs):.3f}, last value {error(last):.3f}"
        )


# --- live -----------------------------------------------------------------------------------------------------------


class Sleeper:
    """A replica with a few slots, each held for a real time; counts like a model server."""

    def __init__(self, slots: int, hold_s: float) -> None:
        self.slots, self.hold_s = asyncio.Semaphore(slots), hold_s
        self.stats = ReplicaStats(Objective())
        self.running = self.waiting = self.tokens = 0

    async def __call__(self) -> None:
        began = time.monotonic()
        self.stats.accepted(1)
        self.waiting += 1
        async with self.slots:
            self.waiting -= 1
            self.running += 1
            self.stats.first_token(time.monotonic(), time.monotonic() - began, 1)
            await asyncio.sleep(self.hold_s)
            self.running -= 1
        self.tokens += 1
        self.stats.finished(time.monotonic(), 0.0)

    def record_autoscaling_stats(self) -> dict[str, float]:
        engine = EngineStats(self.running, self.waiting, 0.0, self.stats.accepted_requests, self.tokens)
        return self.stats.metrics(engine, time.monotonic())


def burst_lag(
    options: dict[str, Any], slots: int = 4, hold_s: float = 2.0, timeout_s: float = 150.0
) -> tuple[float, float]:
    """Seconds from a burst of 40 calls that does not ebb away to the decision and to the second running replica."""
    deployment = serve.deployment(Sleeper).options(
        name=POOL, ray_actor_options={"num_cpus": 0.1}, max_ongoing_requests=slots, autoscaling_config=options
    )
    handle = serve.run(deployment.bind(slots, hold_s), name="burst", route_prefix=None)
    handle.remote().result(timeout_s=30)

    def replicas() -> dict[str, int]:
        states = serve.status().applications["burst"].deployments[POOL].replica_states
        return {str(getattr(name, "value", name)): count for name, count in states.items()}

    until = time.monotonic() + timeout_s
    while (before := replicas()) != {"RUNNING": 1}:
        if time.monotonic() > until:
            raise WaitTimeoutError(f"one quiet replica (there are {before})", timeout_s, "timeout_s of burst_lag")
        time.sleep(0.1)
    began = time.monotonic()
    calls = [handle.remote() for _ in range(40)]
    decided = running = float("nan")
    more_s = 1.0
    while time.monotonic() - began < timeout_s and running != running:
        states = replicas()
        if decided != decided and sum(states.values()) > 1:
            decided = time.monotonic() - began
        if states.get("RUNNING", 0) > 1:
            running = time.monotonic() - began
        if time.monotonic() - began > more_s:
            calls += [handle.remote() for _ in range(2)]  # as many as one replica answers: the burst does not ebb away
            more_s += 1.0
        time.sleep(0.1)
    serve.delete("burst")
    return decided, running


def run_live(figures: dict[str, float], repeats: int = 3) -> None:
    folder = tempfile.mkdtemp(prefix="my-as-")
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, _temp_dir=folder)
    try:
        serve.start(proxy_location="Disabled")
        pool = PoolConfig(
            name=POOL, max_replicas=6, slots=4, cold_start_s=5.0, capacity=Capacity(step_s=2.0, sequence_s=0.0)
        )
        options = autoscaling_config(ScalingConfig(pools=(pool,)), pool)
        print(
            "\nLive: seconds from a burst of 40 calls (4 slots a replica, 2 s a call) to decision / first new replica"
        )
        lags = [burst_lag(options) for _ in range(repeats)]
        print("  ours            ", ", ".join(f"{decided:.1f} / {running:.1f}" for decided, running in lags))
        decided, running = burst_lag({"min_replicas": 1, "max_replicas": 6})
        print(f"  Serve's defaults {decided:.1f} / {running:.1f}")
        figures["burst_decision_s"] = statistics.median(lag[0] for lag in lags)
        figures["burst_running_s"] = statistics.median(lag[1] for lag in lags)
        figures["burst_decision_serve_s"], figures["burst_running_serve_s"] = decided, running
    finally:
        serve.shutdown()
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, help="folder of the Azure LLM inference traces of 2023")
    parser.add_argument(
        "--quick", action="store_true", help="half of the points, one cold start, no plan, no live part"
    )
    parser.add_argument("--live", action=argparse.BooleanOptionalAction, help="on unless --quick")
    parser.add_argument("--json", type=Path, help="write the figures as one flat object")
    parser.add_argument("--png", type=Path, default=Path("autoscaling.png"), help="where the curves are drawn")
    arguments = parser.parse_args()
    print("python", *sys.argv)
    print(f"python {platform.python_version()}, ray {ray.__version__}; {os.cpu_count()} CPUs")
    figures: dict[str, float] = {}
    began = time.monotonic()
    if arguments.trace:
        code = read_azure(arguments.trace / "AzureLLMInferenceTrace_code.csv")
        conv = read_azure(arguments.trace / "AzureLLMInferenceTrace_conv.csv")
    else:
        bursts = tuple(Burst(at_s=300.0 + 400 * index, requests=150, over_s=10.0) for index in range(8))
        code = Generator(requests_per_s=1.0, bursts=bursts, seed=1).trace()
        conv = Generator(requests_per_s=4.0, swing=0.5, seed=2).trace()
    results: dict[str, Any] = {}
    results["conv (held out)"] = report(conv, REPLICA, arguments.quick, figures, "")
    results["code (tuned on)"] = report(code, REPLICA, arguments.quick, figures, "code_")
    figures["missed_over_serve_default"] = figures.pop("missed_over_serves_default")
    figures["code_missed_over_serve_default"] = figures.pop("code_missed_over_serves_default")
    if not arguments.quick:
        slow = ReplicaModel(capacity=CAPACITY, slots=16, chunk_tokens=64, cold_start_s=60.0)
        results["conv, cold start 60 s"] = report(conv, slow, False, figures, "slow_")
        figures["slow_missed_over_serve_default"] = figures.pop("slow_missed_over_serves_default")
    compare_forecasts([conv, code])
    draw(results, arguments.png)
    print(f"replayed in {time.monotonic() - began:.0f} s")
    if arguments.live if arguments.live is not None else not arguments.quick:
        run_live(figures)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
