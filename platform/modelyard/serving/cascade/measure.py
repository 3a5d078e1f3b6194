"""Calibrate a cascade of two registered models, which are served in this process for as long as it takes."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import ValidationError

from modelyard.artifacts import Parent, Registry, VersionInfo
from modelyard.config import Config, parse
from modelyard.errors import ConfigError, DataError, NotFoundError, StorageError
from modelyard.serving.cascade.calibration import Observations, calibrate, require_rows
from modelyard.serving.cascade.collect import observe_generations, observe_predictions
from modelyard.serving.cascade.records import Calibration, Score, Target
from modelyard.serving.model_server import ModelServer
from modelyard.serving.protocol import Backend, Generation, Sampling
from modelyard.serving.server_config import ServerConfig
from modelyard.tasks import read_task

Judge = Literal["exact", "contains"]


class Example(Config):
    """A line of an examples file: a prompt or a chat, and the right answer."""

    prompt: str | None = None
    messages: tuple[dict[str, Any], ...] | None = None
    answer: str


def calibrate_classifiers(
    registry: Registry, small: str, large: str, *, dataset: str, split: str, target: Target, seed: int = 0
) -> Calibration:
    """Two image classifiers, on every row of a dataset's split.

    Raises:
        DataError: the split does not exist, was trained on, has too few rows, or a model knows other classes.
        ConfigError: a model is no image classifier.
        NotFoundError, IntegrityError, StorageError: as for `Registry.open`.
    """
    from modelyard.data.dataset import Dataset

    data_info, data_folder = registry.open(dataset, "dataset")
    data = Dataset.open(data_folder)
    held_out = data.split(split)
    models = [registry.open(reference, "model") for reference in (small, large)]
    for info, folder in models:
        task, trained = read_task(folder)
        if task.kind != "image_classification":
            raise ConfigError(f"{info.reference} is for {task.kind}", "give --examples for models of text")
        task.check_saved(folder, trained, data.info, data_folder)
        _require_unseen(registry, info, data_info, split)
    require_rows(held_out.num_rows // 2, target)
    rows = held_out.read(np.arange(held_out.num_rows, dtype=np.int64))
    images = [image[0] if len(image) == 1 else image.transpose(1, 2, 0) for image in rows["pixels"]]
    labels = [int(label) for label in rows["label"]]

    async def observe(backend: Backend) -> Observations:
        return await observe_predictions(backend, "small", "large", images, labels)

    seen, engine = asyncio.run(_observed(registry, models[0][0], models[1][0], "auto", observe))
    return calibrate(
        seen,
        score=Score(kind="probability"),
        target=target,
        small=_parent(models[0][0]),
        large=_parent(models[1][0]),
        dataset=_parent(data_info),
        split=split,
        small_engine=engine,
        seed=seed,
    )


def calibrate_texts(
    registry: Registry,
    small: str,
    large: str,
    *,
    examples: Path,
    score: Score,
    target: Target,
    sampling: Sampling,
    judge: Judge = "contains",
    engine: str = "auto",
    seed: int = 0,
) -> Calibration:
    """Two language models, on the examples of a file with one JSON object a line (`Example`).

    Args:
        registry: knows the models.
        small: reference of the model at the site.
        large: reference of the model in the cloud.
        examples: the file.
        score: how confidence is taken.
        target: what is promised.
        sampling: how callers will ask; the promise is for that.
        judge: an answer is right when it is the example's (`exact`) or holds it (`contains`), in any case of letters.
        engine: what both models run on; take what the site will use.
        seed: halves the examples.

    Raises:
        DataError: a line is no example, or there are too few.
        NotFoundError, IntegrityError, StorageError: as for `Registry.open`.
    """
    digest, found = _examples(examples)
    require_rows(len(found) // 2, target)
    calls = [_call(number, example, sampling) for number, example in enumerate(found)]

    def is_right(number: int, text: str) -> bool:
        given, wanted = _plain(text), _plain(found[number].answer)
        return given == wanted if judge == "exact" else wanted in given

    async def observe(backend: Backend) -> Observations:
        return await observe_generations(backend, "small", "large", score, calls, is_right)

    versions = [registry.resolve(reference, "model") for reference in (small, large)]
    seen, ran_on = asyncio.run(_observed(registry, versions[0], versions[1], engine, observe))
    return calibrate(
        seen,
        score=score,
        target=target,
        small=_parent(versions[0]),
        large=_parent(versions[1]),
        dataset=Parent(reference=examples.name, digest=digest),
        small_engine=ran_on,
        seed=seed,
    )


async def _observed(
    registry: Registry,
    small: VersionInfo,
    large: VersionInfo,
    engine: str,
    observe: Callable[[Backend], Awaitable[Observations]],
) -> tuple[Observations, str]:
    """What both models answer, and the small one's engine."""
    pairs = (("small", small), ("large", large))
    models = tuple({"reference": info.reference, "name": name, "engine": engine} for name, info in pairs)
    server = ModelServer(parse(ServerConfig, {"models": models}, "models"), registry)
    try:
        engines = {model.name: model.engine for model in await server.models()}
        return await observe(server), engines["small"]
    finally:
        await server.close()


def _require_unseen(registry: Registry, model: VersionInfo, data: VersionInfo, split: str) -> None:
    parents = registry.store.manifest("model", model.digest).parents
    if split == "train" and data.digest in {parent.digest for parent in parents}:
        raise DataError(
            f"{model.reference} was trained on the split 'train' of {data.reference}, where it is too sure of itself",
            "calibrate on the split validation or test",
        )


def _examples(path: Path) -> tuple[str, list[Example]]:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise NotFoundError(f"there is no file {str(path)!r}") from None
    except OSError as error:
        raise StorageError(f"{str(path)!r} cannot be read: {error}") from error
    found = []
    for number, line in enumerate(data.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            example = Example.model_validate(json.loads(line))
        except (ValueError, ValidationError) as error:
            reason = str(error).splitlines()[0]
            raise DataError(f"{path.name}, line {number}: {reason}", _LINE) from error
        if (example.prompt is None) == (example.messages is None) or not example.answer.strip():
            raise DataError(f"{path.name}, line {number} needs a prompt or messages, and an answer", _LINE)
        found.append(example)
    return f"sha256:{hashlib.sha256(data).hexdigest()}", found


_LINE = 'a line is {"prompt": "...", "answer": "..."} or {"messages": [...], "answer": "..."}'


def _call(number: int, example: Example, sampling: Sampling) -> Generation:
    return Generation(
        request_id=f"example-{number}",
        sampling=sampling,
        prompt=example.prompt,
        messages=example.messages,
        is_streamed=False,
    )


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _parent(info: VersionInfo) -> Parent:
    return Parent(reference=info.reference, digest=info.digest)
