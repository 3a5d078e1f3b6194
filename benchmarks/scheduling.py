# ruff: noqa: E402 - the number of threads must be set before numpy is imported
"""Our scheduling policies beside the published ones: same jobs, same cluster, same rules, same information.

    python benchmarks/scheduling.py [--gavel DIR] [--sia DIR] [--rubick DIR] [--quick] [--json FILE]

- gavel: the folder with `max_min_fairness.trace`, `minimize_makespan.trace`, `simulation_throughputs.json`.
- sia: `sia-simulator` of siasosp23/artifacts (or the folder above it), with `traces/` and `workloads/`.
- rubick: the folder with `traces/` and `workloads/`.

What is not given is left out. Published figures are those of the authors' own simulators. Sia's philly-1 alone was
used to tune the defaults of `goodput`; the other workloads are reported apart. Decisions are timed on one thread.
"""

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")  # before numpy: a model of seven parameters only suffers from more threads

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import scipy
from scipy.optimize import linprog

from modelyard.scheduling.model import Decision, Job, Policy, Reason, Snapshot, Wait
from modelyard.scheduling.policies import policy
from modelyard.scheduling.policies.genetic import GeneticSearch
from modelyard.scheduling.policies.goodput import GoodputPolicy
from modelyard.scheduling.policies.integer_program import IntegerProgram
from modelyard.scheduling.policies.objective import Indices, Problem, Solver
from modelyard.scheduling.policies.particle_swarm import ParticleSwarmSearch
from modelyard.scheduling.results import Result
from modelyard.scheduling.simulator import GAVEL_RULES, SIA_RULES, Rules, Simulation
from modelyard.scheduling.traces import gavel, rubick, sia
from modelyard.scheduling.traces.base import Trace
from modelyard.scheduling.traces.generator import Generator

GAVEL_JCT = {"fifo": (9.97, 54.6), "max_min_fairness_perf": (4.06, 17.8), "finish_time_fairness_perf": (4.17, 18.1)}
GAVEL_MAKESPAN = {
    "fifo": (58.8, 76.2),
    "max_min_fairness_perf": (9.91, 19.0),
    "min_total_duration_perf": (17.72, 17.98),
}
SIA = {1: (0.542, 7.89, 3.98), 2: (0.737, 10.29, 3.50), 3: (0.575, 4.1, 2.65)}
TUNED_ON = 1
HEAD = (
    f"{'':<34}{'avg JCT h':>10}{'p99 h':>8}{'makespan h':>12}"
    f"{'GPU-h/job':>11}{'restarts':>10}{'worst FTF':>11}{'decide ms':>11}"
)


def show(name: str, result: Result, worst: float | None = None) -> None:
    fair = f"{worst:>11.2f}" if worst is not None else f"{'':>11}"
    print(
        f"  {name:<32}{result.avg_jct_h:>10.3f}{result.jct_h(0.99):>8.2f}{result.makespan_h:>12.2f}"
        f"{result.gpu_h_per_job:>11.2f}{result.restarts_per_job:>10.2f}{fair}{result.decision_s() * 1e3:>11.1f}",
        flush=True,
    )


def published(name: str, jct: float, p99: float | None, makespan: float | None, gpu_h: float | None = None) -> None:
    cells = [
        f"{value:>{width}.{digits}f}" if value is not None else " " * width
        for value, width, digits in ((jct, 10, 3), (p99, 8, 2), (makespan, 12, 2), (gpu_h, 11, 2))
    ]
    print(f"  {name + ' (published)':<32}{''.join(cells)}")


def simulate(trace: Trace, chosen: Policy, rules: Rules) -> Result:
    return Simulation(trace=trace, policy=chosen, rules=rules).run()


def least_makespan_h(trace: Trace) -> float:
    """No schedule that gives each GPU to one job at a time is shorter: a linear program over time on each type."""
    pools = sorted({node.labels["modelyard/pool"] for node in trace.nodes})
    size = [sum(node.total["GPU"] for node in trace.nodes if node.labels["modelyard/pool"] == pool) for pool in pools]
    jobs, width = trace.jobs, len(pools)
    rows, bounds = [], []
    for index, job in enumerate(jobs):
        rates = np.zeros(width * len(jobs) + 1)
        speed = job.begin().speed
        at = slice(width * index, width * (index + 1))
        rates[at] = [-speed.goodput(pool, job.request.min_workers, 1) / (job.request.work or 1) for pool in pools]
        once = np.zeros_like(rates)
        once[at], once[-1] = 1, -1
        rows += [rates, once]
        bounds += [-1.0, -job.submitted_s]
    for index, gpus in enumerate(size):
        row = np.zeros(width * len(jobs) + 1)
        row[index:-1:width] = [job.request.min_workers for job in jobs]
        row[-1] = -gpus
        rows.append(row)
        bounds.append(0.0)
    cost = np.append(np.zeros(width * len(jobs)), 1.0)
    return float(linprog(cost, A_ub=np.array(rows), b_ub=bounds, method="highs").fun / 3600)


def run_gavel(folder: Path, figures: dict[str, float]) -> None:
    rates = folder / "simulation_throughputs.json"
    print(
        "\nGavel: 8 V100, 16 P100, 24 K80; rounds of 360 s, free restarts, one job a GPU, oracle steps/s, steps known"
    )
    trace = gavel.read(folder / "max_min_fairness.trace", rates)
    print(f"{trace.name}, {len(trace.jobs)} jobs\n{HEAD}")
    for name, (jct, makespan) in GAVEL_JCT.items():
        published(name, jct, None, makespan)
    show("max_min_fairness_perf, by us", simulate(trace, GavelMaxMin(), GAVEL_RULES))
    show("fifo", simulate(trace, policy("fifo"), GAVEL_RULES))
    ours = simulate(trace, GoodputPolicy(round_s=360.0), GAVEL_RULES)
    show("goodput, jct", ours)
    figures["gavel_avg_jct_h"] = ours.avg_jct_h
    trace = gavel.read(folder / "minimize_makespan.trace", rates)
    print(f"{trace.name}, {len(trace.jobs)} jobs; no schedule is shorter than {least_makespan_h(trace):.2f} h\n{HEAD}")
    for name, (jct, makespan) in GAVEL_MAKESPAN.items():
        published(name, jct, None, makespan)
    show("max_min_fairness_perf, by us", simulate(trace, GavelMaxMin(), GAVEL_RULES))
    show("fifo", simulate(trace, policy("fifo"), GAVEL_RULES))
    ours = simulate(trace, GoodputPolicy(objective="makespan", round_s=360.0), GAVEL_RULES)
    show("goodput, makespan", ours)
    figures["gavel_makespan_h"] = ours.makespan_h


def run_sia(folder: Path, is_quick: bool, figures: dict[str, float]) -> None:
    root = folder / "sia-simulator" if (folder / "sia-simulator").is_dir() else folder
    models = sia.read_models(root / "traces", list(sia.HETEROGENEOUS))
    print("\nSia: 24 T4, 24 RTX 2080Ti, 16 A100; rounds of 60 s; 1-GPU ratios, own measurements; work left unknown")
    found: dict[str, list[float]] = {name: [] for name in ("jct", "p99", "gpu_h", "ftf")}
    for number in [TUNED_ON] if is_quick else sorted(SIA):
        trace = sia.read(root / "workloads" / "philly" / f"workload-{number}.csv", models)
        use = "used for tuning" if number == TUNED_ON else "not tuned on"
        print(f"{trace.name}, {len(trace.jobs)} jobs; {use}\n{HEAD}")
        jct, p99, gpu_h = SIA[number]
        published("sia", jct, p99, None, gpu_h)
        if not is_quick:
            doubling = sia.read(root / "workloads" / "philly" / f"workload-{number}.csv", models, scale_up=2.0)
            show("goodput, at most doubling", simulate(doubling, GoodputPolicy(), SIA_RULES))
        ours = simulate(trace, GoodputPolicy(), SIA_RULES)
        worst = max(ours.fairness(trace).values())
        show("goodput", ours, worst)
        faster, leaner = ours.avg_jct_h / jct - 1, ours.gpu_h_per_job / gpu_h - 1
        print(f"  {'':<32}{100 * faster:>+9.1f}%{'':>20}{100 * leaner:>+10.1f}%")
        for name, value in zip(found, (ours.avg_jct_h, ours.jct_h(0.99), ours.gpu_h_per_job, worst), strict=True):
            found[name].append(value)
    figures["sia_avg_jct_h"] = statistics.fmean(found["jct"])
    figures["sia_p99_jct_h"] = statistics.fmean(found["p99"])
    figures["sia_gpu_h_per_job"] = statistics.fmean(found["gpu_h"])
    figures["sia_worst_ftf"] = max(found["ftf"])
    for index, number in enumerate([TUNED_ON] if is_quick else sorted(SIA)):
        figures[f"sia_philly_{number}_avg_jct_h"] = found["jct"][index]
        figures[f"sia_philly_{number}_gpu_h_per_job"] = found["gpu_h"][index]


def run_rubick(folder: Path, is_quick: bool, figures: dict[str, float]) -> None:
    plans = rubick.read_plans(folder / "traces")
    name = "naive" if is_quick else "workload-base"
    print("\nRubick: 64 A800; rounds of 60 s, 260 s a change; rates of each plan known, steps left unknown")
    trace = rubick.read(folder / "workloads" / f"{name}.csv", plans)
    print(f"{trace.name}, {len(trace.jobs)} jobs\n{HEAD}")
    if not is_quick:
        published("morphling", 1.01, None, 16.3)
    ours = simulate(trace, GoodputPolicy(), replace(SIA_RULES, moves_are_free=False))
    show("goodput", ours)
    if not is_quick:
        figures["rubick_avg_jct_h"], figures["rubick_makespan_h"] = ours.avg_jct_h, ours.makespan_h


def large_snapshot(gpus: int, num_jobs: int, seed: int = 0) -> Snapshot:
    """Jobs of which half hold what one decision gave them, half have just come."""
    each = gpus // 32
    pools = {"a100": (each, 8), "h100": (each, 8), "l4": (each, 8), "t4": (2 * each, 4)}
    speeds = {"a100": 4.0, "h100": 8.0, "l4": 2.0, "t4": 1.0}
    trace = Generator(
        num_jobs=num_jobs, pools=pools, speeds=speeds, sizes={1: 0.3, 4: 0.3, 8: 0.3, 32: 0.1}, seed=seed
    ).trace()
    live = [(job, job.begin()) for job in trace.jobs]
    jobs = tuple(
        Job(request=entry.request, submitted_s=float(index), speed=run.speed) for index, (entry, run) in enumerate(live)
    )
    half = Snapshot(now_s=num_jobs / 1.0, nodes=trace.nodes, jobs=jobs[: num_jobs // 2])
    run = GoodputPolicy().decide(half).run
    placed = tuple(replace(job, allocation=run.get(job.job_id, {}), done=1.0) for job in jobs)
    return Snapshot(now_s=num_jobs + 600.0, nodes=trace.nodes, jobs=placed)


def run_scale(is_quick: bool, figures: dict[str, float]) -> None:
    print(f"\nOne decision of goodput\n{'':<34}{'median s':>10}{'slowest':>10}")
    for gpus, num_jobs in ((2048, 500), (16384, 2000)):
        snapshot, seconds = large_snapshot(gpus, num_jobs), []
        for _ in range(3 if is_quick else 5):
            fresh = replace(snapshot)
            began = time.perf_counter()
            GoodputPolicy().decide(fresh)
            seconds.append(time.perf_counter() - began)
        figures[f"decision_s_{gpus}_gpus"] = statistics.median(seconds)
        print(
            f"  {f'{gpus:,} GPUs, {num_jobs:,} jobs':<32}{statistics.median(seconds):>10.2f}{max(seconds):>10.2f}",
            flush=True,
        )


class GavelMaxMin:
    """Gavel's `max_min_fairness_perf` again (OSDI'20, sections 4.1 and 5.2), to show that our rules are its rules.

    A linear program gives each job a share of time on each type, so that the least normalized throughput is as large
    as can be. Rounds go to whoever lags furthest behind his share. Shares are computed anew when jobs have come or
    gone, at most every 1,000 s.
    """

    name = "max_min_fairness_perf of Gavel"
    order = ("v100", "p100", "k80")

    def __init__(self) -> None:
        self.share: dict[tuple[str, str], float] = {}
        self.spent: dict[tuple[str, str], float] = {}
        self.known: frozenset[str] = frozenset()
        self.reset_s = float("-inf")
        self.last: tuple[float, dict[str, str]] = (0.0, {})

    def decide(self, snapshot: Snapshot) -> Decision:
        for job_id, pool in self.last[1].items():
            self.spent[job_id, pool] = self.spent.get((job_id, pool), 0.0) + snapshot.now_s - self.last[0]
        names = frozenset(snapshot.by_id)
        if names != self.known and snapshot.now_s - self.reset_s >= 1000:
            self.share, self.spent, self.known, self.reset_s = self._shares(snapshot), {}, names, snapshot.now_s
        run: dict[str, dict[str, int]] = {}
        chosen: dict[str, str] = {}
        for pool in self.order:
            free = [node.node_id for node in snapshot.pools[pool]]
            for job in sorted(snapshot.jobs, key=lambda one: -self._priority(one.job_id, pool)):
                size = job.request.min_workers
                may = job.job_id not in run and self._priority(job.job_id, pool) >= 0
                if may and size <= len(free) and job.speed.goodput(pool, size, 1) > 0:
                    run[job.job_id] = dict.fromkeys(free[:size], 1)
                    chosen[job.job_id], free = pool, free[size:]
        self.last = (snapshot.now_s, chosen)
        lagging = Reason(Wait.BEHIND, "others lag further behind their share")
        return Decision(run, {name: lagging for name in names if name not in run})

    def _priority(self, job_id: str, pool: str) -> float:
        share = self.share.get((job_id, pool), -1.0)
        spent = self.spent.get((job_id, pool), 0.0)
        return share / spent if spent > 0 else share * 1e9

    def _shares(self, snapshot: Snapshot) -> dict[tuple[str, str], float]:
        jobs, pools = snapshot.jobs, self.order
        size = np.array([len(snapshot.pools[pool]) for pool in pools], dtype=float)
        gang = np.array([job.request.min_workers for job in jobs], dtype=float)
        rate = np.array([[job.speed.goodput(pool, job.request.min_workers, 1) for pool in pools] for job in jobs])
        worth = rate * gang[:, None] / (rate @ size)[:, None]
        width = rate.size + 1
        least, once = np.zeros((len(jobs), width)), np.zeros((len(jobs), width))
        for index in range(len(jobs)):
            at = slice(3 * index, 3 * index + 3)
            least[index, at], least[index, -1], once[index, at] = -worth[index], 1.0, 1.0
        room = np.zeros((3, width))
        for index in range(3):
            room[index, index:-1:3] = gang
        cost = np.append(np.zeros(rate.size), -1.0)
        upper = np.concatenate([np.zeros(len(jobs)), np.ones(len(jobs)), size])
        found = linprog(cost, A_ub=np.vstack([least, once, room]), b_ub=upper, method="highs-ipm")
        shares = found.x[:-1].reshape(rate.shape)
        return {(job.job_id, pool): shares[j, p] for j, job in enumerate(jobs) for p, pool in enumerate(pools)}


class _Recorder:
    """The integer program, which keeps some of the problems it gets."""

    def __init__(self, every: int) -> None:
        self.every, self.count, self.kept = every, 0, list[Problem]()
        self.inner = IntegerProgram()

    def __call__(self, problem: Problem) -> Indices:
        self.count += 1
        if self.count % self.every == 0 and problem.num_jobs > 8:
            self.kept.append(problem)
        return self.inner(problem)


def run_solvers(figures: dict[str, float]) -> None:
    """Value of the searches' choices over the integer program's, on problems of a simulated day."""
    recorder = _Recorder(every=10)
    trace = Generator(num_jobs=120, jobs_per_hour=60.0, seed=3).trace()
    simulate(trace, GoodputPolicy(solver=recorder), SIA_RULES)
    solvers: Mapping[str, Solver] = {
        "integer program": IntegerProgram(),
        "genetic": GeneticSearch(),
        "particle swarm": ParticleSwarmSearch(),
    }
    values: dict[str, list[float]] = {name: [] for name in solvers}
    seconds: dict[str, list[float]] = {name: [] for name in solvers}
    problems: Sequence[Problem] = recorder.kept[:20]
    for problem in problems:
        for name, solver in solvers.items():
            began = time.perf_counter()
            values[name].append(problem.value_of(solver(problem)))
            seconds[name].append(time.perf_counter() - began)
    print(f"\nSolvers on {len(problems)} problems of a simulated day")
    print(f"{'':<34}{'of best':>10}{'worst':>10}{'median ms':>11}")
    for name in solvers:
        ratio = [value / best for value, best in zip(values[name], values["integer program"], strict=True)]
        middle = statistics.median(seconds[name]) * 1e3
        print(f"  {name:<32}{statistics.fmean(ratio):>10.4f}{min(ratio):>10.4f}{middle:>11.1f}")
        if name != "integer program":
            figures[f"{name.replace(' ', '_')}_over_integer_program"] = statistics.fmean(ratio)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gavel", type=Path, help="folder of Gavel's traces")
    parser.add_argument("--sia", type=Path, help="folder of Sia's simulator")
    parser.add_argument("--rubick", type=Path, help="folder of Rubick's simulator data")
    parser.add_argument("--quick", action="store_true", help="one workload of Sia, Rubick's smallest, fewer repeats")
    parser.add_argument("--json", type=Path, help="write the figures as one flat object")
    arguments = parser.parse_args()
    print("python", *sys.argv)
    print(
        f"python {platform.python_version()}, numpy {np.__version__}, scipy {scipy.__version__}; {os.cpu_count()} CPUs"
    )
    figures: dict[str, float] = {}
    if arguments.gavel:
        run_gavel(arguments.gavel, figures)
    if arguments.sia:
        run_sia(arguments.sia, arguments.quick, figures)
    if arguments.rubick:
        run_rubick(arguments.rubick, arguments.quick, figures)
    run_scale(arguments.quick, figures)
    run_solvers(figures)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
