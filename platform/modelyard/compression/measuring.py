"""Figures of one model on one engine, taken in a process of its own so that memory and CPU time are its alone.

Neighbours on the machine slow a model down and never make it faster. So source and result are timed in two passes, the
second of both right after one another (`Request.speed_only`), and of each figure of speed the better pass counts
(`best_speed`).
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

from modelyard.compression.engines import Engine, EngineName, open_engine
from modelyard.compression.recipe import Measuring
from modelyard.data.dataset import Dataset
from modelyard.errors import ConfigError, InputError, ModelyardError, WaitTimeoutError

_BATCH = 8
_SINGLE_ROWS = 200
"""Images or texts that a classifier answers one by one."""
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Figures:
    """What a model costs and how good it is."""

    engine: str
    size_bytes: int
    """Files that the engine reads."""
    quality: dict[str, float]
    """The task's metrics on the held-out rows."""
    latency_p50_ms: float
    """Of one token after the first, or of one image or text."""
    latency_p99_ms: float
    first_token_ms: float | None
    """Until the first token of a prompt; None for classifiers."""
    per_s: float
    """Tokens after the first, or images, per second."""
    per_cpu_s: float
    """The same per second of CPU time."""
    scored_per_cpu_s: float | None
    """Tokens, or images, that it reads per second of CPU time in batches of 8; None where another engine judged."""
    peak_memory_mib: float
    """Largest resident set of the process, from its start until the last answer; not while quality is measured."""


@dataclass(frozen=True)
class Request:
    """What to measure, as plain data for the process that does it."""

    folder: str
    engine: EngineName
    threads: int
    dataset: str
    split: str
    measuring: dict[str, Any]
    prepared: str | None = None
    """The file that `engines.prepare` made."""
    quality_engine: EngineName | None = None
    """Measure quality on another engine (llama.cpp gives no scores); None takes the same."""
    speed_only: bool = False
    """Leave `Figures.quality` empty."""


def check_threads(threads: int) -> None:
    """Refuse more threads than this machine can run.

    Raises:
        ConfigError: the setting, its value and the limit.
    """
    if threads > (most := os.cpu_count() or 1):
        raise ConfigError(
            f"target.threads: {threads} threads, but this machine has {most} CPU{'s' * (most > 1)}",
            f"set target.threads to at most {most}",
        )


def measure(request: Request, timeout_s: float) -> Figures:
    """Take the figures in a new process.

    Raises:
        InputError: the engine cannot run the model.
        WaitTimeoutError: it took longer than `timeout_s`.
    """
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(request.threads),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    command = [sys.executable, "-m", "modelyard.compression.measuring", json.dumps(asdict(request)), str(os.getpid())]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        raise WaitTimeoutError(f"figures on {request.engine}", timeout_s, "measuring.timeout_s") from None
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        problem = next((line for line in reversed(done.stderr.strip().splitlines()) if line.strip()), "no output")
        raise InputError(f"the model cannot be measured on {request.engine}: {problem}", "choose another target.engine")
    return Figures(**json.loads(lines[-1]))


def take(request: Request, engine: Engine | None = None) -> Figures:
    """Take the figures in this process; of `engine`, where one is open already."""
    dataset = Dataset.open(request.dataset)
    settings = Measuring.model_validate(request.measuring)
    folder = Path(request.folder)
    prepared = Path(request.prepared) if request.prepared is not None else None
    engine = engine or open_engine(request.engine, folder, request.threads, prepared)
    if dataset.info.format == "tokens":
        figures = _language(request.engine, engine, dataset, request.split, settings)
    else:
        figures = _classifier(request.engine, engine, dataset, request.split, settings)
    if request.speed_only:
        return figures
    if request.quality_engine is not None:
        engine = open_engine(request.quality_engine, folder, request.threads)
    found, seconds = quality(engine, folder, dataset, request.split, settings.rows)
    available = dataset.split(request.split).num_rows
    per_row = (dataset.info.block_tokens or 1) if dataset.info.format == "tokens" else 1
    read = min(settings.rows or available, available) * per_row
    return replace(figures, quality=found, scored_per_cpu_s=None if request.quality_engine else read / seconds)


def best_speed(first: Figures, second: Figures) -> Figures:
    """The first figures, with the better of the two for each figure of speed. Pure."""
    starts = [each.first_token_ms for each in (first, second) if each.first_token_ms is not None]
    return replace(
        first,
        latency_p50_ms=min(first.latency_p50_ms, second.latency_p50_ms),
        latency_p99_ms=min(first.latency_p99_ms, second.latency_p99_ms),
        first_token_ms=min(starts, default=None),
        per_s=max(first.per_s, second.per_s),
        per_cpu_s=max(first.per_cpu_s, second.per_cpu_s),
    )


def _language(name: str, engine: Engine, dataset: Dataset, split: str, settings: Measuring) -> Figures:
    rows = dataset.split(split)
    length = min(settings.prompt_tokens, max(1, (dataset.info.block_tokens or 2) // 2))
    tokens = max(2, min(settings.new_tokens, (dataset.info.block_tokens or 2) - length))  # the first is timed apart
    prompts = [
        rows.read(np.array([i % rows.num_rows]))["input_ids"][0, :length].tolist() for i in range(settings.repeats)
    ]
    engine.generate(prompts[0], min(4, tokens))  # first calls allocate
    first: list[float] = []
    each: list[float] = []
    cpu: list[float] = []
    for prompt in prompts:
        began = time.process_time()
        first.append(engine.generate(prompt, 1).prefill_s)
        short = time.process_time() - began
        began = time.process_time()
        each += engine.generate(prompt, tokens).token_s
        long = time.process_time() - began
        cpu.append((long - short) / (tokens - 1) if long > short else long / tokens)
    return Figures(
        engine=name,
        size_bytes=engine.weight_bytes,
        quality={},
        latency_p50_ms=1000 * float(np.percentile(each, 50)),
        latency_p99_ms=1000 * float(np.percentile(each, 99)),
        first_token_ms=1000 * float(np.median(first)),
        per_s=1 / float(np.mean(each)),
        per_cpu_s=1 / float(np.median(cpu)),
        scored_per_cpu_s=None,
        peak_memory_mib=peak_memory_mib(),
    )


def _classifier(name: str, engine: Engine, dataset: Dataset, split: str, settings: Measuring) -> Figures:
    rows = dataset.split(split)
    count = min(_SINGLE_ROWS, rows.num_rows)
    singles = _singles(rows.read(np.arange(count)))
    for single in singles[:20]:  # first calls allocate
        engine.scores(*single)
    seconds: list[float] = []
    cpu: list[float] = []
    for _ in range(settings.repeats):
        began = time.process_time()
        for single in singles:
            start = time.perf_counter()
            engine.scores(*single)
            seconds.append(time.perf_counter() - start)
        cpu.append((time.process_time() - began) / count)
    return Figures(
        engine=name,
        size_bytes=engine.weight_bytes,
        quality={},
        latency_p50_ms=1000 * float(np.percentile(seconds, 50)),
        latency_p99_ms=1000 * float(np.percentile(seconds, 99)),
        first_token_ms=None,
        per_s=1 / float(np.mean(seconds)),
        per_cpu_s=1 / float(np.median(cpu)),
        scored_per_cpu_s=None,
        peak_memory_mib=peak_memory_mib(),
    )


def _singles(columns: Mapping[str, npt.NDArray[Any]]) -> list[tuple[npt.NDArray[Any], npt.NDArray[np.int64] | None]]:
    """Rows one by one, as an engine takes them: an image, or a text without its padding and its mask."""
    if "pixels" in columns:
        return [(image[None], None) for image in columns["pixels"]]
    texts = []
    for ids, length in zip(columns["input_ids"], columns["length"], strict=True):
        tokens = ids[None, : max(1, int(length))].astype(np.int64)
        texts.append((tokens, np.ones_like(tokens)))
    return texts


class EngineModel:
    """An engine, callable as the tasks call a model."""

    def __init__(self, engine: Engine, config: Any = None) -> None:
        self._engine = engine
        self.config = config
        self.cpu_s = 0.0
        """CPU time of the engine so far."""

    def __call__(self, pixels: Any = None, *, input_ids: Any = None, attention_mask: Any = None, **_: Any) -> Any:
        import torch

        given = (pixels if input_ids is None else input_ids).numpy()
        mask = None if attention_mask is None else attention_mask.numpy()
        began = time.process_time()
        scores = self._engine.scores(given, mask)
        self.cpu_s += time.process_time() - began
        result = torch.from_numpy(scores)
        return result if input_ids is None else _Output(result)


@dataclass
class _Output:
    logits: Any


def quality(
    engine: Engine, folder: Path, dataset: Dataset, split: str, rows: int | None
) -> tuple[dict[str, float], float]:
    """The task's metrics of what the engine computes on the first rows of a split, and its CPU time in seconds."""
    from modelyard.compression.workspace import batches
    from modelyard.tasks import read_task

    task, info = read_task(folder)
    parts: list[dict[str, npt.NDArray[Any]]] = []
    model: Any = EngineModel(engine, SimpleNamespace(id2label=dict(enumerate(info.classes))))
    for batch in batches(task, dataset, split, rows, _BATCH):
        parts.append({name: value.numpy() for name, value in task.statistics(model, batch).items()})
    metrics = task.metrics({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})
    return metrics, float(model.cpu_s)


def peak_memory_mib() -> float:
    """Largest resident set of this process so far; of its own program, not of the one that started it."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _end_with(parent: int) -> None:
    """Leave no process that measures for nobody: it ends when its parent does, however that ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)


def main(arguments: Sequence[str]) -> int:
    """Measure what the JSON in the first argument asks for; prints the figures as JSON. The second names the parent."""
    _end_with(int(arguments[1]))
    try:
        print(json.dumps(asdict(take(Request(**json.loads(arguments[0]))))))  # noqa: T201
    except ModelyardError as error:
        print(str(error).replace("\n", " "), file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
