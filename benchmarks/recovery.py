"""Seconds from a fault to the next finished step: Modelyard against plain elastic Ray Train.

    python benchmarks/recovery.py                  every fault, both ways, three rounds
    python benchmarks/recovery.py --quick          the killed worker only, one round
    python benchmarks/recovery.py --json out.json  also write the figures

Faults: `worker` (SIGKILL of one worker process), `node` (SIGKILL of a node's raylet), `drain` (a notice 30 s ahead,
then the node is killed). Both ways train the same Llama-style model with the same batch on the same fake nodes
(ray.cluster_utils: one head without CPUs, two nodes of one CPU; two workers, elastic down to one, a checkpoint
every ten steps). So a lost node leaves room for one worker; with `--nodes 3` there is a spare. A step counts as
finished when its worker says so, by the clock of this machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform as machine
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FAULTS = ("worker", "node", "drain")
WAYS = ("modelyard", "plain")
STEPS_BEFORE_FAULT = 25
SETTLED_S = 10.0
"""Training before the fault."""
STEPS_AFTER_FAULT = 3
MAX_STEPS = 5_000
DRAIN_NOTICE_S = 30
MODEL = {"layers": 4, "hidden_size": 256, "heads": 4, "vocabulary": 2048, "tokens": 128, "batch": 8}
LIMIT_S = 300.0


def main() -> None:
    """Run the benchmark, or (with --one) a single measurement in this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("WAY", "FAULT"))
    parser.add_argument("--nodes", type=int, default=2, help="fake nodes of one CPU; 3 leaves a spare for a lost one")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*options.one, num_nodes=options.nodes)))
        return
    faults, rounds = (["worker"], 1) if options.quick else (options.faults, options.rounds)
    taken: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for _ in range(rounds):
        for fault in faults:
            for way in WAYS:
                taken.setdefault((way, fault), []).append(in_subprocess(way, fault, options.nodes))
    report(taken, faults, options.json)


def in_subprocess(way: str, fault: str, num_nodes: int) -> dict[str, Any]:
    """One measurement in a fresh process, with a Ray cluster and folders of its own."""
    command = [sys.executable, __file__, "--one", way, fault, "--nodes", str(num_nodes)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S * 2)
    if done.returncode:
        raise SystemExit(f"{way}, {fault} failed:\n{done.stderr[-4000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"  {way:<10} {fault:<7} {result['recovery_s']:6.1f} s", flush=True)
    return result


def report(taken: dict[tuple[str, str], list[dict[str, Any]]], faults: list[str], path: Path | None) -> None:
    """Print the table; write the flat object."""
    import ray
    import torch

    figures: dict[str, float] = {}
    print(f"\n{' '.join(sys.argv)}")
    print(f"Python {machine.python_version()}, Ray {ray.__version__}, torch {torch.__version__}, {os.cpu_count()} CPUs")
    print("median seconds from the fault to the next finished step")
    print(f"{'fault':<8}{'modelyard':>11}{'plain':>9}{'ratio':>8}{'lost':>7}{'repeated':>10}")
    for fault in faults:
        ours, plain = taken["modelyard", fault], taken["plain", fault]
        seconds = statistics.median(r["recovery_s"] for r in ours)
        theirs = statistics.median(r["recovery_s"] for r in plain)
        ratio = statistics.median(a["recovery_s"] / b["recovery_s"] for a, b in zip(ours, plain, strict=True))
        lost, repeated = sum(r["lost"] for r in ours), sum(r["repeated"] for r in ours)
        print(f"{fault:<8}{seconds:>11.1f}{theirs:>9.1f}{ratio:>8.2f}{lost:>7}{repeated:>10}")
        figures |= {f"recovery_s_{fault}": seconds, f"recovery_over_plain_ray_train_{fault}": ratio}
    main_fault = "node" if "node" in faults else faults[0]
    figures |= {
        "recovery_s": figures[f"recovery_s_{main_fault}"],
        "recovery_over_plain_ray_train": figures[f"recovery_over_plain_ray_train_{main_fault}"],
        "samples_lost": sum(r["lost"] for (way, _), rs in taken.items() if way == "modelyard" for r in rs),
        "samples_repeated": sum(r["repeated"] for (way, _), rs in taken.items() if way == "modelyard" for r in rs),
    }
    if path is not None:
        path.write_text(json.dumps(figures, indent=1))


def measure(way: str, fault: str, num_nodes: int) -> dict[str, Any]:
    """One run on a cluster of its own with one fault: when the next step was finished, and which rows were used."""
    from ray.cluster_utils import Cluster

    os.environ |= {"MODELYARD_HOME": tempfile.mkdtemp(prefix="my-home-"), "RAY_AUTH_MODE": "disabled"}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(num_nodes)]
    cluster.wait_for_nodes()
    import ray

    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    steps: list[tuple[int, float]] = []
    gang_sizes: list[int] = []
    outcome: dict[str, Any] = {}
    saboteur = threading.Thread(target=lambda: outcome.update(sabotage(fault, cluster, nodes, steps)), daemon=True)
    saboteur.start()

    def stop_when_recovered(step: int, at: float) -> bool:
        steps.append((step, at))
        after = [t for _, t in steps if "at" in outcome and t > outcome["resumed_after"]]
        return len(after) > STEPS_AFTER_FAULT

    used = run_modelyard(stop_when_recovered, gang_sizes) if way == "modelyard" else run_plain(stop_when_recovered)
    saboteur.join(10)
    first = min(t for _, t in steps if t > outcome["resumed_after"])
    expected = set(range(len(used)))
    ray.shutdown()
    cluster.shutdown()
    return {
        "recovery_s": first - outcome["at"],
        "lost": len(expected - set(used)) if way == "modelyard" else 0,
        "repeated": len(used) - len(set(used)),
        "gang_sizes": gang_sizes,
    }


def sabotage(fault: str, cluster: Any, nodes: list[Any], steps: list[tuple[int, float]]) -> dict[str, Any]:
    """Wait for enough steps, cause the fault; when it happened, and from when on a step counts as recovered."""
    wait_until(lambda: bool(steps) and steps[-1][0] >= STEPS_BEFORE_FAULT and steps[-1][1] - steps[0][1] > SETTLED_S)
    victim_pid, victim_node = a_worker(nodes)
    at = time.time()
    if fault == "worker":
        os.kill(victim_pid, signal.SIGKILL)
    elif fault == "node":
        cluster.remove_node(victim_node, allow_graceful=False)
    else:
        drain(victim_node)
        threading.Timer(DRAIN_NOTICE_S, lambda: cluster.remove_node(victim_node, allow_graceful=False)).start()
    # A healthy gang finishes a step every fraction of a second: the gap after the fault is the recovery. After a
    # drain notice the old gang may go on: the gap that counts is the one in which its workers were replaced.
    # The workers of a lost node go on for a moment, until they notice that their raylet is gone.
    wait_until(lambda: not is_alive(victim_pid))
    if fault != "drain":
        return {"at": at, "resumed_after": time.time() + 0.5}
    gone = max((t for _, t in steps), default=at)
    return {"at": gone, "resumed_after": time.time()}


def a_worker(nodes: list[Any]) -> tuple[int, Any]:
    """A training worker's process and its node; not rank 0's where there is a choice."""
    import psutil

    found = []
    for node in nodes:
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        for child in raylet.children(recursive=True):
            if "RayTrainWorker" in " ".join(child.cmdline()[:1]):
                found.append((child.create_time(), child.pid, node))
    _, pid, node = max(found, key=lambda entry: entry[:2])
    return pid, node


def is_alive(pid: int) -> bool:
    """Whether the process still runs."""
    import psutil

    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def drain(node: Any) -> None:
    """What a cloud's preemption notice becomes in Ray."""
    command = ["ray", "drain-node", "--address", node.address, "--node-id", node.node_id]
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "benchmark"]
    command += ["--deadline-remaining-seconds", str(DRAIN_NOTICE_S)]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run(command, check=True, capture_output=True, env=environment)


def wait_until(condition: Callable[[], bool]) -> None:
    """Poll `condition`, at most `LIMIT_S`."""
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"nothing happened in LIMIT_S={LIMIT_S} s")
        time.sleep(0.02)


def run_modelyard(on_step: Callable[[int, float], bool], gang_sizes: list[int]) -> list[int]:
    """Train through `modelyard.train`; the stream positions of the rows its history says were used."""
    import numpy as np
    import ray

    import modelyard
    from modelyard.config import parse
    from modelyard.data.dataset import INFO_FILE, DatasetInfo
    from modelyard.data.shards import Column, ShardWriter
    from modelyard.training.monitor import NAMESPACE

    folder = Path(tempfile.mkdtemp(prefix="my-data-"))
    columns = (Column(name="input_ids", dtype="uint16", shape=(MODEL["tokens"],)),)
    rows = np.random.default_rng(0).integers(MODEL["vocabulary"], size=(4096, MODEL["tokens"])).astype(np.uint16)
    writer = ShardWriter(folder, "train", columns, 4096)
    writer.write({"input_ids": rows})
    writer.close()
    info = DatasetInfo(
        format="tokens",
        columns=columns,
        splits={"train": len(rows)},
        vocab_size=MODEL["vocabulary"],
        block_tokens=MODEL["tokens"],
    )
    (folder / INFO_FILE).write_text(info.model_dump_json())
    llama = {"architecture": "llama", **{k: MODEL[k] for k in ("layers", "hidden_size", "heads")}}
    config = parse(
        modelyard.TrainConfig,
        {
            "name": "recovery",
            "dataset": str(folder),
            "run": "recovery",
            "task": {"kind": "causal_lm", "model": {**llama, "max_positions": MODEL["tokens"]}},
            "workers": {"min": 1, "max": 2},
            "training": {
                "max_steps": MAX_STEPS,
                "global_batch_size": MODEL["batch"],
                "micro_batch_size": MODEL["batch"],
                "record_samples": True,
            },
            "checkpoint": {"every_steps": 10},
        },
    )

    def on_record(record: dict[str, Any]) -> None:
        if record["kind"] == "start":
            gang_sizes.append(record["num_workers"])
        if record["kind"] != "step":
            return
        if on_step(record["step"], record["time_s"]):
            monitor = ray.get_actor("run-recovery", namespace=NAMESPACE)
            monitor.request.remote("stop", "measured")

    run = modelyard.train(config, on_record=on_record, progress=False)
    used = [sample for record in run.history.records for sample in record.get("samples", [])]
    from modelyard.data.order import SampleOrder

    order = SampleOrder(len(rows), 0)
    expected = order.sample_ids(np.arange(len(used))).tolist()
    place = {sample: position for position, sample in enumerate(expected)}
    return [place.get(sample, -1) for sample in used]


def run_plain(on_step: Callable[[int, float], bool]) -> list[int]:
    """Train with Ray Train's own elasticity, as its documentation shows it."""
    import ray.train
    import ray.train.torch

    folder = Path(tempfile.mkdtemp(prefix="my-plain-"))
    trainer = ray.train.torch.TorchTrainer(
        plain_worker,
        train_loop_config={"model": MODEL, "folder": str(folder), "max_steps": MAX_STEPS},
        scaling_config=ray.train.ScalingConfig(num_workers=(1, 2), resources_per_worker={"CPU": 1}),
        run_config=ray.train.RunConfig(
            name="plain",
            storage_path=str(folder / "storage"),
            failure_config=ray.train.FailureConfig(max_failures=3),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
        ),
    )
    stopped = threading.Event()

    def follow() -> None:
        seen = 0
        while not stopped.wait(0.1):
            lines = (folder / "steps").read_text().splitlines() if (folder / "steps").exists() else []
            for line in lines[seen:]:
                step, at = line.split()
                if on_step(int(step), float(at)):
                    (folder / "stop").touch()
            seen = len(lines)

    follower = threading.Thread(target=follow, daemon=True)
    follower.start()
    trainer.fit()
    stopped.set()
    follower.join(5)
    return []


def plain_worker(settings: dict[str, Any]) -> None:
    """The training function of the plain way: DDP, AdamW, a reported checkpoint every ten steps."""
    import ray.train
    import ray.train.torch
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes, folder = settings["model"], Path(settings["folder"])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=sizes["vocabulary"],
            hidden_size=sizes["hidden_size"],
            intermediate_size=sizes["hidden_size"] * 8 // 3,
            num_hidden_layers=sizes["layers"],
            num_attention_heads=sizes["heads"],
            max_position_embeddings=sizes["tokens"],
            tie_word_embeddings=True,
        )
    )
    model = ray.train.torch.prepare_model(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    start = 0
    if (checkpoint := ray.train.get_checkpoint()) is not None:
        with checkpoint.as_directory() as path:
            state = torch.load(f"{path}/state.pt", weights_only=True)
        getattr(model, "module", model).load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    for step in range(start, settings["max_steps"]):
        rows = torch.randint(sizes["vocabulary"], (max(1, sizes["batch"] // workers), sizes["tokens"]))
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0:
            with (folder / "steps").open("a") as file:
                file.write(f"{step + 1} {time.time()}\n")
        if (step + 1) % 10 == 0:
            with tempfile.TemporaryDirectory() as path:
                if rank == 0:
                    weights = getattr(model, "module", model).state_dict()
                    kept = {"model": weights, "optimizer": optimizer.state_dict(), "step": step + 1}
                    torch.save(kept, f"{path}/state.pt")
                    ray.train.report({"step": step}, checkpoint=ray.train.Checkpoint.from_directory(path))
                else:
                    ray.train.report({"step": step})
            if (folder / "stop").exists():
                return


if __name__ == "__main__":
    main()
