"""Artifacts: folders with a manifest, stored by content, named by references, kept in a registry.

store, registry = Store.from_settings(), Registry.from_settings()
manifest = store.put(Path("out"), kind="model", name="tiny-gpt")
version = registry.register(manifest)
version, folder = registry.open("models:/tiny-gpt")  # verified, byte by byte
"""

from modelyard.artifacts.manifest import FileEntry, Kind, Manifest, Parent
from modelyard.artifacts.references import Reference, parse
from modelyard.artifacts.registry import Registry
from modelyard.artifacts.store import Store
from modelyard.artifacts.versions import VersionInfo

__all__ = [
    "FileEntry",
    "Kind",
    "Manifest",
    "Parent",
    "Reference",
    "Registry",
    "Store",
    "VersionInfo",
    "parse",
]
