"""The record of a run in the store: what it is, whether it may continue, and that only one driver works on it.

<store>/runs/<run>/
    run.json         identity and config; written before the first worker starts
    checkpoints/     see checkpoints.py
    result.json      written by worker 0 once the model is in the store
    finished.json    written by the driver once the model is registered
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from modelyard.artifacts.filesystem import translate_errors
from modelyard.artifacts.manifest import FileEntry
from modelyard.config import Config
from modelyard.errors import ConfigError
from modelyard.training.config import TrainConfig
from modelyard.training.run_folder import RunFolder

RUN_RECORD = "run.json"
RESULT = "result.json"
FINISHED = "finished.json"

_FREE_SECTIONS = ("run", "workers", "checkpoint", "failures", "dataset", "lease")
"""May differ when a run continues: they change where and how safely it runs, not what it computes."""
_FREE_TRAINING = (
    "micro_batch_size",
    "offload_optimizer",
    "offload_parameters",
    "activation_checkpointing",
    "compile",
    "parallel",
    "stop_after_s",
    "deepspeed",
)


class RunRecord(Config):
    """Who a run is."""

    format_version: int = 1
    run_id: str
    identity: dict[str, Any]
    """Every setting that changes what is computed, and the digest of the data."""
    config: dict[str, Any]
    """The whole config of the first attempt."""
    tracking_run_id: str | None = None


def identity(
    config: TrainConfig, data: Mapping[str, FileEntry], bases: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The settings that two attempts of one run must share, what the dataset's files hold, and the base models."""
    plain = config.model_dump(mode="json", exclude=set(_FREE_SECTIONS))
    plain["training"] = {k: v for k, v in plain["training"].items() if k not in _FREE_TRAINING}
    strategy = plain["training"].pop("strategy")
    if strategy["kind"] != "all_reduce":  # left out, so that runs from before there was a choice stay who they are
        plain["training"]["strategy"] = {k: v for k, v in strategy.items() if k != "timeout_s"}
    return {
        **plain,
        "dataset_files": _digest({name: entry.sha256 for name, entry in data.items()}),
        "bases": dict(bases or {}),
    }


def default_run_id(config: TrainConfig, who: dict[str, Any]) -> str:
    """`<name>-<8 hex digits of the identity>`: the same settings find their unfinished run again."""
    return f"{config.name}-{_digest(who)[:8]}"


def choose_run(runs: RunFolder, config: TrainConfig, who: dict[str, Any]) -> str:
    """The id of the run to start or to continue.

    A named run continues under its name. Otherwise the first of `<id>`, `<id>-2`, `<id>-3`, ... that has not
    finished: so repeating a finished run is a new run.

    Raises:
        ConfigError: the named run exists with other settings; they are listed.
    """
    if config.run is not None:
        record = read_record(runs.sub(config.run))
        if record is not None and record.identity != who:
            raise ConfigError(
                f"run {config.run!r} exists with other settings: {differences(record.identity, who)}",
                "give another name with --run=NAME, or these settings",
            )
        return config.run
    base, number = default_run_id(config, who), 1
    while runs.sub(name := base if number == 1 else f"{base}-{number}").read(FINISHED) is not None:
        number += 1
    return name


def read_record(folder: RunFolder) -> RunRecord | None:
    """The record of a run; None when there is no such run."""
    data = folder.read(RUN_RECORD)
    return None if data is None else RunRecord.model_validate_json(data)


@contextlib.contextmanager
def exclusive(home: Path, run_id: str) -> Iterator[None]:
    """Hold the run for this driver, on this machine. The lock dies with the process.

    Raises:
        ConfigError: another driver works on it.
        StorageError: `home` cannot be written.
    """
    path = home / "locks" / f"{run_id}.lock"
    with translate_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        opened = path.open("a+")
    with opened as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise in_use(run_id) from None
        yield


def in_use(run_id: str) -> ConfigError:
    """The error for a run that another driver works on."""
    return ConfigError(
        f"run {run_id!r} is being trained by another process",
        "wait for it, or give another name (--run=NAME; of a recipe, --name=NAME)",
    )


def _digest(plain: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    """`seed was 0, now 3`, for each setting of two plain configs that is not the same."""
    before, now = _flat(old), _flat(new)
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    return "; ".join(f"{key} was {json.dumps(before.get(key))}, now {json.dumps(now.get(key))}" for key in changed)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
