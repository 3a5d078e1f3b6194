"""Names, versions and aliases of artifacts, on MLflow's model registry.

A version records the artifact's digest as a tag; the bytes stay in the `Store`. Versions that other tools
registered under the same server are left alone and not shown.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelyard.artifacts.manifest import Kind, Manifest
from modelyard.artifacts.references import Reference, check_alias, parse
from modelyard.artifacts.store import Store
from modelyard.artifacts.versions import (
    DIGEST_TAG,
    VersionInfo,
    is_ours,
    manifest_tags,
    metric_tags,
    mlflow_name,
    name_filter,
    version_info,
)
from modelyard.config import settings
from modelyard.errors import NotFoundError, StorageError, nearest
from modelyard.observability.mlflow_client import connect, database_lock, translate_mlflow_errors

if TYPE_CHECKING:
    from mlflow import MlflowClient

_PAGE = 1000


class Registry:
    """Versions in one MLflow server or database, their bytes in one store."""

    def __init__(self, tracking_uri: str, store: Store) -> None:
        """Name the two places; nothing is opened before the first call."""
        self.tracking_uri = tracking_uri
        self.store = store
        self._opened: MlflowClient | None = None

    @classmethod
    def from_settings(cls) -> Registry:
        """The registry and the store of this process's settings."""
        return cls(settings().tracking_uri, Store.from_settings())

    def register(self, manifest: Manifest, run_id: str | None = None) -> VersionInfo:
        """Give a stored artifact the next version of its name; the same content keeps the version it has.

        Raises:
            ConfigError: a metric's name cannot be recorded.
            StorageError: the registry cannot be used.
        """
        digest = manifest.digest()
        tags = manifest_tags(manifest)
        source = f"{self.store.uri if '://' in self.store.uri else 'modelyard://' + self.store.uri}"
        with self._client() as client, database_lock(self.tracking_uri):
            _make_name(client, mlflow_name(manifest.kind, manifest.name))
            known = self._with_digest(manifest.kind, manifest.name, digest)
            if known is None:
                made = client.create_model_version(
                    mlflow_name(manifest.kind, manifest.name),
                    f"{source}/{manifest.kind}s/{digest.removeprefix('sha256:')}",
                    run_id=run_id,
                    tags=tags,
                )
                known = self._with_digest(manifest.kind, manifest.name, digest)
                if known is not None and known.version != int(made.version):  # another process was first
                    client.delete_model_version(made.name, str(made.version))
        if known is None:
            raise StorageError(
                f"{manifest.kind} {manifest.name!r} was registered but is not listed", "register it again"
            )
        return known

    def resolve(self, ref: Reference | str, kind: Kind | None = None) -> VersionInfo:
        """The version that a reference names now.

        Raises:
            ConfigError: it is not a reference.
            NotFoundError: the name, version or alias is unknown; the nearest or the known ones are shown.
            StorageError: the registry cannot be used.
        """
        reference = parse(ref, kind) if isinstance(ref, str) else ref
        found = self.versions(reference.kind, reference.name)
        if not found:
            names = {info.name for info in self.versions(reference.kind)}
            raise NotFoundError(
                f"there is no {reference.kind} named {reference.name!r}", nearest(reference.name, names)
            )
        if reference.version is not None:
            chosen = [info for info in found if info.version == reference.version]
            known = "versions: " + _some([str(info.version) for info in found])
        elif reference.alias is not None:
            chosen = [info for info in found if reference.alias in info.aliases]
            aliases = sorted(alias for info in found for alias in info.aliases)
            known = (
                nearest(reference.alias, aliases)
                if aliases
                else "it has no aliases; `modelyard models promote` sets one"
            )
        else:
            chosen, known = found[-1:], ""
        if not chosen:
            raise NotFoundError(f"{reference} does not exist", known)
        return chosen[0]

    def versions(self, kind: Kind, name: str | None = None) -> list[VersionInfo]:
        """All versions of a kind, or of one name, by name and then by version number."""
        with self._client() as client:
            aliases = {
                model.name: dict(model.aliases)
                for model in _all(client.search_registered_models, name_filter(kind, name))
            }
            found = [
                version_info(kind, version, aliases[version.name])
                for version in _all(client.search_model_versions, name_filter(kind, name))
                if version.name in aliases and is_ours(kind, version)
            ]
        return sorted(found, key=lambda info: (info.name, info.version))

    def find(self, digest: str, kind: Kind | None = None) -> VersionInfo | None:
        """The first registered version with this content, None when there is none."""
        kinds: tuple[Kind, ...] = ("model", "dataset") if kind is None else (kind,)
        with self._client() as client:
            tagged = _all(client.search_model_versions, f"tags.`{DIGEST_TAG}` = '{digest.replace(chr(39), '')}'")
            for wanted in kinds:
                for version in sorted(tagged, key=lambda v: (v.name, int(v.version))):
                    if is_ours(wanted, version):
                        aliases = dict(client.get_registered_model(version.name).aliases)
                        return version_info(wanted, version, aliases)
        return None

    def promote(self, ref: Reference | str, alias: str, kind: Kind | None = None) -> VersionInfo:
        """Point `alias` at a version; it moves there from wherever it was.

        Raises:
            ConfigError: the alias is not allowed.
            NotFoundError, StorageError: as for `resolve`.
        """
        check_alias(alias)
        info = self.resolve(ref, kind)
        with self._client() as client, database_lock(self.tracking_uri):
            client.set_registered_model_alias(mlflow_name(info.kind, info.name), alias, str(info.version))
        return self.resolve(info.reference)

    def log_metrics(self, ref: Reference | str, metrics: Mapping[str, float]) -> VersionInfo:
        """Write figures onto a version; a figure of the same name is replaced.

        Raises:
            ConfigError: a name or a value cannot be recorded.
            NotFoundError, StorageError: as for `resolve`.
        """
        tags = metric_tags(metrics)
        info = self.resolve(ref)
        with self._client() as client, database_lock(self.tracking_uri):
            for key, value in tags.items():
                client.set_model_version_tag(mlflow_name(info.kind, info.name), str(info.version), key, value)
        return self.resolve(info.reference)

    def open(self, ref: Reference | str, kind: Kind | None = None) -> tuple[VersionInfo, Path]:
        """The version, and a local folder with its verified files (see `Store.open`).

        Raises:
            NotFoundError, IntegrityError, UnsafeFileError, StorageError: as for `resolve` and `Store.open`.
        """
        info = self.resolve(ref, kind)
        return info, self.store.open(info.kind, info.digest)

    def _with_digest(self, kind: Kind, name: str, digest: str) -> VersionInfo | None:
        """The oldest version with this content: processes that registered it at once agree on it."""
        return next((info for info in self.versions(kind, name) if info.digest == digest), None)

    @contextlib.contextmanager
    def _client(self) -> Iterator[MlflowClient]:
        if self._opened is None:
            self._opened = connect(self.tracking_uri)
        with translate_mlflow_errors(self.tracking_uri):
            yield self._opened

    def __getstate__(self) -> dict[str, Any]:
        return {
            **self.__dict__,
            "_opened": None,
        }  # a client holds sockets and locks: each process opens its own


def _make_name(client: MlflowClient, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _all(search: Callable[..., Any], filter_string: str) -> list[Any]:
    """Every page of one of MLflow's searches."""
    found: list[Any] = []
    token = None
    while True:
        page = search(filter_string=filter_string, max_results=_PAGE, page_token=token)
        found.extend(page)
        token = page.token
        if not token:
            return found


def _some(texts: list[str]) -> str:
    return ", ".join(texts if len(texts) <= 20 else [*texts[:3], "...", *texts[-15:]])
