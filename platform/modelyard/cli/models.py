"""`modelyard models`: list, show, promote, verify and import. `compare` is in `cli/compare.py`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from modelyard.cli import tables
from modelyard.errors import ModelyardError

if TYPE_CHECKING:
    from rich.tree import Tree

    from modelyard.artifacts import Manifest, Registry, VersionInfo
    from modelyard.artifacts.manifest import Kind

_COMPRESSION = "compression/"
"""Metrics of a report with some 25 figures, which `list` leaves to `show`."""
_MAX_DEPTH = 20
KINDS: tuple[Kind, ...] = ("model", "dataset")


def complete_reference(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete a reference from the registry, `models:/tiny-gpt/3` or in short `tiny-gpt/3`; for `shell_complete=`."""
    try:
        known = [info for kind in KINDS for info in _registry().versions(kind)]
    except ModelyardError:
        return []  # a shell cannot show the error, and the command itself will
    texts = {text for info in known for text in (*_with_aliases(info), info.reference)}
    if incomplete and not "models:/".startswith(incomplete):
        texts |= {text.removeprefix("models:/") for text in texts}
    return [CompletionItem(text) for text in sorted(texts) if text.startswith(incomplete)]


@click.group()
def models() -> None:
    """List, show, verify, promote, compare and import models (and datasets)."""


@models.command("list")
@click.option("--kind", type=click.Choice(["model", "dataset", "all"]), default="model", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_command(kind: str, as_json: bool) -> None:
    """List every registered version, newest last."""
    kinds = KINDS if kind == "all" else [known for known in KINDS if known == kind]
    registry = _registry()
    found = [info for one in kinds for info in registry.versions(one)]
    if as_json:
        click.echo(json.dumps([_as_dict(info) for info in found], indent=2))
        return
    if not found:
        click.echo(f"no {'artifact' if kind == 'all' else kind} is registered in {registry.tracking_uri}", err=True)
        return
    table = tables.table("reference", "aliases", "digest", "created (UTC)", "metrics")
    for info in found:
        tables.add_row(
            table,
            info.reference,
            ", ".join(info.aliases) or "-",
            info.digest[:19],
            info.created_at[:16].replace("T", " "),
            _figures({name: value for name, value in info.metrics.items() if not name.startswith(_COMPRESSION)}),
        )
    tables.console().print(table)


@models.command()
@click.argument("ref", shell_complete=complete_reference)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(ref: str, as_json: bool) -> None:
    """Show a version: metrics, files, config, code, and its family tree."""
    registry = _registry()
    info = registry.resolve(ref, _default_kind(ref))
    manifest = registry.store.manifest(info.kind, info.digest)
    if as_json:
        shown = {
            **_as_dict(info),
            "manifest": manifest.model_dump(mode="json"),
            "parents": _parents(registry, manifest),
        }
        click.echo(json.dumps(shown, indent=2))
        return
    console = tables.console()
    facts = tables.table("", "", header=False)
    for label, value in _facts(info, manifest):
        tables.add_row(facts, label, value)
    console.print(facts)
    files = tables.table("file", "bytes", "sha256")
    for name, entry in manifest.files.items():
        tables.add_row(files, name, f"{entry.size_bytes:,}", entry.sha256[:12])
    console.print(files)
    if manifest.config:
        console.print("config", style="bold")
        console.print(_yaml(manifest.config), markup=False, highlight=False)
    console.print("made from", style="bold")
    console.print(_tree(info, _parents(registry, manifest)))


@models.command()
@click.argument("ref", shell_complete=complete_reference)
@click.argument("alias")
def promote(ref: str, alias: str) -> None:
    """Point ALIAS at a version, e.g. `promote tiny-gpt/3 production`."""
    info = _registry().promote(ref, alias, _default_kind(ref))
    click.echo(f"{info.kind}s:/{info.name}@{alias} is now {info.reference} ({info.digest[:19]})")


@models.command()
@click.argument("ref", shell_complete=complete_reference)
def verify(ref: str) -> None:
    """Read every byte of a version where it is stored and compare it with its manifest."""
    registry = _registry()
    info = registry.resolve(ref, _default_kind(ref))
    registry.store.verify(info.kind, info.digest)
    manifest = registry.store.manifest(info.kind, info.digest)
    click.echo(f"{info.reference}: {_size(manifest)}, every byte as stored ({info.digest})")


@models.command()
@click.argument("ref", shell_complete=complete_reference)
@click.argument("folder", type=click.Path(path_type=Path))
def download(ref: str, folder: Path) -> None:
    """Write the verified files of a version into FOLDER, for a runtime elsewhere. FOLDER must not be there yet."""
    import shutil

    from modelyard.errors import ConfigError

    if folder.exists():
        raise ConfigError(f"{str(folder)!r} is there already", "name a folder that is not")
    info, source = _registry().open(ref, _default_kind(ref))
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(source, part)
    part.rename(folder)
    click.echo(f"{info.reference} is in {folder}: {', '.join(sorted(each.name for each in folder.iterdir()))}")


@models.command("import")
@click.argument("path", type=click.Path(exists=True, path_type=Path))
@click.option("--name", required=True, help="Name to register it under.")
def import_command(path: Path, name: str) -> None:
    """Register the causal language model at PATH: a Hugging Face folder with safetensors, or a GGUF file.

    A GGUF file becomes fp32 weights, so that it can be fine-tuned. Nothing in PATH is run, and a pickle is refused.
    """
    from modelyard.serving.importing import import_model

    info = import_model(path, name, _registry())
    click.echo(f"{info.reference} ({info.digest[:19]})")


def _registry() -> Registry:
    from modelyard.artifacts import Registry

    return Registry.from_settings()


def _default_kind(ref: str) -> Kind | None:
    """A reference without a scheme means a model here."""
    return None if ":/" in ref else "model"


def _as_dict(info: VersionInfo) -> dict[str, Any]:
    return {"reference": info.reference, **dataclasses.asdict(info)}


def _with_aliases(info: VersionInfo) -> list[str]:
    return [f"{info.kind}s:/{info.name}@{alias}" for alias in info.aliases]


def _figures(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.6g}" for name, value in metrics.items()) or "-"


def _size(manifest: Manifest) -> str:
    plural = "s" if len(manifest.files) != 1 else ""
    return f"{len(manifest.files)} file{plural}, {_readable(manifest.size_bytes)}"


def _readable(size: int) -> str:
    """`1.5 MiB`."""
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size >= 1 << power:
            return f"{size / (1 << power):.4g} {unit}"
    return f"{size} byte{'s' if size != 1 else ''}"


def _facts(info: VersionInfo, manifest: Manifest) -> list[tuple[str, str]]:
    return [
        ("reference", info.reference),
        ("aliases", ", ".join(info.aliases) or "-"),
        ("digest", info.digest),
        ("created", info.created_at),
        ("run", info.run_id or "-"),
        ("code", ", ".join(f"{name} {version}" for name, version in manifest.code.items()) or "-"),
        ("metrics", _figures(info.metrics)),
        ("size", _size(manifest)),
    ]


def _parents(registry: Registry, manifest: Manifest, depth: int = 0) -> list[dict[str, Any]]:
    """The family above an artifact, found by digest; what the registry or the store lost is said, not hidden."""
    from modelyard.artifacts import parse

    found = []
    for parent in manifest.parents:
        info = registry.find(parent.digest)
        entry: dict[str, Any] = {"named": parent.reference, "digest": parent.digest, "parents": [], "note": ""}
        entry["reference"] = info.reference if info is not None else None
        try:
            kind = info.kind if info is not None else parse(parent.reference).kind
            above = registry.store.manifest(kind, parent.digest)
            entry["parents"] = _parents(registry, above, depth + 1) if depth < _MAX_DEPTH else []
        except ModelyardError as error:
            entry["note"] = error.problem
        if info is None:
            entry["note"] = f"not registered{'; ' if entry['note'] else ''}{entry['note']}"
        found.append(entry)
    return found


def _tree(info: VersionInfo, parents: list[dict[str, Any]]) -> Tree:
    from rich.markup import escape
    from rich.tree import Tree

    def grow(branch: Tree, entries: list[dict[str, Any]]) -> None:
        for entry in entries:
            note = f" ({entry['note']})" if entry["note"] else ""
            label = f"{entry['reference'] or entry['named']}  {entry['digest'][:19]}{note}"
            grow(branch.add(escape(label)), entry["parents"])

    tree = Tree(escape(f"{info.reference}  {info.digest[:19]}"))
    grow(tree, parents)
    return tree


def _yaml(config: dict[str, Any]) -> str:
    import yaml

    return "  " + yaml.safe_dump(config, sort_keys=False).rstrip().replace("\n", "\n  ")
