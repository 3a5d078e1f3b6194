"""From a registered artifact to a model that answers: what is known of it before, and how it is loaded."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from modelyard.artifacts.registry import Registry
from modelyard.config import settings
from modelyard.errors import InputError
from modelyard.serving.engines.batch import BatchEngine
from modelyard.serving.engines.choice import Candidate, Choice, EngineName, Machine, choose
from modelyard.serving.engines.memory import MIB
from modelyard.serving.export import write_gguf
from modelyard.serving.language import LanguageModel
from modelyard.serving.protocol import ServedModel
from modelyard.serving.server_config import ModelConfig
from modelyard.tasks import load_model, read_task
from modelyard.tasks.generation import has_tokenizer, load_tokenizer, token_bytes
from modelyard.tasks.language_models import read_config
from modelyard.tasks.lora import ADAPTER_FOLDER

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger(__name__)
_WEIGHT_BYTES = {"transformers": 4.0, "openvino": 1.07}
"""Bytes of a weight in memory: fp32 on a CPU, Q8_0."""


@dataclass(frozen=True)
class Entry:
    """A model that can be loaded."""

    config: ModelConfig
    served: ServedModel
    choice: Choice
    folder: Path
    """Its files, every byte verified."""
    digest: str
    size_bytes: int
    """Memory that it will take."""


def describe(config: ModelConfig, registry: Registry, machine: Machine) -> Entry:
    """Fetch and verify a model's files and choose its engine; loads no weights.

    Raises:
        ConfigError, MissingExtraError: the engine that is asked for cannot run it.
        InputError: a language model has no tokenizer.
        NotFoundError, IntegrityError, UnsafeFileError, StorageError: as for `Registry.open` and `read_task`.
    """
    info, folder = registry.open(config.reference, "model")
    task, _ = read_task(folder)
    is_language = task.kind == "causal_lm"
    plain: Mapping[str, Any] = {}
    byte_level = True
    if is_language:
        plain = read_config(folder)
        if not has_tokenizer(folder):
            raise InputError(f"{info.reference} has no tokenizer, so it cannot answer in text", "train it on text")
        byte_level = token_bytes(load_tokenizer(folder)) is not None
    candidate = Candidate(task.kind, plain, byte_level, (folder / ADAPTER_FOLDER).is_dir())
    choice = choose(candidate, machine, None if config.engine == "auto" else config.engine)
    weights = sum(_count_weights(path) for path in sorted(folder.glob("*.safetensors")))
    size = round(weights * _WEIGHT_BYTES.get(choice.engine, 4.0)) + (config.cache_mib * MIB if is_language else 0)
    served = ServedModel(
        name=config.name or info.name,
        reference=info.reference,
        task=task.kind,
        engine=choice.engine,
        created_s=round(datetime.fromisoformat(info.created_at).timestamp()),
        context_tokens=(config.context_tokens or plain.get("max_position_embeddings")) if is_language else None,
        features=_features(choice.engine),
    )
    return Entry(config, served, choice, folder, info.digest, size)


def load(entry: Entry, threads: int | None) -> LanguageModel | Classifier:
    """Load weights and start the engine; takes seconds to minutes, so call it on a thread.

    Raises:
        CapacityError: a sequence of the context does not fit into the cache.
        InputError: the engine refuses the model.
    """
    started = time.monotonic()
    model = _classifier(entry) if entry.choice.engine == "batch" else _language(entry, threads)
    seconds = time.monotonic() - started
    log.info("%s: %s, %s; loaded in %.1f s", entry.served.name, entry.choice.engine, entry.choice.reason, seconds)
    return model


def _features(engine: EngineName) -> frozenset[str]:
    """What callers may ask of a model on this engine; none of the engines' packages is imported."""
    if engine == "vllm":
        from modelyard.serving.engines.vllm import VLLMEngine

        return frozenset(VLLMEngine.features)
    if engine == "openvino":
        from modelyard.serving.engines.openvino import OpenVINOCore

        return frozenset(OpenVINOCore.features)
    if engine == "transformers":
        from modelyard.serving.engines.transformers import TransformersCore

        return frozenset(TransformersCore.features | {"embeddings"})
    return frozenset()


class Classifier:
    """A model of a task that answers in one pass."""

    def __init__(self, batch: BatchEngine) -> None:
        self.batch = batch

    async def close(self) -> None:
        """Free its thread and its weights."""
        await self.batch.close()


def _classifier(entry: Entry) -> Classifier:
    task, model = load_model(entry.folder)
    config = entry.config
    return Classifier(
        BatchEngine(
            lambda inputs: task.predict(model, [_channels_first(item) for item in inputs]),
            max_batch=config.max_batch,
            max_wait_ms=config.max_wait_ms,
            max_queue=config.max_batch + config.max_waiting,
        )
    )


def _channels_first(image: Any) -> Any:
    """(H, W) or (H, W, C) as the tasks want it: (C, H, W)."""
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0) if pixels.ndim == 3 else pixels


def _language(entry: Entry, threads: int | None) -> LanguageModel:
    config, folder = entry.config, entry.folder
    tokenizer = load_tokenizer(folder)
    vocab_tokens = max(tokenizer.get_vocab().values()) + 1
    options: dict[str, Any] = {
        "eos_ids": end_ids(folder, tokenizer),
        "context_tokens": config.context_tokens,
        "max_sequences": config.max_sequences,
    }
    engine: Any
    if entry.choice.engine == "vllm":
        from modelyard.serving.engines.vllm import VLLMEngine

        engine = VLLMEngine(
            folder, vocab_tokens=vocab_tokens, gpu_memory_share=config.gpu_memory_share, gpus=config.gpus, **options
        )
    elif entry.choice.engine == "openvino":
        from modelyard.serving.engines.openvino import openvino_engine

        engine = openvino_engine(gguf_file(entry), folder, cache_mib=config.cache_mib, threads=threads, **options)
    else:
        from modelyard.serving.engines.transformers import transformers_engine

        engine = transformers_engine(
            _merged(folder), vocab_tokens=vocab_tokens, cache_mib=config.cache_mib, threads=threads, **options
        )
    return LanguageModel(entry.served.name, tokenizer, engine, max_sequences=config.max_sequences + config.max_waiting)


def gguf_file(entry: Entry) -> Path:
    """The model's weights as GGUF: its own export, or made once per machine and kept in the cache by its digest."""
    own = entry.folder / "gguf" / "model.gguf"
    if own.is_file():
        return own
    target = settings().cache / "gguf" / f"{entry.digest.removeprefix('sha256:')}-q8_0.gguf"
    if not target.exists():
        write_gguf(_merged(entry.folder), entry.folder, target)
    return target


def end_ids(folder: Path, tokenizer: Any) -> frozenset[int]:
    """Tokens that end an answer, by the generation config, the model's config, and the tokenizer."""
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            given = json.loads((folder / name).read_text(encoding="utf-8")).get("eos_token_id")
            found |= set(given) if isinstance(given, list) else {given}
    return frozenset(found | {tokenizer.eos_token_id}) - {None}


def _merged(folder: Path) -> nn.Module:
    """The model in fp32 on a CPU (16-bit arithmetic is slower there), with its adapter merged, on the GPU if any."""
    import torch

    model: Any = load_model(folder)[1]
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    result: nn.Module = model.cuda() if torch.cuda.is_available() else model.float()
    return result.eval()


def _count_weights(path: Path) -> int:
    """Numbers in a safetensors file, by its header."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    sizes = {name: int(np.prod(entry["shape"])) for name, entry in header.items() if name != "__metadata__"}
    return sum(size * (8 if name.endswith(".weight_packed") else 1) for name, size in sizes.items())
