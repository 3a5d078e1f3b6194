"""One version of an artifact, and how MLflow records it.

Models and datasets are both MLflow "registered models"; a dataset's name carries a prefix that no model name can
have. Digest and metrics are tags of the version.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from modelyard.artifacts.manifest import METRIC_NAME, Kind, Manifest
from modelyard.artifacts.references import Reference
from modelyard.errors import ConfigError

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

DIGEST_TAG = "modelyard.digest"
_CREATED_TAG = "modelyard.created_at"
_METRIC_TAG = "modelyard.metric."
_DATASET_PREFIX = "dataset~"  # '~' is not allowed in our names


@dataclass(frozen=True)
class VersionInfo:
    """One registered version of an artifact."""

    kind: Kind
    name: str
    version: int
    digest: str
    """`sha256:<hex>`: the artifact's identity in the store."""
    aliases: tuple[str, ...]
    metrics: dict[str, float]
    """Those of the manifest and those logged since."""
    created_at: str
    """ISO time in UTC when the artifact was made."""
    run_id: str | None
    """MLflow run that made it."""

    @property
    def reference(self) -> str:
        """The unchanging way to name it, e.g. `models:/tiny-gpt/3`."""
        return str(Reference(self.kind, self.name, self.version))


def mlflow_name(kind: Kind, name: str) -> str:
    """The name of MLflow's registered model."""
    return _DATASET_PREFIX + name if kind == "dataset" else name


def name_filter(kind: Kind, name: str | None) -> str:
    """MLflow's search filter for one name, or for every name of a kind."""
    if name is not None:
        return f"name = '{mlflow_name(kind, name)}'"
    return f"name LIKE '{_DATASET_PREFIX}%'" if kind == "dataset" else ""


def is_ours(kind: Kind, version: ModelVersion) -> bool:
    """Whether Modelyard registered this version, as this kind."""
    return DIGEST_TAG in version.tags and version.name.startswith(_DATASET_PREFIX) == (kind == "dataset")


def manifest_tags(manifest: Manifest) -> dict[str, str]:
    """The tags of a new version."""
    return {
        DIGEST_TAG: manifest.digest(),
        _CREATED_TAG: manifest.created_at,
        **metric_tags(manifest.metrics),
    }


def version_info(kind: Kind, version: ModelVersion, aliases: Mapping[str, Any]) -> VersionInfo:
    """Read one of our versions; `aliases` are those of its registered model (alias -> version)."""
    number, tags = int(version.version), version.tags
    registered = datetime.fromtimestamp(version.creation_timestamp / 1000, UTC).isoformat(timespec="seconds")
    return VersionInfo(
        kind=kind,
        name=version.name.removeprefix(_DATASET_PREFIX) if kind == "dataset" else version.name,
        version=number,
        digest=tags[DIGEST_TAG],
        aliases=tuple(sorted(alias for alias, target in aliases.items() if int(target) == number)),
        metrics={k.removeprefix(_METRIC_TAG): float(v) for k, v in sorted(tags.items()) if k.startswith(_METRIC_TAG)},
        created_at=tags.get(_CREATED_TAG, registered),
        run_id=version.run_id or None,
    )


def metric_tags(metrics: Mapping[str, float]) -> dict[str, str]:
    """Metrics as tags of a version.

    Raises:
        ConfigError: a name or a value cannot be recorded.
    """
    for name, value in metrics.items():
        if not METRIC_NAME.fullmatch(name):
            raise ConfigError(f"metric name {name!r}: use letters, digits, '_', '-', '.', '/' and spaces")
        if not math.isfinite(value):
            raise ConfigError(f"metric {name!r} is {value}, not a finite number")
    return {f"{_METRIC_TAG}{name}": repr(float(value)) for name, value in metrics.items()}
