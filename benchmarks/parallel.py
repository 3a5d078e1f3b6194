"""What a parallel layout costs and saves: seconds per step and memory per worker, beside ZeRO.

    python benchmarks/parallel.py [--quick] [--hidden 256] [--tokens 256] [--json FILE]

The model of jobs/configs/tiny_gpt.yaml (or a wider one, or longer rows), random tokens, fp32, 2 workers with 1 thread
each over Gloo, global batches of 8 rows in micro-batches of 2. Every layout starts in fresh processes; the layouts go
in turn, and a figure is the median over the rounds. A step's time is the median of its round after two steps of
warm-up; `cpu` is the processor time a worker spent on it, which moves less on a busy machine. Memory is what a
worker's resident set grew by at its highest, from before the model was built; `kept` is what it had grown by after
the last step. The larger of the two workers counts.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

VOCABULARY, ROWS, WORKERS, MICRO = 2048, 8, 2, 2
LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "zero-1": (1, {}),
    "zero-3": (3, {}),
    "tensor=2": (1, {"tensor": 2}),
    "sequence=2": (1, {"sequence": 2}),
    "pipeline=2": (1, {"pipeline": 2}),
}


def work(rank: int, spec: dict[str, Any]) -> dict[str, float]:
    """One worker's figures."""
    import numpy as np
    import torch

    from modelyard.config import parse
    from modelyard.data.dataset import DatasetInfo
    from modelyard.data.shards import Column
    from modelyard.tasks.slices import cut
    from modelyard.training import TrainConfig
    from modelyard.training.batching import plan
    from modelyard.training.engine import Engine, import_deepspeed
    from modelyard.training.gang import Gang
    from modelyard.training.pipeline import StagedModel

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORKERS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(spec["port"]), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    import_deepspeed().init_distributed(dist_init_required=False)
    config, tokens = parse(TrainConfig, spec["config"]), spec["tokens"]
    gang = Gang(rank, WORKERS, torch.device("cpu"), parallel=config.training.parallel)
    part = plan(ROWS, MICRO, gang.data_size, gang.data_rank)
    column = Column(name="input_ids", dtype="uint16", shape=(tokens,))
    info = DatasetInfo(
        format="tokens", columns=(column,), splits={"train": ROWS}, vocab_size=VOCABULARY, block_tokens=tokens
    )
    small = {**spec["config"]["task"]["model"], "hidden_size": 8, "layers": 1}
    config.task.with_changes(model=small).build(info, None)  # imports what building needs
    before = _resident_mib()
    torch.manual_seed(0)
    engine = Engine(config.task.build(info, None).train(), config, part, num_workers=WORKERS)
    rows = np.random.default_rng(0).integers(VOCABULARY, size=(ROWS, tokens))[part.start : part.stop]
    seconds, cpu = [], []
    for step in range(spec["steps"]):
        torch.distributed.barrier()
        began, used = time.perf_counter(), time.process_time()
        batches = [
            cut(config.task.collate({"input_ids": rows[start:stop]}, "cpu"), gang.slice, gang.parallel.sequence)
            for start, stop in part.micro_batches
        ]
        if isinstance(engine.model, StagedModel):
            engine.model.train_on(config.task, [(batch, True) for batch in batches])
        else:
            for index, batch in enumerate(batches):
                engine.backward(config.task.loss(engine.model, batch), is_last=index + 1 == len(batches))
        engine.step(step)
        seconds.append(time.perf_counter() - began)
        cpu.append(time.process_time() - used)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "seconds": statistics.median(seconds[2:]),
        "cpu_s": statistics.median(cpu[2:]),
        "peak_mib": peak - before,
        "kept_mib": _resident_mib() - before,
    }


def _resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / (1 << 20)


def measure(layout: str, options: argparse.Namespace) -> dict[str, float]:
    """One round of a layout: the slower, larger worker."""
    stage, parallel = LAYOUTS[layout]
    model = {"architecture": "llama", "layers": 4, "hidden_size": options.hidden, "heads": 4}
    training = {"max_steps": 100, "global_batch_size": ROWS, "micro_batch_size": MICRO, "noise_every_steps": 0}
    config = {
        "name": "bench",
        "dataset": "none",
        "task": {"kind": "causal_lm", "model": model},
        "workers": WORKERS,
        "training": {**training, "zero_stage": stage, "parallel": parallel},
    }
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spec = json.dumps({"config": config, "tokens": options.tokens, "steps": options.steps, "port": port})
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", __file__, "--worker"]
    processes = [
        subprocess.Popen(
            [*command, str(rank), spec], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
        )
        for rank in range(WORKERS)
    ]
    try:
        outputs = [process.communicate(timeout=600)[0].decode() for process in processes]
    finally:
        for process in processes:
            process.kill()
    found = [json.loads(output.strip().splitlines()[-1]) for output in outputs]
    return {name: max(each[name] for each in found) for name in found[0]}


def main() -> None:
    """Measure all layouts in turn and print the table."""
    if sys.argv[1:2] == ["--worker"]:
        print(json.dumps(work(int(sys.argv[2]), json.loads(sys.argv[3]))), flush=True)
        os._exit(0)  # Gloo's threads may still hold Python objects
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=256, help="width of the model")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a row")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="one round of five steps")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.steps = 1, 5
    rounds: dict[str, list[dict[str, float]]] = {layout: [] for layout in LAYOUTS}
    for _ in range(options.rounds):
        for layout, found in rounds.items():
            found.append(measure(layout, options))
    figures = {
        layout: {name: statistics.median(each[name] for each in found) for name in found[0]}
        for layout, found in rounds.items()
    }
    print(
        f"hidden {options.hidden}, rows of {options.tokens} tokens, {options.rounds} round(s) of {options.steps} steps"
    )
    print(f"{'layout':12} {'s/step':>8} {'cpu':>7} {'peak MiB':>9} {'kept MiB':>9}")
    for layout, found in figures.items():
        times = f"{found['seconds']:8.3f} {found['cpu_s']:7.3f}"
        print(f"{layout:12} {times} {found['peak_mib']:9.0f} {found['kept_mib']:9.0f}")
    if options.json is not None:
        flat = {f"{layout}/{name}": value for layout, found in figures.items() for name, value in found.items()}
        options.json.write_text(json.dumps(flat, indent=1) + "\n")


if __name__ == "__main__":
    main()
