"""One worker of a gang without Ray that performs whole runs one after another, for test_parallel.py.

    python -m tests.training.parallel_gang JOB.json RANK

JOB.json holds `workers`, `port`, `store`, `dataset` (a digest), `out` and `runs`: each a `name`, the `run` it belongs
to, a TrainConfig and `stop_after`, the step after which the gang is interrupted (None: never). Worker 0 writes
OUT/<name>.json: the history and the result, or the error it ended with.
"""

import time
from functools import partial
from typing import Any

import torch
from tests.training.gangs import main

from modelyard.config import parse
from modelyard.training import TrainConfig
from modelyard.training.checkpoints import CheckpointStore
from modelyard.training.gang import Gang
from modelyard.training.history import History
from modelyard.training.interrupts import Interrupted
from modelyard.training.run_folder import RunFolder
from modelyard.training.runs import RUN_RECORD
from modelyard.training.worker import Job, _Worker


class Recorder:
    """A reporter without a monitor behind it."""

    wish = None

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.step = 0

    def record(self, kind: str, values: dict[str, Any]) -> None:
        self.records.append({"kind": kind, **values})
        self.step = values["step"] if kind == "step" else self.step

    def at_boundary(self, step: int) -> None:
        pass

    def close(self) -> None:
        pass


def perform(run: dict[str, Any], job: dict[str, Any], rank: int) -> dict[str, Any]:
    """Start or continue a run, until it is done or interrupted."""
    config = parse(TrainConfig, run["config"])
    gang = Gang(
        rank=rank,
        num_workers=job["workers"],
        device=torch.device("cpu"),
        node_id="n",
        parallel=config.training.parallel,
    )
    folder = RunFolder(f"{job['store']}/runs/{run['run']}")
    if gang.is_main:
        folder.write(RUN_RECORD, b"{}")
    gang.barrier()
    work = Job(
        config=config,
        run_id=run["run"],
        run_uri=folder.uri,
        store=job["store"],
        dataset_digest=job["dataset"],
        dataset_reference="tokens",
    )
    recorder, stop = Recorder(), run.get("stop_after")

    def is_preempted() -> bool:
        return gang.is_main and stop is not None and recorder.step + 1 >= stop

    result: dict[str, Any] = {}
    worker = _Worker(work, gang, recorder if gang.is_main else None, is_preempted, time.time())
    try:
        result = worker.run().model_dump()
    except Interrupted as error:
        result = {"interrupted": str(error)}
    checkpoints = folder.sub("checkpoints")
    newest = CheckpointStore(checkpoints).committed()[-1]
    result["files"] = sorted(newest.manifest.files)
    result["history"] = History.from_parquet(checkpoints.read(f"{newest.name}/history.parquet") or b"").records
    return {**result, "records": recorder.records, "flops_per_row": worker._flops_per_row}


if __name__ == "__main__":
    main(lambda job, rank: partial(perform, job=job, rank=rank), needs_deepspeed=lambda job: True)
