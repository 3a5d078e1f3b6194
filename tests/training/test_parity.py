"""ZeRO 0 to 3 on 1 and on 2 workers train exactly what a plain torch loop trains."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from modelyard.artifacts.store import Store
from modelyard.data.dataset import Dataset
from modelyard.data.order import SampleOrder
from modelyard.training import TrainConfig
from modelyard.training.checkpoints import CheckpointStore
from modelyard.training.history import History
from modelyard.training.run_folder import RunFolder
from modelyard.training.runs import RUN_RECORD
from modelyard.training.schedule import rate_factor
from modelyard.training.worker import Job, train_worker

TOLERANCE = 2e-5
"""Largest difference of a step's loss in nats, fp32, after 12 steps; losses are about 4."""


def plain_losses(config: TrainConfig, folder: Path) -> tuple[list[float], list[int]]:
    """Losses and sample ids of each step of a loop that knows neither DeepSpeed nor Ray."""
    dataset, size = Dataset.open(folder), config.training.global_batch_size
    split = dataset.split("train")
    torch.manual_seed(config.seed)
    model = config.task.build(dataset.info, folder).train()
    decays = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    adam = config.optimizer
    optimizer = torch.optim.AdamW(
        [{"params": decays, "weight_decay": adam.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=adam.learning_rate,
        betas=adam.betas,
    )
    losses, samples = [], []
    for step in range(config.training.max_steps):
        stream = np.arange(step * size, (step + 1) * size)
        epochs, positions = np.divmod(stream, split.num_rows)
        order = SampleOrder(split.num_rows, config.seed)
        rows = np.array([order.rows(int(e), np.array([p]))[0] for e, p in zip(epochs, positions, strict=True)])
        for group in optimizer.param_groups:
            group["lr"] = adam.learning_rate * rate_factor(config.schedule, step, config.training.max_steps)
        loss = config.task.loss(model, config.task.collate(split.read(rows), "cpu")).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.training.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        samples.extend((epochs * split.num_rows + rows).tolist())
    return losses, samples


def run_all(payload: dict[str, Any]) -> None:
    """On each worker: several jobs one after another in the same gang."""
    for job in payload["jobs"]:
        train_worker({"job": job, "monitor": payload["monitor"]})


@pytest.mark.ray
@pytest.mark.parametrize("num_workers", [1, 2])
def test_every_zero_stage_follows_the_plain_loop(
    ray_cluster: str,
    token_config: Callable[..., TrainConfig],
    token_folder: Path,
    tmp_path: Path,
    num_workers: int,
) -> None:
    import ray

    from modelyard.training.monitor import start_monitor
    from modelyard.training.trainer import trainer

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    store = Store.from_settings()
    digest = store.put(token_folder, kind="dataset", name="tokens").digest()
    jobs = []
    for stage in range(4):
        config = token_config(workers=num_workers, training={"zero_stage": stage})
        folder = RunFolder(f"{store.uri}/runs/stage-{stage}")
        folder.write(RUN_RECORD, b"{}")
        job = Job(
            config=config,
            run_id=f"stage-{stage}",
            run_uri=folder.uri,
            store=store.uri,
            dataset_digest=digest,
            dataset_reference="tokens",
        )
        jobs.append(job.model_dump(mode="json"))
    monitor = start_monitor(f"parity-{num_workers}")
    trainer(run_all, {"jobs": jobs, "monitor": monitor}, config, monitor=monitor, storage_uri=str(tmp_path)).fit()

    expected, samples = plain_losses(config, token_folder)
    assert expected[-1] < expected[0] - 0.3, "the model must learn, else equal losses show nothing"
    for stage in range(4):
        history = _history(RunFolder(f"{store.uri}/runs/stage-{stage}"))
        losses = [loss for _, loss in history.series("loss")]
        consumed = [sample for record in history.records for sample in record.get("samples", [])]
        assert consumed == samples
        assert losses == pytest.approx(expected, abs=TOLERANCE), f"ZeRO-{stage} on {num_workers} workers"


def _history(folder: RunFolder) -> History:
    checkpoints = folder.sub("checkpoints")
    newest = CheckpointStore(checkpoints).committed()[-1]
    data = checkpoints.read(f"{newest.name}/history.parquet")
    assert data is not None
    return History.from_parquet(data)
