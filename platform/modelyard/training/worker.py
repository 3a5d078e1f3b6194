"""What every worker of the gang runs: join, restore, train, and make a model of the result."""

from __future__ import annotations

import itertools
import logging
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from modelyard.artifacts.manifest import Parent
from modelyard.artifacts.store import Store
from modelyard.config import Config, parse, settings
from modelyard.data.dataset import Dataset
from modelyard.errors import StorageError
from modelyard.observability.hardware import peak_flops
from modelyard.training.batching import plan
from modelyard.training.checkpoints import (
    STAGING,
    TAG,
    Checkpoint,
    CheckpointStore,
    CheckpointWriter,
    TrainState,
    to_universal,
)
from modelyard.training.config import TrainConfig
from modelyard.training.deepspeed_config import check_written_by
from modelyard.training.engine import import_deepspeed
from modelyard.training.engines import TrainEngine, build_engine
from modelyard.training.gang import Gang
from modelyard.training.history import History
from modelyard.training.interrupts import note_place
from modelyard.training.loop import Parts, TrainLoop
from modelyard.training.monitor import Reporter
from modelyard.training.parallel import needs_conversion
from modelyard.training.retention import kept
from modelyard.training.run_folder import RunFolder
from modelyard.training.runs import RESULT, RUN_RECORD
from modelyard.training.validation import validate

logger = logging.getLogger(__name__)


class Job(Config):
    """All a worker must know, as plain data: it travels from the driver to every gang of the run."""

    config: TrainConfig
    run_id: str
    run_uri: str
    """Folder or URI of the run."""
    store: str
    dataset_digest: str
    dataset_reference: str
    bases: dict[str, str] = {}
    """Digest of each registered model the task starts from, by reference."""


class Trained(Config):
    """What a finished run leaves: written to the run's folder, and returned to the driver."""

    model_digest: str
    steps: int
    stopped_because: str
    model_step: int
    """The step the model was taken from: the last, or the best validation."""
    initial_metrics: dict[str, float]
    final_metrics: dict[str, float]
    elapsed_s: float


@dataclass(frozen=True)
class Restored:
    """A checkpoint made ready for this gang."""

    checkpoint: Checkpoint
    folder: Path
    is_universal: bool


def train_worker(payload: dict[str, Any]) -> dict[str, Any]:
    """Entry point on each worker under Ray Train. Returns `Trained` as plain data."""
    try:
        job, entered_s = parse(Job, payload["job"]), time.time()
        gang = _join(job.config)
        reporter = Reporter(payload["monitor"]) if gang.is_main else None
        return _Worker(job, gang, reporter, _is_preempted, entered_s).run().model_dump()
    except Exception as error:
        note_place(error)
        raise


def train_alone(job: Job, reporter: Reporter) -> Trained:
    """A whole run in this process, without Ray Train: for a gang of one that has to start fast.

    May be called again in the same process, with another job.
    """
    entered_s = time.time()
    try:
        return _Worker(job, _gang_of_one(job.config), reporter, lambda: False, entered_s).run()
    except Exception as error:
        note_place(error)
        raise


class _Worker:
    """One worker's life in one gang."""

    def __init__(
        self, job: Job, gang: Gang, reporter: Reporter | None, is_preempted: Callable[[], bool], entered_s: float
    ) -> None:
        self._marks = {"entered": entered_s}
        self._job = job
        self._config = job.config
        self._gang = gang
        self._is_preempted = is_preempted
        self._mark("joined")
        self._folder = RunFolder(job.run_uri)
        self._checkpoints = CheckpointStore(self._folder.sub("checkpoints"))
        self._reporter = reporter
        self._attempt = self._gang.from_main(uuid.uuid4().hex[:8])

    def run(self) -> Trained:
        """Train, then publish the model."""
        with ExitStack() as stack:
            if self._reporter is not None:
                stack.callback(self._reporter.close)
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="modelyard-")))
            self._check_shared_store()
            dataset, dataset_folder = self._open_dataset()
            self._mark("data")
            restored = self._restore(scratch, None)
            self._mark("checkpoint")
            engine = self._engine(dataset, dataset_folder, restored)
            self._mark("engine")
            writer = self._writer(stack)
            loop = TrainLoop(self._parts(dataset, engine, writer, restored), self._state(restored))
            self._announce(loop.state, restored, engine)
            loop.run()
            engine, model_step = self._best(loop.state, engine, dataset, dataset_folder, scratch)
            with engine.published() as model:
                trained = self._publish(loop, engine, model, model_step, dataset, dataset_folder, scratch)
            engine.close()
            return trained

    def _mark(self, name: str) -> None:
        self._marks[name] = time.time()

    def _store(self) -> Store:
        return Store(self._job.store, settings().cache)

    def _open_dataset(self) -> tuple[Dataset, Path]:
        """Fetch and verify once per node; every worker then maps the same files."""
        folder = self._gang.once_per_node(lambda: self._store().open("dataset", self._job.dataset_digest))
        return Dataset.open(folder), folder

    def _restore(self, scratch: Path, step: int | None) -> Restored | None:
        """The newest usable checkpoint (or that of `step`), converted when another number of workers wrote it."""
        gang, config = self._gang, self._config
        chosen: Checkpoint | None = None
        if gang.is_main:
            if step is None:
                chosen = self._checkpoints.newest_usable(scratch)
            else:
                chosen = next(c for c in reversed(self._checkpoints.committed()) if c.state.step == step)
        found = gang.from_main(chosen)
        if found is None:
            return None
        check_written_by(config, written_by=found.state.num_workers, num_workers=gang.num_workers)
        is_universal = needs_conversion(config, found.state, num_workers=gang.num_workers)

        def fetched() -> Path:
            verified = gang.is_main and step is None
            fetch = self._checkpoints.fetched if verified else self._checkpoints.fetch
            folder = fetch(found, scratch)
            if not is_universal:
                return folder
            target = scratch / f"universal-{found.state.step}"
            to_universal(folder, target)
            shutil.copy(folder / "history.parquet", target / "history.parquet")
            return target

        return Restored(found, gang.once_per_node(fetched), is_universal)

    def _engine(self, dataset: Dataset, dataset_folder: Path, restored: Restored | None) -> TrainEngine:
        config, gang = self._config, self._gang
        bases = gang.once_per_node(
            lambda: {name: self._store().open("model", digest) for name, digest in self._job.bases.items()}
        )
        torch.manual_seed(config.seed)
        model = config.task.with_bases(bases).build(dataset.info, dataset_folder)
        if config.training.activation_checkpointing:
            config.task.enable_activation_checkpointing(model)
        self._flops_per_row = config.task.flops_per_row(model)  # before it is cut into parts
        model.to(gang.device).train()
        is_universal = restored is not None and restored.is_universal
        engine = build_engine(model, config, self._plan(), gang, from_universal=is_universal)
        if restored is not None:
            engine.load(restored.folder, TAG)
        return engine

    def _plan(self) -> Any:
        training = self._config.training
        return plan(training.global_batch_size, training.micro_batch_size, self._gang.data_size, self._gang.data_rank)

    def _state(self, restored: Restored | None) -> TrainState:
        training = self._config.training
        now = {"num_workers": self._gang.num_workers, "zero_stage": training.zero_stage, "parallel": training.parallel}
        if restored is not None:
            return restored.checkpoint.state.with_changes(**now)
        return TrainState(step=0, seed=self._config.seed, epoch=0, position=0, **now)

    def _writer(self, stack: ExitStack) -> CheckpointWriter:
        local, is_pipeline = self._checkpoints.folder.local, self._config.training.parallel.pipeline > 1
        if local is not None:  # on the same disk, so that the upload is a rename
            if self._gang.is_main:
                self._checkpoints.clear_staging(self._attempt)
            staging = local / STAGING / f"{self._attempt}-{self._gang.node_id[:8]}"
            if is_pipeline:
                staging /= str(self._gang.rank)
        else:
            staging = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="modelyard-staging-")))
        writer = CheckpointWriter(
            self._checkpoints.folder,
            rank=self._gang.rank,
            num_workers=self._gang.num_workers,
            attempt=self._attempt,
            staging=staging,
            commit_timeout_s=self._config.checkpoint.commit_timeout_s,
            on_commit=self._on_commit,
            tensor=self._config.training.parallel.tensor,
            owns_staging=is_pipeline,
        )
        stack.callback(shutil.rmtree, staging, ignore_errors=True)
        stack.callback(writer.close)
        return writer

    def _on_commit(self, checkpoint: Checkpoint) -> None:
        """On worker 0's upload thread, after each commit."""
        self._checkpoints.prune(kept(self._checkpoints.committed(), checkpoint, self._config.checkpoint))
        if self._reporter is not None:
            self._reporter.record("checkpoint", {"step": checkpoint.state.step, "name": checkpoint.name})

    def _parts(
        self, dataset: Dataset, engine: TrainEngine, writer: CheckpointWriter, restored: Restored | None
    ) -> Parts:
        gang = self._gang
        peak = gang.sum([peak_flops(gang.device, self._config.training.precision)])[0]
        history = History()
        if restored is not None and gang.is_main:
            history = History.from_parquet(restored.folder / "history.parquet")
        return Parts(
            config=self._config,
            gang=gang,
            plan=self._plan(),
            task=self._config.task,
            dataset=dataset,
            engine=engine,
            writer=writer,
            history=history,
            reporter=self._reporter,
            is_preempted=self._is_preempted,
            peak_flops=peak,
            flops_per_row=self._flops_per_row,
        )

    def _announce(self, state: TrainState, restored: Restored | None, engine: TrainEngine) -> None:
        if self._reporter is None:
            return
        times = list(self._marks.items())
        self._reporter.record(
            "start",
            {
                "step": state.step,
                "num_workers": self._gang.num_workers,
                "universal": restored is not None and restored.is_universal,
                "parameters": engine.num_parameters,
                "entered_s": self._marks["entered"],
                **{f"{name}_s": at - before for (_, before), (name, at) in itertools.pairwise(times)},
            },
        )

    def _best(
        self, state: TrainState, engine: TrainEngine, dataset: Dataset, dataset_folder: Path, scratch: Path
    ) -> tuple[TrainEngine, int]:
        """The engine with the weights that become the model: those of the best validation, or the last."""
        best = state.best_step
        if not self._config.checkpoint.keep_best or best is None or best == state.step:
            return engine, state.step
        engine.close()
        restored = self._restore(scratch, best)
        return self._engine(dataset, dataset_folder, restored), best

    def _publish(
        self,
        loop: TrainLoop,
        engine: TrainEngine,
        model: torch.nn.Module,
        model_step: int,
        dataset: Dataset,
        dataset_folder: Path,
        scratch: Path,
    ) -> Trained:
        config, gang, state = self._config, self._gang, loop.state
        metrics: dict[str, float] = {}
        split = config.validation.final_of(dataset.info.splits)
        if split is not None:
            metrics = validate(
                config.task,
                model,
                dataset.split(split),
                gang,
                batch_size=config.training.micro_batch_size,
                max_rows=config.validation.max_rows,
            )
        weights = None if engine.is_whole else engine.full_state()
        trained: Trained | None = None
        if gang.is_main:
            folder = scratch / "model"
            config.task.save(engine.module, folder, dataset_folder, weights)
            final = {f"{split}/{name}": value for name, value in metrics.items()}
            manifest = self._store().put(
                folder,
                kind="model",
                name=config.name,
                parents=tuple(
                    Parent(reference=reference, digest=digest)
                    for reference, digest in {
                        self._job.dataset_reference: self._job.dataset_digest,
                        **self._job.bases,
                    }.items()
                ),
                metrics=final,
                config=config.model_dump(mode="json"),
            )
            trained = Trained(
                model_digest=manifest.digest(),
                steps=state.step,
                stopped_because=loop.stopped_because,
                model_step=model_step,
                initial_metrics=state.initial_metrics,
                final_metrics=metrics,
                elapsed_s=state.elapsed_s,
            )
            self._folder.write(RESULT, trained.model_dump_json(indent=1).encode())
        trained = gang.from_main(trained)
        assert trained is not None
        return trained

    def _check_shared_store(self) -> None:
        """Every node must see the run's folder that the driver made."""
        if self._folder.read(RUN_RECORD) is None:
            raise StorageError(
                f"the store {self._job.store} is not visible on node {self._gang.node_id}",
                "set MODELYARD_STORE to an object store (s3://bucket/prefix) or to a folder that all nodes share",
            )


def _gang_of_one(config: TrainConfig) -> Gang:
    """A gang that is this process alone, on its first GPU if it asks for one, and DeepSpeed ready for it."""
    import ray
    import torch.distributed as dist

    if config.workers.gpus == 0:
        torch.set_num_threads(max(1, int(config.workers.cpus)))
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it; Ray Train sets it in gangs
    import_deepspeed().init_distributed(dist_init_required=False)
    device = torch.device("cuda", 0) if config.workers.gpus > 0 else torch.device("cpu")
    node_id = ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""
    return Gang(rank=0, num_workers=1, device=device, node_id=node_id, parallel=config.training.parallel)


def _join(config: TrainConfig) -> Gang:
    """This worker's place in the gang that Ray Train has formed, and DeepSpeed on top of its process group."""
    import ray
    import ray.train
    import ray.train.torch

    context = ray.train.get_context()
    if config.workers.gpus == 0:
        torch.set_num_threads(max(1, int(config.workers.cpus)))
    import_deepspeed().init_distributed(dist_init_required=False)
    return Gang(
        rank=context.get_world_rank(),
        num_workers=context.get_world_size(),
        device=ray.train.torch.get_device(),
        node_id=ray.get_runtime_context().get_node_id(),
        parallel=config.training.parallel,
    )


def _is_preempted() -> bool:
    """Whether Ray Train has told this worker of a drained node.

    Reads the signal itself: the public `ray.train.get_preemption_info` makes all workers meet at an actor, which
    is too slow for every step; the loop has its own all-reduce for agreeing.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    return get_train_context().preemption_context.preemption_info is not None


# Ray Train hands workers the driver's environment; a Tokenizers fork warning or thread storm helps nobody.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
