"""Generated tokens per CPU-second of each engine at 1 and at 16 streams, on one model folder, with one thread.

    python benchmarks/engines.py MODEL_FOLDER [--quick] [--json FILE]

CPU-seconds are those of the whole process, so that other work on the machine matters little; engines run one after the
other, each in a process of its own. `hf_*` are plain transformers: one by one, and a padded batch; `hf_continuous` is
its own continuous batching, with a bounded cache.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STREAMS = 16
CACHE_MIB = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), default=list(ENGINES))
    options = parser.parse_args()
    tokens, repeats = (24, 1) if options.quick else (64, 3)
    figures: dict[str, float] = {}
    print(f"{'engine':16}{'1 stream':>10}{'16 streams':>12}{'RSS MiB':>10}{'load s':>8}   (tokens per CPU-second)")
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for name in options.engines:
            found = pool.apply(measure, (name, options.folder, tokens, repeats))
            figures |= {f"{name}_{key}": value for key, value in found.items()}
            print(f"{name:16}{found['1']:10.1f}{found['16']:12.1f}{found['rss_mib']:10.0f}{found['load_s']:8.1f}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


def measure(name: str, folder: Path, tokens: int, repeats: int) -> dict[str, float]:
    """The median of `repeats` runs, after a warm-up."""
    import torch

    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    prompts = _prompts(folder)
    started = time.monotonic()
    run, close = ENGINES[name](folder, tokens)
    run(prompts[:1])
    load_s = time.monotonic() - started
    found: dict[str, float] = {"load_s": load_s}
    for streams in (1, STREAMS):
        rates = []
        for _ in range(repeats):
            before = time.process_time()
            made = run(prompts[:streams])
            rates.append(made / (time.process_time() - before))
        found[str(streams)] = sorted(rates)[len(rates) // 2]
    found["rss_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    close()
    return found


Run = Callable[[list[list[int]]], int]


def _modelyard(engine: Any, tokens: int) -> tuple[Run, Callable[[], None]]:
    from modelyard.serving.protocol import EngineRequest, Sampling

    async def one(prompt: list[int]) -> int:
        sampling = Sampling(max_tokens=tokens, temperature=0)
        return sum([len(part.ids) async for part in engine.stream(EngineRequest("r", prompt, sampling))])

    async def all_of(prompts: list[list[int]]) -> int:
        return sum(await asyncio.gather(*(one(prompt) for prompt in prompts)))

    return lambda prompts: asyncio.run(all_of(prompts)), lambda: asyncio.run(engine.close())


def _transformers(folder: Path, tokens: int) -> tuple[Run, Callable[[], None]]:
    from modelyard.serving.engines.transformers import transformers_engine

    return _modelyard(transformers_engine(_model(folder), cache_mib=CACHE_MIB, threads=1), tokens)


def _openvino(folder: Path, tokens: int) -> tuple[Run, Callable[[], None]]:
    from modelyard.serving.engines.openvino import openvino_engine
    from modelyard.serving.export import write_gguf

    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "model.gguf"
        write_gguf(_model(folder), folder, file)
        return _modelyard(openvino_engine(file, folder, cache_mib=CACHE_MIB, threads=1), tokens)


def _hf_generate(folder: Path, tokens: int) -> tuple[Run, Callable[[], None]]:
    import torch

    model = _model(folder)

    def run(prompts: list[list[int]]) -> int:
        made = 0
        for prompt in prompts:
            ids = torch.tensor([prompt])
            out = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens
            )
            made += out.shape[1] - ids.shape[1]
        return made

    return run, lambda: None


def _hf_static(folder: Path, tokens: int) -> tuple[Run, Callable[[], None]]:
    import torch

    model = _model(folder)

    def run(prompts: list[list[int]]) -> int:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens)
        return (out.shape[1] - longest) * len(prompts)

    return run, lambda: None


def _hf_continuous(folder: Path, tokens: int) -> tuple[Run, Callable[[], None]]:
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model = _model(folder)
    config = ContinuousBatchingConfig(page_size=32, num_blocks=128, max_batch_tokens=256)
    generation = GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=-1)
    manager = model.init_continuous_batching(generation, continuous_batching_config=config)
    manager.start()

    def run(prompts: list[list[int]]) -> int:
        manager.add_requests(prompts, max_new_tokens=tokens)
        left, made = len(prompts), 0
        while left:
            result = manager.get_result(timeout=60)
            if result is not None and result.is_finished():
                left, made = left - 1, made + len(result.generated_tokens)
        return made

    return run, lambda: manager.stop(block=True, timeout=10)


def _model(folder: Path) -> Any:
    from modelyard.tasks.language_models import load_folder

    return load_folder(folder).float().eval()


def _prompts(folder: Path) -> list[list[int]]:
    from modelyard.tasks.generation import load_tokenizer

    tokenizer = load_tokenizer(folder)
    return [
        tokenizer(f"Story {number}: once upon a time, in a small town by the sea,").input_ids for number in range(16)
    ]


ENGINES: dict[str, Callable[[Path, int], tuple[Run, Callable[[], None]]]] = {
    "transformers": _transformers,
    "openvino": _openvino,
    "hf_generate": _hf_generate,
    "hf_static": _hf_static,
    "hf_continuous": _hf_continuous,
}

if __name__ == "__main__":
    main()
