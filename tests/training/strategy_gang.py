"""One worker of a gang without Ray that trains whole runs with `TrainLoop`, for test_strategies.py.

    python -m tests.training.strategy_gang JOB.json RANK

JOB.json holds `workers`, `port`, `dataset`, `out` and `runs`: each run a `name`, a TrainConfig (`config`) and what to
do with it: `stop` (steps after which it is cut off, with its newest checkpoint left behind), `from` (name of the run
whose newest checkpoint it continues), `slow` (rank and seconds that it sleeps in every forward pass). Worker 0 writes
OUT/<name>.json: what the run measured, or the error it ended with.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tests.training.gangs import Job, Run, main

from modelyard.config import parse
from modelyard.data.dataset import Dataset
from modelyard.training import TrainConfig
from modelyard.training.batching import plan
from modelyard.training.checkpoints import TAG, Checkpoint, CheckpointStore, CheckpointWriter, TrainState
from modelyard.training.engines import build_engine
from modelyard.training.gang import Gang
from modelyard.training.history import History
from modelyard.training.interrupts import Interrupted
from modelyard.training.loop import Parts, TrainLoop
from modelyard.training.run_folder import RunFolder
from modelyard.training.validation import validate


class Recorder:
    """Stands in for the thread that sends records to the driver; may ask for a stop as the driver does."""

    wish = None

    def __init__(self, stop: int | None) -> None:
        self._stop = stop

    def record(self, kind: str, values: dict[str, Any]) -> None:
        """The history keeps them."""

    def at_boundary(self, step: int) -> None:
        """Ask the gang to make way."""
        if step == self._stop:
            self.wish = ("resize", "the test wants it")


class SlowModel(torch.nn.Module):
    """Computes as the model inside, after a sleep."""

    def __init__(self, inner: torch.nn.Module, seconds: float) -> None:
        super().__init__()
        self.inner, self._seconds = inner, seconds

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """Sleep while training, then compute."""
        if self.training:
            time.sleep(self._seconds)
        return self.inner(*arguments, **named)


def perform(run: dict[str, Any], gang: Gang, dataset: Dataset, out: Path) -> dict[str, Any]:
    """Train one run to its end or its interruption."""
    config = parse(TrainConfig, run["config"])
    training = config.training
    own = plan(training.global_batch_size, training.micro_batch_size, gang.num_workers, gang.rank)
    torch.manual_seed(config.seed)
    engine = build_engine(config.task.build(dataset.info, None).train(), config, own, gang)
    state, history = start(run, gang, out, engine.load)
    committed: list[Checkpoint] = []
    writer = CheckpointWriter(
        RunFolder(str(out / run["name"])),
        rank=gang.rank,
        num_workers=gang.num_workers,
        attempt="0" * 8,
        staging=out / f"{run['name']}-staging",
        commit_timeout_s=60.0,
        on_commit=committed.append,
    )
    parts = Parts(
        config=config,
        gang=gang,
        plan=own,
        task=config.task,
        dataset=dataset,
        engine=engine,
        writer=writer,
        history=history,
        reporter=Recorder(run.get("stop")) if gang.is_main else None,  # type: ignore[arg-type]
        is_preempted=lambda: False,
        peak_flops=1.0,
        flops_per_row=1.0,
    )
    loop = TrainLoop(parts, state)
    slow = run.get("slow")
    if slow and slow[0] == gang.rank:
        loop._model = SlowModel(loop._model, slow[1])
    computed = counted(engine)
    began = time.monotonic()
    try:
        loop.run()
    except Interrupted as interrupted:
        reason = str(interrupted)
    else:
        reason = loop.stopped_because
    seconds = time.monotonic() - began
    with engine.published() as model:
        metrics = validate(config.task, model, dataset.split("test"), gang, batch_size=8)
        weights = {name: value.tolist() for name, value in engine.full_state().items() if value.numel() < 40}
    replica = float(sum(p.detach().double().sum() for p in engine.module.parameters()))
    engine.close()
    return {
        "reason": reason,
        "step": loop.state.step,
        "losses": [loss for _, loss in history.series("loss")],
        "norms": [norm for _, norm in history.series("grad_norm")],
        "noise": [noise for _, noise in history.series("gradient_variance")],
        "sent": [sent for _, sent in history.series("sent_bytes")],
        "validation": history.series("validation_loss"),
        "samples": [sample for record in history.records for sample in record.get("samples", [])],
        "checkpoints": [checkpoint.state.step for checkpoint in committed],
        "parameters": engine.num_parameters,
        "seconds": seconds,
        "metrics": metrics,
        "weights": weights,
        "replicas": gang.gather(replica),
        "rows": gang.gather(computed[0]),
        "lacking": max(gang.gather(computed[1])),
    }


def counted(engine: Any) -> list[int]:
    """The number of rows that this worker computes from now on, and the most steps its weights lacked (servers)."""
    box, inner = [0, 0], engine.backward

    def backward(row_losses_b: torch.Tensor, **named: Any) -> None:
        box[0] += len(row_losses_b)
        if hasattr(engine, "_version"):
            box[1] = max(box[1], engine._steps - engine._version)
        inner(row_losses_b, **named)

    engine.backward = backward
    return box


def start(run: dict[str, Any], gang: Gang, out: Path, load: Callable[[Path, str], None]) -> tuple[TrainState, History]:
    """Where the run begins: anew, or at the newest checkpoint of another."""
    if "from" not in run:
        now = {"num_workers": gang.num_workers, "zero_stage": 0}
        return TrainState(step=0, seed=run["config"].get("seed", 0), epoch=0, position=0, **now), History()
    checkpoints = CheckpointStore(RunFolder(str(out / run["from"])))
    newest = checkpoints.committed()[-1]
    folder = checkpoints.fetch(newest, out)
    load(folder, TAG)
    history = History.from_parquet(folder / "history.parquet")
    return newest.state.with_changes(num_workers=gang.num_workers), history


def prepare(job: Job, rank: int) -> Callable[[Run], Any]:
    """What does a run of this gang."""
    gang = Gang(rank=rank, num_workers=job["workers"], device=torch.device("cpu"))
    return partial(perform, gang=gang, dataset=Dataset.open(Path(job["dataset"])), out=Path(job["out"]))


def uses_all_reduce(job: Job) -> bool:
    """Whether a run of the job is DeepSpeed's."""
    return any(run["config"]["training"]["strategy"]["kind"] == "all_reduce" for run in job["runs"])


if __name__ == "__main__":
    main(prepare, needs_deepspeed=uses_all_reduce)
