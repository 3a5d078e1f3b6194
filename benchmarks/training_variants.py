"""One worker process of one variant of `benchmarks/training.py`, which starts it and tells it when to run.

Every variant trains the same model on the same rows with the same optimizer, clips gradients to norm 1, and reads
its loss as a number at every step, as training scripts do to log it.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np

LEARNING_RATE, BETAS, WEIGHT_DECAY, CLIP, SEED = 3e-4, (0.9, 0.95), 0.1, 1.0, 0
ENDLESS = 1_000_000
"""Steps of each variant's schedule: more than any benchmark runs."""


class Gate:
    """Where a worker waits between rounds. The first step runs at once, then the parent asks for more."""

    def __init__(self, parent: Connection) -> None:
        self._parent = parent
        self._left = 0
        self._steps = 0
        self._began = self._cpu = 0.0
        self.split: dict[str, float] = {}
        """Seconds by part of the step; the variant adds to it, each round starts anew."""

    def before_step(self) -> None:
        """Called before every step; returns when it may begin."""
        if self._steps == 0:
            self._left = 1
        if self._left == 0:
            self._report()
            while (asked := self._parent.recv()) == "peak":
                self._parent.send(_peak())
            if asked == "end":
                os._exit(0)  # the other workers end likewise: no collective is left waiting
            self._left = asked
            self.split.clear()
            self._began, self._cpu = time.perf_counter(), time.process_time()
        self._left -= 1
        self._steps += 1

    def _report(self) -> None:
        self._parent.send(
            {
                "seconds": time.perf_counter() - self._began,
                "cpu_s": time.process_time() - self._cpu,
                "now": time.time(),
                "rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
                "split": dict(self.split),
            }
        )


class Stopwatch:
    """Books the time since its last call into the gate's split."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._last = time.perf_counter()

    def restart(self) -> None:
        """Forget the time until now."""
        self._last = time.perf_counter()

    def book(self, name: str) -> None:
        """Book the time since the last call under `name`."""
        now = time.perf_counter()
        self._gate.split[name] = self._gate.split.get(name, 0.0) + now - self._last
        self._last = now


def _peak() -> float:
    import torch

    from modelyard.observability.hardware import measured_matmul_flops

    return measured_matmul_flops(torch.device("cpu"), torch.float32, seconds=0.3)


def train_config(spec: dict[str, Any]) -> Any:
    """The run as a config of ours."""
    from modelyard.config import parse
    from modelyard.training import TrainConfig

    plain = {
        "name": "benchmark",
        "dataset": spec["dataset"],
        "task": {"kind": "causal_lm", "model": spec["model"]},
        "seed": SEED,
        "workers": {"min": spec["workers"], "max": spec["workers"], "cpus": spec["threads"]},
        "training": {
            "max_steps": spec.get("max_steps", ENDLESS),
            "global_batch_size": spec["batch"],
            "micro_batch_size": spec["batch"] // spec["workers"],
            "zero_stage": spec["zero_stage"],
            "gradient_clipping": CLIP,
        },
        "optimizer": {"kind": "adamw", "learning_rate": LEARNING_RATE, "betas": BETAS, "weight_decay": WEIGHT_DECAY},
        "checkpoint": {"every_s": None},
    }
    return parse(TrainConfig, plain)


# --- Modelyard ----------------------------------------------------------------------------------------------------


class _Reporter:
    """Stands in for the thread that sends records to the driver."""

    wish = None

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    def record(self, kind: str, values: dict[str, Any]) -> None:
        """Keep the step's split, which the loop has measured itself."""
        for name, value in values.items():
            if name.endswith("_s") and name.removesuffix("_s") in ("data", "forward", "backward", "optimizer"):
                key = name.removesuffix("_s")
                self._gate.split[key] = self._gate.split.get(key, 0.0) + value


def platform(spec: dict[str, Any], gate: Gate) -> None:
    """Modelyard's own loop and engine, put together as its worker does, without Ray around it."""
    _join_group(spec)
    import torch

    from modelyard.data.dataset import Dataset
    from modelyard.training.batching import plan
    from modelyard.training.checkpoints import CheckpointWriter, TrainState
    from modelyard.training.engine import Engine, import_deepspeed
    from modelyard.training.gang import Gang
    from modelyard.training.history import History
    from modelyard.training.loop import Parts, TrainLoop
    from modelyard.training.run_folder import RunFolder

    class PausingLoop(TrainLoop):
        """Waits at the gate before each step."""

        def _one_step(self, loader: Any, step: int) -> None:
            gate.before_step()
            super()._one_step(loader, step)

    rank, workers, config = spec["rank"], spec["workers"], train_config(spec)
    import_deepspeed().init_distributed(dist_init_required=False)
    gang = Gang(rank=rank, num_workers=workers, device=torch.device("cpu"))
    dataset = Dataset.open(Path(spec["dataset"]))
    torch.manual_seed(config.seed)
    model = config.task.build(dataset.info, dataset.folder)
    model.train()
    share = plan(config.training.global_batch_size, config.training.micro_batch_size, workers, rank)
    folder = Path(spec["scratch"])
    writer = CheckpointWriter(
        RunFolder(str(folder / "run")),
        rank=rank,
        num_workers=workers,
        attempt="benchmark",
        staging=folder / "staging",
        commit_timeout_s=60.0,
    )
    parts = Parts(
        config=config,
        gang=gang,
        plan=share,
        task=config.task,
        dataset=dataset,
        engine=Engine(model, config, share, num_workers=workers),
        writer=writer,
        history=History(),
        reporter=_Reporter(gate) if gang.is_main else None,  # type: ignore[arg-type]
        is_preempted=lambda: False,
        peak_flops=1.0,
    )
    state = TrainState(
        step=0, seed=SEED, epoch=0, position=0, num_workers=workers, zero_stage=config.training.zero_stage
    )
    PausingLoop(parts, state).run()


# --- what one would write by hand ---------------------------------------------------------------------------------


def handwritten(spec: dict[str, Any], gate: Gate) -> None:
    """DeepSpeed by hand: its engine, torch's fused AdamW, the model's own loss, batches from a memmap."""
    _join_group(spec)
    import deepspeed

    _no_shared_memory_operator()
    model = _model(spec)
    engine, _, _, _ = deepspeed.initialize(
        model=model,
        optimizer=_adamw(model),
        config=deepspeed_settings(spec, clip=CLIP),
        dist_init_required=False,
    )
    watch, batches = Stopwatch(gate), _batches(spec)
    while True:
        gate.before_step()
        watch.restart()
        tokens_BT = next(batches)
        watch.book("data")
        loss = engine(input_ids=tokens_BT, labels=tokens_BT, use_cache=False).loss
        watch.book("forward")
        engine.backward(loss)
        watch.book("backward")
        engine.step()
        loss.item()
        watch.book("optimizer")


def ddp(spec: dict[str, Any], gate: Gate) -> None:
    """The same without DeepSpeed: torch's DistributedDataParallel, no sharding."""
    _join_group(spec)
    import torch

    model = _model(spec)
    wrapped, optimizer = torch.nn.parallel.DistributedDataParallel(model), _adamw(model)
    watch, batches = Stopwatch(gate), _batches(spec)
    while True:
        gate.before_step()
        watch.restart()
        tokens_BT = next(batches)
        watch.book("data")
        loss = wrapped(input_ids=tokens_BT, labels=tokens_BT, use_cache=False).loss
        watch.book("forward")
        loss.backward()
        watch.book("backward")
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        watch.book("optimizer")


def hf_trainer(spec: dict[str, Any], gate: Gate) -> None:
    """Hugging Face's Trainer with its DeepSpeed integration."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    _environment(spec)
    _no_shared_memory_operator()

    class Pause(TrainerCallback):
        """Waits at the gate before each step."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            gate.before_step()

    class Rows(torch.utils.data.Dataset):
        """The memmap, row by row."""

        def __init__(self) -> None:
            self._rows = _memmap(spec)

        def __len__(self) -> int:
            return len(self._rows)

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            tokens_T = torch.from_numpy(self._rows[index].astype(np.int64))
            return {"input_ids": tokens_T, "labels": tokens_T}

    settings = deepspeed_settings(spec, clip="auto")
    per_worker = spec["batch"] // spec["workers"]
    arguments = TrainingArguments(
        output_dir=str(Path(spec["scratch"]) / "trainer"),
        use_cpu=True,
        per_device_train_batch_size=per_worker,
        max_steps=ENDLESS,
        learning_rate=LEARNING_RATE,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        weight_decay=WEIGHT_DECAY,
        max_grad_norm=CLIP,
        optim="adamw_torch_fused",
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=SEED,
        deepspeed=settings,
    )
    torch.set_num_threads(spec["threads"])
    with Path(os.devnull).open("w") as nowhere:
        sys.stdout = nowhere  # one line a step
        Trainer(model=_model(spec), args=arguments, train_dataset=Rows(), callbacks=[Pause()]).train()


def deepspeed_settings(spec: dict[str, Any], clip: float | str) -> dict[str, Any]:
    """A plain DeepSpeed config: its defaults but for what the run fixes."""
    return {
        "train_micro_batch_size_per_gpu": spec["batch"] // spec["workers"],
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip,
        "zero_optimization": {"stage": spec["zero_stage"]},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": ENDLESS,
    }


def _model(spec: dict[str, Any]) -> Any:
    import torch

    from modelyard.data.dataset import Dataset

    config = train_config(spec)
    torch.manual_seed(SEED)
    return config.task.build(Dataset.open(Path(spec["dataset"])).info, None).train()


def _adamw(model: Any) -> Any:
    import torch

    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, fused=True)


def _memmap(spec: dict[str, Any]) -> np.ndarray:
    return np.memmap(spec["memmap"], dtype=np.uint16, mode="r").reshape(-1, spec["block"])


def _batches(spec: dict[str, Any]) -> Iterator[Any]:
    """This worker's rows of each batch, in random order."""
    import torch

    rows, size = _memmap(spec), spec["batch"] // spec["workers"]
    dice = np.random.default_rng(SEED)
    while True:
        order = dice.permutation(len(rows))[spec["rank"] :: spec["workers"]]
        for at in range(0, len(order) - size + 1, size):
            yield torch.from_numpy(rows[order[at : at + size]].astype(np.int64))


def _environment(spec: dict[str, Any]) -> None:
    rank = str(spec["rank"])
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(spec["workers"])}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(spec["port"]), "GLOO_SOCKET_IFNAME": "lo"}


def _join_group(spec: dict[str, Any]) -> None:
    import torch

    _environment(spec)
    torch.set_num_threads(spec["threads"])
    torch.distributed.init_process_group("gloo")


def _no_shared_memory_operator() -> None:
    """A minute of compilation at the first start that training has no use for; off in every variant."""
    import logging

    from deepspeed.ops import __compatible_ops__

    __compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)


VARIANTS: dict[str, Callable[[dict[str, Any], Gate], None]] = {
    "platform": platform,
    "handwritten": handwritten,
    "hf_trainer": hf_trainer,
    "ddp": ddp,
}


def main() -> None:
    """python training_variants.py SPEC_JSON CONNECTION_FD"""
    spec = json.loads(sys.argv[1])
    VARIANTS[spec["variant"]](spec, Gate(Connection(int(sys.argv[2]))))


if __name__ == "__main__":
    main()
