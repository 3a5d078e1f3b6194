"""Data-parallel strategies side by side: rows to a target, bytes sent, seconds per step, and what a slow worker costs.

    python benchmarks/strategies.py [--quick] [--workers N] [--json FILE] [--png FILE]

One workload, the CNN of `jobs/configs/digits.yaml` on scikit-learn's handwritten digits, on one gang of workers that
Ray Train starts; the variants train one after another in it through Modelyard's own worker.

- rows to target: rows trained until the validation loss is `TARGET` or below, between validations on a straight line;
  the mean over seeds.
- MiB sent: per step and worker, from the kernel's counters of the loopback device. As root on Linux the benchmark runs
  in a network namespace of its own, so that nothing but its Ray and its gang is counted, and what the idle Ray sends
  is taken off. `counted` is what the strategy's own sends add up to (not known of DeepSpeed's collectives).
- seconds per step: every worker is paced, as if it had an accelerator of its own that takes `PACE_MS` per row: it
  sleeps in the forward pass for what is left of that. So more workers than cores can be compared, whose waiting is
  then real and whose computing does not take each other's time.
- slow: the same with the last worker at `FACTOR` times the pace. The slowdown of the whole run is the ratio of its
  seconds per step. A gang that shares out the work ideally would have (N - 1 + 1 / FACTOR) / N of its speed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BATCH, MICRO, PACE_MS, FACTOR, TARGET = 64, 8, 2.0, 4.0, 0.25
WARM_STEPS = 10
"""Steps at the start whose time does not count."""
IDLE_S = 5.0
STRATEGIES: dict[str, Any] = {
    "all_reduce, ZeRO-1": {"strategy": "all_reduce", "zero_stage": 1},
    "all_reduce, ZeRO-0": {"strategy": "all_reduce", "zero_stage": 0},
    "servers, staleness 0": {"strategy": {"kind": "parameter_server", "staleness": 0}},
    "servers, staleness 1": {"strategy": {"kind": "parameter_server", "staleness": 1}},
    "servers, staleness 4": {"strategy": {"kind": "parameter_server", "staleness": 4}},
    "servers, staleness 4, fixed parts": {
        "strategy": {"kind": "parameter_server", "staleness": 4, "work_claiming": False}
    },
    "gossip, exponential": {"strategy": "gossip"},
    "gossip, ring": {"strategy": {"kind": "gossip", "topology": "ring"}},
}
QUICK = ("all_reduce, ZeRO-0", "servers, staleness 1", "gossip, exponential")


def config_of(training: dict[str, Any], workers: int, steps: int, seed: int) -> dict[str, Any]:
    """One variant's run, as a plain config."""
    return {
        "name": "strategies",
        "dataset": "datasets:/digits",
        "seed": seed,
        "task": {"kind": "image_classification"},
        "workers": {"min": workers, "max": workers, "cpus": 1},
        "training": {
            "max_steps": steps, "global_batch_size": BATCH, "micro_batch_size": MICRO,
            "noise_every_steps": 0, **training
        },
        "optimizer": {"kind": "adamw", "learning_rate": 0.002, "weight_decay": 0.01},
        "schedule": {"kind": "cosine", "warmup_steps": 20},
        "validation": {"every_steps": 10},
        "checkpoint": {"every_s": None, "keep_best": False},
    }  # fmt: skip


# --- on the workers ----------------------------------------------------------------------------------------------


def run_all(payload: dict[str, Any]) -> None:
    """On each worker: every variant in turn."""
    import torch.distributed as dist

    from modelyard.training.worker import train_worker

    for run in payload["runs"]:
        slow = run["factor"] if dist.get_rank() == dist.get_world_size() - 1 else 1.0
        dist.barrier()
        before = (time.time(), loopback_bytes())
        with paced(run["job"]["config"]["task"]["kind"], PACE_MS * slow / 1e3):
            train_worker({"job": run["job"], "monitor": payload["monitor"]})
        dist.barrier()
        if dist.get_rank() == 0:
            after = (time.time(), loopback_bytes())
            seconds, sent = after[0] - before[0], after[1] - before[1]
            Path(run["traffic"]).write_text(json.dumps({"seconds": seconds, "bytes": sent}))


@contextmanager
def paced(kind: str, row_s: float) -> Iterator[None]:
    """Let every row of a training pass take `row_s` seconds at least."""
    from modelyard.tasks.image_classification import ImageClassification

    assert kind == "image_classification"
    plain = ImageClassification.loss

    def loss(task: Any, model: Any, batch: Any) -> Any:
        began = time.perf_counter()
        row_losses_b = plain(task, model, batch)
        if model.training:
            time.sleep(max(0.0, len(row_losses_b) * row_s - (time.perf_counter() - began)))
        return row_losses_b

    ImageClassification.loss = loss  # type: ignore[method-assign]
    try:
        yield
    finally:
        ImageClassification.loss = plain  # type: ignore[method-assign]


def loopback_bytes() -> int:
    """Bytes sent over the loopback device since it came up."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "lo":
            return int(numbers.split()[8])
    return 0


# --- on the driver -----------------------------------------------------------------------------------------------


def train(runs: dict[str, dict[str, Any]], workers: int, folder: Path) -> dict[str, dict[str, Any]]:
    """Train every run in one gang; what each measured."""
    import ray

    from modelyard.artifacts.store import Store
    from modelyard.config import parse
    from modelyard.training import TrainConfig
    from modelyard.training.monitor import start_monitor
    from modelyard.training.run_folder import RunFolder
    from modelyard.training.runs import RUN_RECORD
    from modelyard.training.trainer import trainer
    from modelyard.training.worker import Job

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    store, (reference, digest) = Store.from_settings(), prepared()
    payload = []
    for number, run in enumerate(runs.values()):
        target = RunFolder(f"{store.uri}/runs/run-{number}")
        target.write(RUN_RECORD, b"{}")
        config = parse(TrainConfig, run["config"])
        job = Job(
            config=config,
            run_id=f"run-{number}",
            run_uri=target.uri,
            store=store.uri,
            dataset_digest=digest,
            dataset_reference=reference,
        )
        traffic = str(folder / f"traffic-{number}.json")
        payload.append({"job": job.model_dump(mode="json"), "factor": run["factor"], "traffic": traffic})
    monitor = start_monitor("strategies")
    arguments = {"runs": payload, "monitor": monitor}
    done = threading.Event()
    threading.Thread(target=report, args=(list(runs), folder, done), daemon=True).start()
    try:
        trainer(run_all, arguments, config, monitor=monitor, storage_uri=str(folder / "ray")).fit()
    finally:
        done.set()
    found = {}
    for number, (name, run) in enumerate(runs.items()):
        traffic = json.loads((folder / f"traffic-{number}.json").read_text())
        found[name] = measured(RunFolder(f"{store.uri}/runs/run-{number}"), run["config"], traffic)
    ray.kill(monitor)
    return found


def report(names: list[str], folder: Path, done: threading.Event) -> None:
    """Say on stderr when each run has ended, until `done`."""
    for number, name in enumerate(names):
        traffic = folder / f"traffic-{number}.json"
        while not traffic.exists():
            if done.wait(0.5):
                return
        print(f"{number + 1}/{len(names)} {name}", file=sys.stderr, flush=True)


def measured(folder: Any, config: dict[str, Any], traffic: dict[str, float]) -> dict[str, Any]:
    """The figures of one run from its history."""
    from modelyard.training.checkpoints import CheckpointStore
    from modelyard.training.history import History

    checkpoints = folder.sub("checkpoints")
    data = checkpoints.read(f"{CheckpointStore(checkpoints).committed()[-1].name}/history.parquet")
    history = History.from_parquet(data)
    seconds = [BATCH / speed for step, speed in history.series("rows_per_s") if step > WARM_STEPS]
    counted = [sent for step, sent in history.series("sent_bytes") if step > WARM_STEPS]
    losses = history.series("validation_loss")
    return {
        "step_s": statistics.mean(seconds),
        "counted_bytes": statistics.mean(counted) if counted else None,
        "traffic": traffic,
        "curve": losses,
        "rows_to_target": rows_to(TARGET, losses),
        "final_accuracy": next((value for _, value in reversed(history.series("validation_accuracy"))), None),
        "max_steps": config["training"]["max_steps"],
    }


def rows_to(target: float, losses: list[tuple[int, float]]) -> float | None:
    """Rows until the loss first is `target`; None when it never is."""
    for (step, loss), (later, lower) in itertools.pairwise(losses):
        if lower <= target:
            share = (loss - target) / (loss - lower) if loss > lower else 1.0
            return BATCH * (step + min(max(share, 0.0), 1.0) * (later - step))
    return None


def prepared() -> tuple[str, str]:
    """Reference and digest of the digits, prepared now unless they are there."""
    from modelyard.artifacts import Registry
    from modelyard.config import load
    from modelyard.data.config import PrepareConfig
    from modelyard.data.prepare import prepare
    from modelyard.errors import NotFoundError

    registry = Registry.from_settings()
    try:
        found = registry.resolve("datasets:/digits", kind="dataset")
    except NotFoundError:
        prepare(load(PrepareConfig, ROOT / "jobs" / "configs" / "digits_data.yaml"))
        found = registry.resolve("datasets:/digits", kind="dataset")
    return found.reference, found.digest


def planned(names: tuple[str, ...], workers: int, steps: int, slow_steps: int, seeds: int) -> dict[str, dict[str, Any]]:
    """All runs by name, in the order they are made."""
    runs: dict[str, dict[str, Any]] = {}
    for seed in range(seeds):
        for name in names:
            config = config_of(STRATEGIES[name], workers, steps, seed)
            runs[f"{name} #{seed}"] = {"config": config, "factor": 1.0}
    for name in names:
        config = config_of(STRATEGIES[name], workers, slow_steps, 0)
        runs[f"{name} slow"] = {"config": {**config, "validation": {"every_steps": 0}}, "factor": FACTOR}
    return runs


def figures_of(
    found: dict[str, dict[str, Any]], names: tuple[str, ...], workers: int, seeds: int, idle_bytes_per_s: float
) -> dict[str, dict[str, Any]]:
    """One row of the table for each variant."""
    table = {}
    for name in names:
        runs = [found[f"{name} #{seed}"] for seed in range(seeds)]
        rows = [run["rows_to_target"] for run in runs]
        sent = [
            (run["traffic"]["bytes"] - idle_bytes_per_s * run["traffic"]["seconds"]) / run["max_steps"] / workers
            for run in runs
        ]
        counted = runs[0]["counted_bytes"]
        step_s = statistics.mean(run["step_s"] for run in runs)
        table[name] = {
            "rows_to_target": None if None in rows else round(statistics.mean(rows)),
            "final_accuracy": statistics.mean(run["final_accuracy"] for run in runs),
            "sent_mib": statistics.median(sent) / (1 << 20),
            "counted_mib": None if counted is None else counted / (1 << 20),
            "step_ms": step_s * 1e3,
            "slow_step_ms": found[f"{name} slow"]["step_s"] * 1e3,
            "slowdown": found[f"{name} slow"]["step_s"] / step_s,
        }
    return table


def show(table: dict[str, dict[str, Any]], workers: int) -> None:
    """Print the table."""
    ideal = workers / (workers - 1 + 1 / FACTOR)
    head = ("rows to target", "accuracy", "MiB sent", "counted", "step ms", f"slow {FACTOR:g}x ms", "slowdown")
    print(f"{'strategy':<34}" + "".join(f"{word:>15}" for word in head))
    for name, row in table.items():
        rows = "never" if row["rows_to_target"] is None else f"{row['rows_to_target']:,}"
        counted = "-" if row["counted_mib"] is None else f"{row['counted_mib']:.3f}"
        cells = (
            rows, f"{row['final_accuracy']:.3f}", f"{row['sent_mib']:.3f}", counted, f"{row['step_ms']:.1f}",
            f"{row['slow_step_ms']:.1f}", f"{row['slowdown']:.2f}",
        )  # fmt: skip
        print(f"{name:<34}" + "".join(f"{cell:>15}" for cell in cells))
    print(f"slowdown if the work were shared ideally: {ideal:.2f}; if all waited for the slow worker: {FACTOR:.2f}")


def draw(found: dict[str, dict[str, Any]], table: dict[str, dict[str, Any]], path: Path) -> None:
    """Two panels: validation loss over rows, and what the slow worker costs."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (curves, bars) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for name in table:
        steps, losses = zip(*found[f"{name} #0"]["curve"], strict=True)
        curves.plot([BATCH * step for step in steps], losses, label=name)
    curves.axhline(TARGET, color="grey", linewidth=0.8, linestyle=":")
    curves.set(xlabel="rows trained", ylabel="validation loss", yscale="log")
    curves.legend(fontsize=8)
    bars.barh(list(table), [row["slowdown"] for row in table.values()])
    bars.invert_yaxis()
    bars.set(xlabel=f"slowdown of the run when one worker is {FACTOR:g} times slower")
    figure.savefig(path, dpi=120)


def in_own_network() -> None:
    """Start this program anew in a network namespace of its own, where that can be done."""
    if os.environ.get("MODELYARD_BENCH_NETWORK") or os.geteuid() != 0 or shutil.which("unshare") is None:
        return
    if subprocess.run(["unshare", "--net", "true"], check=False, capture_output=True).returncode != 0:
        return
    environment = {**os.environ, "MODELYARD_BENCH_NETWORK": "own", "GLOO_SOCKET_IFNAME": "lo"}
    script = 'ip link set lo up && exec "$@"'
    command = ["unshare", "--net", "sh", "-c", script, "sh", sys.executable, *sys.argv]
    os.execvpe(command[0], command, environment)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three strategies, one seed: under two minutes")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--json", type=Path, help="write the figures")
    parser.add_argument("--png", type=Path, help="draw the loss curves and the slowdowns")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    in_own_network()
    names = QUICK if options.quick else tuple(STRATEGIES)
    steps, slow_steps, seeds = (120, 40, 1) if options.quick else (150, 40, 2)
    own = os.environ.get("MODELYARD_BENCH_NETWORK") == "own"
    print("python", *sys.argv)
    print(f"python {platform.python_version()},", ", ".join(f"{n} {version(n)}" for n in ("torch", "deepspeed", "ray")))
    print(
        f"{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}, {'own' if own else 'shared'} network; "
        f"{options.workers} workers at {PACE_MS:g} ms a row, {BATCH} rows a step, {steps} steps, {seeds} seed(s); "
        f"target {TARGET}"
    )
    with tempfile.TemporaryDirectory(prefix="my-bench-") as name:
        folder = Path(name)
        os.environ |= {
            "MODELYARD_HOME": str(folder / "home"),
            "MODELYARD_STORE": str(folder / "home" / "store"),
            "MODELYARD_TRACKING_URI": f"sqlite:///{folder / 'home' / 'mlflow.db'}",
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
        }
        import ray

        ray.init(
            address="local", num_cpus=options.workers, include_dashboard=False, log_to_driver=False,
            logging_level="ERROR", _temp_dir=str(folder / "ray"),
        )  # fmt: skip
        try:
            prepared()
            before = loopback_bytes()
            time.sleep(IDLE_S)
            idle = (loopback_bytes() - before) / IDLE_S if own else 0.0
            found = train(planned(names, options.workers, steps, slow_steps, seeds), options.workers, folder)
        finally:
            ray.shutdown()
    table = figures_of(found, names, options.workers, seeds, idle)
    show(table, options.workers)
    if options.json:
        flat = {f"{name}: {key}": value for name, row in table.items() for key, value in row.items()}
        options.json.write_text(json.dumps(flat, indent=2) + "\n")
    if options.png:
        draw(found, table, options.png)


if __name__ == "__main__":
    main()
