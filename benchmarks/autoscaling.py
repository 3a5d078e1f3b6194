"""Our autoscaling policy beside Ray Serve's default, a queue scaler, a fixed fleet and a clairvoyant lower bound.

    python benchmarks/autoscaling.py [--trace DIR] [--quick] [--live | --no-live] [--json FILE] [--png FILE]

DIR holds AzureLLMInferenceTrace_code.csv and AzureLLMInferenceTrace_conv.csv (github.com/Azure/AzurePublicDataset);
without it generated traces take their place. The fleets are simulated (modelyard.serving.autoscaling.replay), a replica
being SmolLM2-135M on one CPU thread as measured: OpenVINO Q8_0, 48 tokens/s alone, 258 in a batch of 16, 115 prompt
tokens in 0.209 s; prompts are read in chunks of 64 tokens, so that a full batch keeps the objective for tokens; 13 s
from the decision to the first answer. All policies start with the same fleet and keep one replica at least.

Tuned on: the first half hour of conv, and code. Measured on: the rest of conv. Our dial, the percentile promised, is
the cheapest that misses at most half of what it may on the first half hour. The dials of the others (Serve:
target_ongoing_requests; queue scaler: requests for a replica; fixed: replicas) are tuned on the measured part itself,
to our replica-hours: between two settings the line through the best ones counts, and where a policy cannot do with so
few, its cheapest setting, both in its favour. code is reported at a percentile of 99. An hour holds no daily season, so
the seasonal part of the forecast is idle in the replay; its error is measured on generated days.

The clairvoyant bound is a linear program that no controller can beat (modelyard.serving.autoscaling.clairvoyant); the
plan beside it is one that knows the future and was replayed, so the least possible lies between the two.

The live part (left out by --quick) sends a burst to a real Serve deployment whose replicas sleep. That is honest for
one thing only: how long the control loop takes from the burst to the decision and to the first new replica.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import platform
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
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
from modelyard.serving.autoscaling.clairvoyant import Bound, lower_bound
from modelyard.serving.autoscaling.demand import BIN_S, Forecast
from modelyard.serving.autoscaling.model import Capacity, Objective, PoolConfig, ScalingConfig
from modelyard.serving.autoscaling.replay import Controller, Outcome, Replay, ReplicaModel
from modelyard.serving.autoscaling.serve import ReplicaStats, autoscaling_config
from modelyard.serving.autoscaling.traces import Burst, Generator, Trace, read_azure
from modelyard.serving.protocol import EngineStats

CAPACITY = Capacity(prompt_token_s=0.209 / 115, step_s=0.0181, sequence_s=0.00275)
OBJECTIVE = Objective(ttft_s=5.0, ttft_per_1k_tokens_s=3.6, token_s=0.2, percentile=0.99)
"""An idle replica reads 1,000 tokens in 1.8 s: five seconds on top of twice that."""
MAX_REPLICAS = 200
MAY_MISS = 0.01
TUNED_S = 1800.0
"""The part of conv on which the policy was tuned."""
POOL = "model"
OURS, SERVE, QUEUE, FIXED, PLAN = "ours", "Serve's default", "queue scaler", "fixed", "clairvoyant plan"
DIALS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)


class Run(NamedTuple):
    """One replay."""

    dial: float
    hours: float
    missed: float
    outcome: Outcome


@dataclass(frozen=True)
class World:
    """A trace, the replicas that serve it, and the second from which on it counts."""

    trace: Trace
    model: ReplicaModel
    from_s: float = 0.0

    @property
    def work(self) -> np.ndarray:
        """Replica-seconds of work that arrive in each second."""
        work = np.zeros(int(self.trace.duration_s) + 1)
        for one in self.trace.requests:
            seconds = request_work_s(self.model.capacity, self.model.slots, one.prompt_tokens, one.output_tokens)
            work[int(one.arrival_s)] += seconds
        return work

    @property
    def initial(self) -> int:
        """Replicas to begin with: what the first five minutes need."""
        return max(1, round(1.2 * float(self.work[:300].mean())))

    def run(self, controller: Controller, dial: float, initial: int | None = None) -> Run:
        """Replay it."""
        promised = controller.policy.config.objective if isinstance(controller, Ours) else OBJECTIVE
        models, first = {POOL: self.model}, {POOL: self.initial if initial is None else initial}
        outcome = Replay(self.trace, controller, models, first, promised, self.from_s).run()
        return Run(dial, outcome.replica_hours, outcome.missed_share(OBJECTIVE), outcome)

    def ours(self, percentile: float) -> Run:
        """Our policy."""
        model = self.model
        pool = PoolConfig(
            name=POOL,
            max_replicas=MAX_REPLICAS,
            slots=model.slots,
            cold_start_s=model.cold_start_s,
            capacity=model.capacity,
        )
        objective = OBJECTIVE.with_changes(percentile=percentile)
        return self.run(Ours(ScalingConfig(pools=(pool,), objective=objective)), percentile)

    def serve_default(self, target: float) -> Run:
        """Serve's default policy."""
        return self.run(ServeDefault(1, MAX_REPLICAS, target_ongoing_requests=target), target)

    def queue_scaler(self, target: float) -> Run:
        """KEDA's way."""
        return self.run(QueueScaler(1, MAX_REPLICAS, target), target)

    def fixed(self, replicas: float) -> Run:
        """A fixed fleet, there from the start."""
        return self.run(Fixed(int(replicas)), replicas, int(replicas))

    def bound(self) -> Bound:
        """On what counts, with a fleet to begin with as the controller likes."""
        counts = self.trace.part(self.from_s, math.inf, self.trace.name)
        return lower_bound(counts, self.model, OBJECTIVE, initial=None, min_replicas=1, missed_share=MAY_MISS)

    def plan(self, windows_s: Sequence[int], rounds: int = 6) -> Run | None:
        """A fleet that knows the future and exists: the work of each second, averaged over a window around it, times
        the least factor whose replay misses few enough; the window with the fewest replica-hours.
        """
        best: Run | None = None
        for window_s in windows_s:
            mean = np.convolve(self.work, np.ones(window_s) / window_s, "same")
            low, high = 0.9, 1.6
            for _ in range(rounds):
                factor = (low + high) / 2
                replicas = np.maximum(1, np.ceil(mean * factor)).astype(int).tolist()
                found = self.run(Planned(replicas, POOL, self.model.cold_start_s), factor)
                if found.missed > MAY_MISS:
                    low = factor
                    continue
                high = factor
                if best is None or found.hours < best.hours:
                    best = found
        return best


def near(runs: Sequence[Run], hours: float) -> tuple[float, Run]:
    """Missed share at these replica-hours, on the line through the best runs; and the run that is nearest to them."""
    best: list[Run] = []
    for one in sorted(runs, key=lambda one: (one.hours, one.missed)):
        if not best or one.missed < best[-1].missed:
            best.append(one)
    missed = float(np.interp(hours, [one.hours for one in best], [one.missed for one in best]))
    return missed, min(runs, key=lambda one: (abs(one.hours - hours), one.missed))


def at_hours(run: Any, low: float, high: float, hours: float, count: int) -> list[Run]:
    """Runs of a policy over its dial, first spread out and then closing in on these replica-hours."""
    runs = [run(dial) for dial in np.linspace(low, high, count).round(1).tolist()]
    for _ in range(count):
        under = [one.dial for one in runs if one.hours <= hours]
        over = [one.dial for one in runs if one.hours > hours]
        if not under or not over:
            break
        pairs = [(abs(a - b), (a + b) / 2) for a in under for b in over]
        middle = round(min(pairs)[1], 2)
        if any(abs(one.dial - middle) < 0.02 for one in runs):
            break
        runs.append(run(middle))
    return runs


def show(name: str, one: Run) -> None:
    outcome = one.outcome
    print(
        f"  {name:<18}{one.dial:>8.3g}{one.hours:>11.2f}{one.missed:>9.2%}{outcome.wait_s(0.99):>12.1f}"
        f"{outcome.ttft_s(0.99):>12.1f}{outcome.changes:>9}",
        flush=True,
    )


def head(world: World) -> None:
    trace, model = world.trace, world.model
    print(f"\n{trace.name}, second {world.from_s:g} to {trace.duration_s:.0f}: cold start {model.cold_start_s:g} s")
    print(f"  {'':<18}{'dial':>8}{'replica-h':>11}{'missed':>9}{'p99 wait s':>12}{'p99 TTFT s':>12}{'changes':>9}")


def tuned_dial(world: World) -> float:
    """Our cheapest dial that misses at most half of what it may, or the largest."""
    head(world)
    for dial in DIALS:
        found = world.ours(dial)
        show(OURS, found)
        if found.missed <= MAY_MISS / 2:
            return dial
    return DIALS[-1]


def measure(world: World, dial: float, quick: bool, figures: dict[str, float], prefix: str) -> dict[str, Run]:
    """Every policy at our replica-hours, printed; figures go in under the prefix."""
    head(world)
    mine, bound = world.ours(dial), world.bound()
    show(OURS, mine)
    chosen, count = {OURS: mine}, 3 if quick else 6
    fleet = mine.hours * 3600 / (world.trace.duration_s - world.from_s)
    others = {
        SERVE: at_hours(world.serve_default, 2, 16, mine.hours, count),
        QUEUE: at_hours(world.queue_scaler, 2, 16, mine.hours, count),
        FIXED: [world.fixed(replicas) for replicas in (math.floor(fleet), math.ceil(fleet))],
    }
    for name, runs in others.items():
        missed, chosen[name] = near(runs, mine.hours)
        show(name, chosen[name])
        key = name.replace("'", "").replace(" ", "_").lower().replace("serves", "serve")
        figures[f"{prefix}missed_over_{key}"] = mine.missed / max(missed, 1e-9)
        print(f"    at {mine.hours:.2f} replica-h: {missed:.2%} missed; ours over that: {mine.missed / missed:.2f}")
    print(f"  clairvoyant bound  {bound.replica_hours:>18.2f}    1.00%   (the work alone {bound.work_hours:.2f})")
    figures[f"{prefix}missed_share"] = mine.missed
    figures[f"{prefix}replica_hours_over_clairvoyant"] = mine.hours / bound.replica_hours
    plan = world.plan((40,) if quick else (20, 40, 80), 3 if quick else 6)
    if plan is not None:
        chosen[PLAN] = plan
        show(PLAN, plan)
        figures[f"{prefix}replica_hours_over_clairvoyant_plan"] = mine.hours / plan.hours
        figures[f"{prefix}clairvoyant_plan_over_bound"] = plan.hours / bound.replica_hours
    return chosen


def draw(world: World, chosen: dict[str, Run], path: Path) -> None:
    """Demand, replicas and misses over time."""
    figure, (above, middle, below) = plt.subplots(3, 1, figsize=(11, 9), sharex=True)
    work = world.work
    minutes = np.arange(len(work)) / 60
    above.plot(minutes, np.convolve(work, np.ones(10) / 10, "same"), color="black", linewidth=0.8)
    above.set(ylabel="demand, replicas of work\n(mean of 10 s)", title=world.trace.name)
    for name, one in chosen.items():
        label = f"{name}: {one.hours:.1f} replica-h, {one.missed:.2%} missed"
        times, targets = zip(*one.outcome.targets, strict=True)
        ends = [*times, world.trace.duration_s]
        line = middle.step([at_s / 60 for at_s in ends], [*targets, targets[-1]], where="post", label=label)[0]
        late = [served.request.arrival_s / 60 for served in one.outcome.served if served.misses(OBJECTIVE)]
        edges = [world.from_s / 60, *late, world.trace.duration_s / 60]
        share = 100 * np.array([*range(len(late) + 1), len(late)]) / len(one.outcome.served)
        below.step(edges, share, where="post", color=line.get_color())
    for axis in (above, middle, below):
        axis.axvspan(world.from_s / 60, world.trace.duration_s / 60, color="0.95", zorder=0)
    middle.set(ylabel="replicas asked for", ylim=(0, None))
    middle.legend(loc="lower left", fontsize=8)
    below.set_yscale("symlog", linthresh=1)
    below.set(
        ylabel="missed so far, % of all", ylim=(0, 100), xlabel="minutes; what counts is shaded", xlim=(0, minutes[-1])
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    print(f"\ndrawn in {path}")


# --- forecasts ------------------------------------------------------------------------------------------------------


def forecast_errors(
    values: Sequence[float], horizon_s: float, season_s: float | None, skip: int
) -> tuple[float, float]:
    """Root mean square errors of the forecast of a bin's level, and of the last bin taken for it."""
    ahead = round(horizon_s / BIN_S)
    forecast = Forecast(horizon_s, season_s)
    mine: list[float] = []
    last: list[float] = []
    for index, value in enumerate(values[:-ahead]):
        forecast.add((index + 1) * BIN_S, value)
        if index >= skip:
            truth = values[index + ahead]
            mine.append(forecast.at((index + 1) * BIN_S, horizon_s) - truth)
            last.append(value - truth)
    return float(np.sqrt(np.mean(np.square(mine)))), float(np.sqrt(np.mean(np.square(last))))


def compare_forecasts(worlds: Sequence[World], figures: dict[str, float]) -> None:
    """Our forecast beside none (the last ten seconds go on)."""
    print(f"\nForecast of the work in {BIN_S:g} s: root mean square error in replicas of work, ours / the last value's")
    for world, key in zip(worlds, ("conv", "code"), strict=True):
        whole = len(world.work) // int(BIN_S) * int(BIN_S)
        bins = world.work[:whole].reshape(-1, int(BIN_S)).mean(axis=1).tolist()
        mine, last = forecast_errors(bins, 20.0, None, round(world.from_s / BIN_S) or 30)
        figures[f"forecast_error_over_none_{key}"] = mine / last
        print(f"  {world.trace.name}, 20 s ahead: {mine:.2f} / {last:.2f}")
    chance, day = random.Random(4), 86400.0
    steps = range(round(4 * day / BIN_S))
    bins = [max(0.0, 10 - 8 * math.cos(2 * math.pi * step * BIN_S / day) + chance.gauss(0, 1)) for step in steps]
    skip = round(3 * day / BIN_S)
    mine, last = forecast_errors(bins, 1800.0, day, skip)
    plain, _ = forecast_errors(bins, 1800.0, None, skip)
    print(f"  the fourth of generated days, 30 min ahead: {mine:.2f}, without the season {plain:.2f} / {last:.2f}")
    figures["forecast_error_over_none_daily"] = mine / last


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
    application: str, options: dict[str, Any], slots: int = 4, hold_s: float = 2.0, timeout_s: float = 150.0
) -> tuple[float, float]:
    """Seconds from a burst of 40 calls that does not ebb away to the decision and to the second running replica.

    Each application needs a name of its own: an old handle goes on reporting what waits in it under the old name.
    """
    deployment = serve.deployment(Sleeper).options(
        name=POOL, ray_actor_options={"num_cpus": 0.1}, max_ongoing_requests=slots, autoscaling_config=options
    )
    handle = serve.run(deployment.bind(slots, hold_s), name=application, route_prefix=None)
    handle.remote().result(timeout_s=30)

    def replicas() -> dict[str, int]:
        states = serve.status().applications[application].deployments[POOL].replica_states
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
    for call in calls:
        call.cancel()
    serve.delete(application)
    return decided, running


def run_live(figures: dict[str, float], repeats: int = 3) -> None:
    folder = tempfile.mkdtemp(prefix="my-as-")
    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False, _temp_dir=folder)
    try:
        serve.start(proxy_location="Disabled")
        pool = PoolConfig(
            name=POOL, max_replicas=6, slots=4, cold_start_s=5.0, capacity=Capacity(step_s=2.0, sequence_s=0.0)
        )
        patient = Objective(
            ttft_s=10.0
        )  # five calls long, so that the one call to begin with asks for no second replica
        options = autoscaling_config(ScalingConfig(pools=(pool,), objective=patient), pool)
        print(
            "\nLive: seconds from a burst of 40 calls (4 slots a replica, 2 s a call) to decision / first new replica"
        )
        lags = [burst_lag(f"ours-{index}", options) for index in range(repeats)]
        print("  ours            ", ", ".join(f"{decided:.1f} / {running:.1f}" for decided, running in lags))
        decided, running = burst_lag("default", {"min_replicas": 1, "max_replicas": 6})
        print(f"  Serve's defaults {decided:.1f} / {running:.1f}")
        figures["burst_decision_s"] = statistics.median(lag[0] for lag in lags)
        figures["burst_running_s"] = statistics.median(lag[1] for lag in lags)
        figures["burst_default_decision_s"], figures["burst_default_running_s"] = decided, running
    finally:
        serve.shutdown()
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def read_traces(folder: Path | None) -> tuple[Trace, Trace]:
    """conv and code, or generated ones in their place."""
    if folder is not None:
        return tuple(read_azure(folder / f"AzureLLMInferenceTrace_{name}.csv") for name in ("conv", "code"))  # type: ignore[return-value]
    bursts = tuple(Burst(at_s=300.0 + 400 * index, requests=150, over_s=10.0) for index in range(8))
    smooth, bursty = (
        Generator(requests_per_s=4.0, swing=0.5, seed=2),
        Generator(bursts=bursts, requests_per_s=1, seed=1),
    )
    return smooth.trace(), bursty.trace()


def replays(folder: Path | None, quick: bool, path: Path, figures: dict[str, float]) -> None:
    """All but the live part."""
    model = ReplicaModel(capacity=CAPACITY, slots=16, chunk_tokens=64, cold_start_s=13.0)
    conv, code = read_traces(folder)
    dial = tuned_dial(World(conv.part(0.0, TUNED_S, f"{conv.name} (tuned on)"), model))
    figures["dial"] = dial
    held_out = World(conv, model, TUNED_S)
    chosen = measure(held_out, dial, quick, figures, "")
    draw(held_out, chosen, path)
    bursty = World(code, model)
    if not quick:
        measure(
            World(conv, ReplicaModel(capacity=CAPACITY, slots=16, chunk_tokens=64, cold_start_s=60.0), TUNED_S),
            dial,
            True,
            figures,
            "slow_",
        )
        measure(bursty, OBJECTIVE.percentile, True, figures, "code_")
    compare_forecasts([held_out, bursty], figures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, help="folder of the Azure LLM inference traces of 2023")
    parser.add_argument("--quick", action="store_true", help="fewer settings, one cold start, no code, no live part")
    parser.add_argument("--live", action=argparse.BooleanOptionalAction, help="on unless --quick")
    parser.add_argument("--replay", action=argparse.BooleanOptionalAction, default=True, help="the simulated part")
    parser.add_argument("--json", type=Path, help="write the figures as one flat object")
    parser.add_argument("--png", type=Path, default=Path("autoscaling.png"), help="where the picture is drawn")
    arguments = parser.parse_args()
    print("python", *sys.argv)
    print(f"python {platform.python_version()}, ray {ray.__version__}; {os.cpu_count()} CPUs")
    figures: dict[str, float] = {}
    began = time.monotonic()
    if arguments.replay:
        replays(arguments.trace, arguments.quick, arguments.png, figures)
        print(f"replayed in {time.monotonic() - began:.0f} s")
    if arguments.live if arguments.live is not None else not arguments.quick:
        run_live(figures)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
