"""Training speed against a hand-written DeepSpeed loop, HF Trainer with DeepSpeed, and torch DDP.

    python benchmarks/training.py [--quick] [--zero-stage N] [--json FILE]

One model (a Llama of 10 M parameters), the same rows, fp32, 2 workers with 1 thread each, global batches of
8 rows of 256 tokens. The workers of all variants stay alive and run rounds of a few steps in turn, so that all see
the same machine: a figure is the median over rounds, a ratio the median of the ratios within rounds.

- platform: Modelyard's TrainLoop and Engine as its worker builds them, with logging at every step.
- handwritten: `deepspeed.initialize`, torch's fused AdamW, the same ZeRO stage, the model's own loss, a memmap.
- hf_trainer: transformers.Trainer with the same DeepSpeed config.
- ddp: torch DistributedDataParallel without DeepSpeed.

The time to the first step runs from the start of the process (the best of three starts in turn; of one with
--quick); `first_step_s_platform` is that of
`modelyard.train` in a fresh process, which starts its own Ray. DeepSpeed's shared-memory operator, which takes a
minute to compile at the first start, is off in every variant.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
MODEL = {"architecture": "llama", "layers": 6, "hidden_size": 320, "heads": 5}
VOCABULARY, BLOCK, BATCH, WORKERS, THREADS, ROWS = 8192, 256, 8, 2, 1, 4096
TIMEOUT_S = 300.0
"""Longest wait for one worker to answer."""

Rounds = list[dict[str, Any]]


class Gang:
    """The worker processes of one variant."""

    def __init__(self, name: str, spec: dict[str, Any], log: Path, root: Path | None) -> None:
        self.name = name
        self._log = log
        self._connections: list[Connection] = []
        self._processes = []
        environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS)}
        if root is not None:
            environment["PYTHONPATH"] = str(root)
        port = _free_port()
        self._began = time.time()
        for rank in range(WORKERS):
            ours, theirs = Pipe()
            full = {**spec, "rank": rank, "port": port}
            command = [sys.executable, str(HERE / "training_variants.py"), json.dumps(full), str(theirs.fileno())]
            with log.open("ab") as out:
                process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdout=out, stderr=out, env=environment)
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)
        self.first_step_s = max(report["now"] for report in self._answers()) - self._began
        self.rounds: Rounds = []

    def run(self, steps: int) -> dict[str, Any]:
        """Run `steps` steps on all workers; per step: wall and CPU seconds, and the split as worker 0 saw it."""
        reports = self._ask(steps)
        result = {
            "seconds": max(report["seconds"] for report in reports) / steps,
            "cpu_s": sum(report["cpu_s"] for report in reports) / steps,
            "rss_mib": sum(report["rss_mib"] for report in reports),
            "split": {name: seconds / steps for name, seconds in reports[0]["split"].items()},
        }
        self.rounds.append(result)
        return result

    def peak_flops(self) -> float:
        """FLOP/s of matrix products that all workers run at once."""
        return float(sum(self._ask("peak")))

    def close(self) -> None:
        """End the workers."""
        for process, connection in zip(self._processes, self._connections, strict=True):
            try:
                connection.send("end")
                process.wait(10)
            except (OSError, subprocess.TimeoutExpired):
                process.kill()

    def _ask(self, what: int | str) -> list[Any]:
        for connection in self._connections:
            connection.send(what)
        return self._answers()

    def _answers(self) -> list[Any]:
        try:
            return [self._answer(connection) for connection in self._connections]
        except (EOFError, OSError, TimeoutError) as error:
            self.close()
            sys.exit(f"a worker of {self.name} failed ({error!r}); its log ends:\n{self._log.read_text()[-3000:]}")

    @staticmethod
    def _answer(connection: Connection) -> Any:
        if not connection.poll(TIMEOUT_S):
            raise TimeoutError(f"no answer in {TIMEOUT_S:g} s")
        return connection.recv()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def make_dataset(folder: Path) -> tuple[Path, Path]:
    """Random tokens as a dataset of ours and as a flat file for a memmap."""
    from modelyard.data.dataset import INFO_FILE, DatasetInfo
    from modelyard.data.shards import Column, ShardWriter

    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (ROWS, BLOCK)).astype(np.uint16)
    memmap, target = folder / "tokens.bin", folder / "dataset"
    tokens.tofile(memmap)
    target.mkdir()
    column = Column(name="input_ids", dtype="uint16", shape=(BLOCK,))
    writer = ShardWriter(target, "train", [column], ROWS)
    writer.write({"input_ids": tokens})
    writer.close()
    info = DatasetInfo(
        format="tokens", columns=(column,), splits={"train": ROWS}, vocab_size=VOCABULARY, block_tokens=BLOCK
    )
    (target / INFO_FILE).write_text(info.model_dump_json())
    return target, memmap


def first_step_under_ray(spec: dict[str, Any], folder: Path) -> float:
    """Seconds from the start of a process that calls `modelyard.train` until it shows the first step."""
    code = (
        "import json, sys, time\n"
        "import modelyard\n"
        "from training_variants import train_config\n"
        "steps = []\n"
        "def note(record):\n"
        "    if record['kind'] == 'step' and not steps:\n"
        "        steps.append(time.time())\n"
        "modelyard.train(train_config(json.loads(sys.argv[1])), on_record=note, progress=False)\n"
        "print('first step at', steps[0])\n"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": str(HERE),
        "MODELYARD_HOME": str(folder / "home"),
        "MODELYARD_STORE": str(folder / "home" / "store"),
        "MODELYARD_TRACKING_URI": f"sqlite:///{folder / 'home' / 'mlflow.db'}",
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    environment["RAY_ADDRESS"] = "local"  # a cluster of its own, whatever else runs here
    began = time.time()
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps({**spec, "max_steps": 2})],
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("first step at ")]
    if not lines:
        sys.exit(f"modelyard.train failed:\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")
    return float(lines[0].rsplit(" ", 1)[1]) - began


def ratio(gangs: dict[str, Gang], ours: str, theirs: str, field: str = "seconds") -> float:
    """How many times as fast `ours` is: the median over rounds."""
    pairs = zip(gangs[ours].rounds, gangs[theirs].rounds, strict=True)
    return statistics.median(b[field] / a[field] for a, b in pairs)


def flops_per_step() -> float:
    """Model FLOPs of one global batch, by the task's own count."""
    from modelyard.data.dataset import DatasetInfo
    from modelyard.data.shards import Column
    from modelyard.tasks.causal_lm import CausalLM

    column = Column(name="input_ids", dtype="uint16", shape=(BLOCK,))
    info = DatasetInfo(format="tokens", columns=(column,), splits={}, vocab_size=VOCABULARY, block_tokens=BLOCK)
    task = CausalLM.model_validate({"model": MODEL})
    return BATCH * task.flops_per_row(task.build(info, None))


def show(gangs: dict[str, Gang], figures: dict[str, float]) -> None:
    parts = ("data", "forward", "backward", "optimizer")
    head = "".join(f"{part + ' ms':>14}" for part in parts)
    speeds = f"{'tokens/s':>10}{'lowest':>9}{'highest':>9}{'per CPU-s':>11}"
    print(f"{'variant':<13}{speeds}{head}{'RSS MiB':>9}{'1st step s':>12}")
    for name, gang in gangs.items():
        found = [BATCH * BLOCK / each["seconds"] for each in gang.rounds]
        cpu = statistics.median(BATCH * BLOCK / each["cpu_s"] for each in gang.rounds)
        split = "".join(_median_ms(gang.rounds, part) for part in parts)
        rss = max(each["rss_mib"] for each in gang.rounds)
        print(
            f"{name:<13}{statistics.median(found):>10.0f}{min(found):>9.0f}{max(found):>9.0f}{cpu:>11.0f}"
            f"{split}{rss:>9.0f}{gang.first_step_s:>12.1f}"
        )
    for name, value in figures.items():
        print(f"{name:<32}{value:.3f}")


def _median_ms(rounds: Rounds, part: str) -> str:
    values = [each["split"][part] * 1e3 for each in rounds if part in each["split"]]
    return f"{statistics.median(values):>14.1f}" if values else f"{'-':>14}"


def figures_of(gangs: dict[str, Gang], peaks: list[float], flops: float) -> dict[str, float]:
    """The flat keys of the JSON."""
    others = [name for name in gangs if name != "platform"]
    figures = {f"platform_over_{other}": ratio(gangs, "platform", other) for other in others}
    figures |= {f"platform_over_{other}_cpu": ratio(gangs, "platform", other, "cpu_s") for other in others}
    if {"handwritten", "ddp"} <= gangs.keys():
        figures["deepspeed_over_ddp"] = ratio(gangs, "handwritten", "ddp")
        figures["deepspeed_over_ddp_cpu"] = ratio(gangs, "handwritten", "ddp", "cpu_s")
        figures["first_step_s_handwritten"] = gangs["handwritten"].first_step_s
    if "platform" in gangs:
        rounds = gangs["platform"].rounds
        figures["mfu_platform"] = statistics.median(
            flops / each["seconds"] / peak for each, peak in zip(rounds, peaks, strict=True)
        )
        figures["peak_gflops"] = statistics.median(peaks) / 1e9
        figures["first_step_s_platform_without_ray"] = gangs["platform"].first_step_s
    return figures


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds: under two minutes")
    parser.add_argument("--json", type=Path, help="write the figures as one flat object")
    parser.add_argument("--zero-stage", type=int, default=1, choices=range(4), help="of every DeepSpeed variant")
    parser.add_argument("--variants", default="platform,handwritten,hf_trainer,ddp", help="comma-separated")
    parser.add_argument("--rounds", type=int, help="default 15, quick 6")
    parser.add_argument("--steps", type=int, help="steps per round; default 4, quick 2")
    parser.add_argument("--no-ray", action="store_true", help="leave out the start under Ray")
    parser.add_argument(
        "--against", type=Path, action="append", default=[], metavar="FOLDER",
        help="also run the platform from another source root (variant named after it); may be repeated",
    )  # fmt: skip
    return parser.parse_args()


def main() -> None:
    options = arguments()
    rounds, steps = options.rounds or (6 if options.quick else 15), options.steps or (2 if options.quick else 4)
    names = options.variants.split(",")
    has_accelerate = importlib.util.find_spec("accelerate") is not None
    if not has_accelerate and "hf_trainer" in names:
        names.remove("hf_trainer")
        print("hf_trainer is left out, it needs accelerate: pip install 'modelyard[bench]'")
    packages = ["torch", "deepspeed", "transformers", "ray", *(["accelerate"] if has_accelerate else [])]
    print("python", *sys.argv)
    print(f"python {platform.python_version()},", ", ".join(f"{name} {version(name)}" for name in packages))
    print(
        f"{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}; {WORKERS} workers x {THREADS} thread, fp32, "
        f"ZeRO-{options.zero_stage}, {BATCH} x {BLOCK} tokens a step, {rounds} rounds of {steps} steps"
    )
    with tempfile.TemporaryDirectory(prefix="my-bench-") as name:
        folder = Path(name)
        dataset, memmap = make_dataset(folder)
        spec = {
            "dataset": str(dataset), "memmap": str(memmap), "model": MODEL, "block": BLOCK, "batch": BATCH,
            "workers": WORKERS, "threads": THREADS, "zero_stage": options.zero_stage,
        }  # fmt: skip
        first = None if options.no_ray else first_step_under_ray(spec, folder)
        variants: dict[str, tuple[str, Path | None]] = {each: (each, None) for each in names}
        variants |= {root.parent.name: ("platform", root.resolve()) for root in options.against}
        gangs: dict[str, Gang] = {}
        starts: dict[str, list[float]] = {each: [] for each in variants}
        try:
            for attempt in range(1 if options.quick else 3):
                for each, (variant, root) in variants.items():
                    own = {**spec, "variant": variant, "scratch": str(folder / f"{each}-{attempt}")}
                    before = gangs.pop(each, None)
                    if before is not None:
                        before.close()
                    gangs[each] = Gang(each, own, folder / f"{each}.log", root)
                    starts[each].append(gangs[each].first_step_s)
                    gangs[each].first_step_s = min(starts[each])
            peaks = race(gangs, rounds, steps)
        finally:
            for gang in gangs.values():
                gang.close()
    figures = figures_of(gangs, peaks, flops_per_step())
    if first is not None:
        figures["first_step_s_platform"] = first
    show(gangs, figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


def race(gangs: dict[str, Gang], rounds: int, steps: int) -> list[float]:
    """Interleaved rounds, the order turned round each time. Returns the matmul peak of each round in FLOP/s."""
    for gang in gangs.values():
        gang.run(2)  # warm up
        gang.rounds.clear()
    peaks = []
    for number in range(rounds):
        order = list(gangs.values())[:: 1 if number % 2 == 0 else -1]
        peaks.append(order[0].peak_flops())
        for gang in order:
            gang.run(steps)
    return peaks


if __name__ == "__main__":
    main()
