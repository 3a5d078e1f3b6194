"""Prepare a dataset: from a corpus to a version in the registry."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from modelyard.artifacts.filesystem import translate_errors
from modelyard.config import settings
from modelyard.data import sources
from modelyard.data.config import PrepareConfig
from modelyard.data.dataset import INFO_FILE, DatasetInfo
from modelyard.data.progress import OnProgress, Progress, finished
from modelyard.errors import DataError

if TYPE_CHECKING:
    from modelyard.artifacts import Registry, VersionInfo


def prepare(
    config: PrepareConfig, registry: Registry | None = None, on_progress: OnProgress | None = None
) -> VersionInfo:
    """Prepare a corpus and register it as a version of `datasets:/<config.name>`.

    The same corpus and config give the same bytes on any cluster, and with the same code the same version.

    Args:
        config: what to prepare, and how.
        registry: where to register it; the one of this process's settings by default.
        on_progress: called from this thread, in the order of the steps.

    Raises:
        InputError: the config or the corpus cannot be used; nothing is registered.
        StorageError: a store cannot be reached, or a disk is full.
    """
    from modelyard.artifacts import Registry

    report = on_progress or _ignore
    parts = plan(config)
    registry = registry or Registry.from_settings()
    registry.store.check_writable()
    home = settings().home
    with translate_errors(home):
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="prepare-", dir=home) as staging:
            info = _write(config, parts, Path(staging), report, None)
            metrics = {"rows": float(sum(info.splits.values())), "documents": float(info.documents["kept"])}
            if info.block_tokens is not None:
                metrics["tokens"] = metrics["rows"] * info.block_tokens
            manifest = registry.store.put(
                Path(staging),
                kind="dataset",
                name=config.name,
                metrics=metrics,
                config=config.model_dump(mode="json"),
            )
    version = registry.register(manifest)
    report(finished("store", version=version.version))
    return version


def prepare_folder(
    config: PrepareConfig,
    folder: Path,
    on_progress: OnProgress | None = None,
    *,
    num_blocks: int | None = None,
) -> DatasetInfo:
    """Prepare a corpus into a plain folder, without a registry.

    Args:
        config: what to prepare, and how.
        folder: made when missing; what it holds beforehand is kept beside the dataset.
        on_progress: as in `prepare`.
        num_blocks: how many pieces are worked on in parallel; never changes the result.

    Raises:
        InputError: as in `prepare`.
    """
    parts = plan(config)
    with translate_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        return _write(config, parts, folder, on_progress or _ignore, num_blocks)


def plan(config: PrepareConfig) -> list[sources.Part]:
    """The parts of the config's source; finds what is wrong with it before a cluster is asked for anything.

    Raises:
        DataError: nothing is there, a file is damaged, or a column is missing.
        StorageError: the store cannot be reached.
    """
    sources.load_all()
    parts = sources.plan(config.source)
    if not parts:
        raise DataError("the corpus is empty: its files hold no rows", "check `source` in the config")
    return parts


def _write(
    config: PrepareConfig, parts: list[sources.Part], folder: Path, report: OnProgress, num_blocks: int | None
) -> DatasetInfo:
    if config.text is not None:
        from modelyard.data.text import prepare_text

        info = prepare_text(config, config.text, parts, folder, report, num_blocks)
    elif config.images is not None:
        from modelyard.data.pictures import prepare_images

        info = prepare_images(config, config.images, parts, folder, report, num_blocks)
    elif config.boxes is not None or config.masks is not None or config.speech is not None:
        from modelyard.data.examples import prepare_examples

        info = prepare_examples(config, parts, folder, report, num_blocks)
    elif config.sentences is not None:
        from modelyard.data.sentences import prepare_sentences

        info = prepare_sentences(config, config.sentences, parts, folder, report, num_blocks)
    elif config.windows is not None:
        from modelyard.data.windows import prepare_windows

        info = prepare_windows(config, config.windows, parts, folder, report)
    elif config.histories is not None:
        from modelyard.data.histories import prepare_histories

        info = prepare_histories(config, config.histories, parts, folder, report)
    else:
        from modelyard.data.numbers import prepare_numbers

        info = prepare_numbers(config, parts, folder, report)
    text = json.dumps(info.model_dump(mode="json"), indent=2) + "\n"
    (folder / INFO_FILE).write_text(text, encoding="utf-8")
    return info


def _ignore(progress: Progress) -> None:
    """A caller that does not want to know."""
