"""Gangs of processes over Gloo, without Ray: how a test starts one, and what each of its processes does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Run = dict[str, Any]
Job = dict[str, Any]
ROOT = Path(__file__).parents[2]


def perform(module: str, job: Mapping[str, Any], out: Path, timeout_s: float) -> dict[str, Any]:
    """Do the `runs` of a job one after another on one gang of `workers` processes of `module`; results by name."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    workers, runs = job["workers"], job["runs"]
    file = out / f"job-{workers}-{runs[0]['name']}.json"
    file.write_text(json.dumps({**job, "port": port, "out": str(out)}))
    log = file.with_suffix(".log")
    with log.open("wb") as said:
        command = [sys.executable, "-W", "ignore", "-m", f"tests.training.{module}", str(file)]
        gang = [subprocess.Popen([*command, str(rank)], stdout=said, stderr=said, cwd=ROOT) for rank in range(workers)]
        try:
            codes = [process.wait(timeout_s) for process in gang]
        finally:
            for process in gang:
                process.kill()
                process.wait(10)
    assert not any(codes), log.read_text()[-4000:]
    return {run["name"]: json.loads((out / f"{run['name']}.json").read_text()) for run in runs}


def main(prepare: Callable[[Job, int], Callable[[Run], Any]], *, needs_deepspeed: Callable[[Job], bool]) -> None:
    """One process: join the gang, do every run with what `prepare(job, rank)` gives, and end.

    Worker 0 writes OUT/<name>.json: what a run gave, or the error it ended with.
    """
    import torch

    from modelyard.training.engine import import_deepspeed

    job, rank = json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2])
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job["workers"])}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(job["port"]), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    if needs_deepspeed(job):
        import_deepspeed().init_distributed(dist_init_required=False)
    do = prepare(job, rank)
    for run in job["runs"]:
        try:
            result = do(run)
        except Exception:  # noqa: BLE001 - the test shows it
            result = {"error": traceback.format_exc()}
            print(result["error"], flush=True)
        if rank == 0:
            (Path(job["out"]) / f"{run['name']}.json").write_text(json.dumps(result, default=str))
        torch.distributed.barrier()
    # Gloo's threads may still let go of Python objects: an interpreter that winds down under them aborts now and then.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
