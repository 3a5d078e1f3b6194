"""`modelyard backup`: encrypted, incremental copies of all that cannot be made anew."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from modelyard.cli import tables

if TYPE_CHECKING:
    from modelyard.backup import Report

_at = click.option("--at", "uri", required=True, help="Folder or URI of the backup: s3://bucket/prefix, gs://...")
_key = click.option("--key-file", type=click.Path(path_type=Path), help="Its key; by default ~/.modelyard/backup.key.")
_snapshot = click.option("--snapshot", help="Name of a snapshot, or its beginning; by default the newest.")


@click.group()
def backup() -> None:
    """Back up registry, artifacts, scheduler journal and keys; check backups and restore them.

    The key is in ~/.modelyard/backup.key, or comes from a passphrase in MODELYARD_BACKUP_PASSPHRASE.
    """


@backup.command()
@_at
@_key
def create(uri: str, key_file: Path | None) -> None:
    """Make a snapshot; only what is new is sent."""
    from modelyard import backup as backups
    from modelyard.backup.backups import default_key_file

    key = key_file or default_key_file()
    is_new = not key.exists()
    report = backups.create(uri, key)
    _say("made", report, "sent")
    if is_new and key.exists():
        click.echo(f"its key is new: {key}; keep a copy elsewhere, for without it nothing can be restored")


@backup.command()
@_at
@_key
@_snapshot
def verify(uri: str, key_file: Path | None, snapshot: str | None) -> None:
    """Read a whole snapshot and prove that it can be restored."""
    from modelyard import backup as backups

    _say("is good:", backups.verify(uri, snapshot, key_file), "read")


@backup.command()
@_at
@_key
@_snapshot
@click.option("--into", required=True, type=click.Path(path_type=Path), help="A new folder: the MODELYARD_HOME to be.")
@click.option("--store", help="Folder or URI for the artifacts; by default `store` in that folder.")
def restore(uri: str, key_file: Path | None, snapshot: str | None, into: Path, store: str | None) -> None:
    """Write a snapshot into a new folder. Nothing is overwritten."""
    from modelyard import backup as backups
    from modelyard.artifacts.filesystem import is_local, local_path

    _say("restored:", backups.restore(uri, into, snapshot, key_file, store), "read")
    variables = {"MODELYARD_HOME": str(into.absolute())}
    if store is not None:
        variables["MODELYARD_STORE"] = str(local_path(store)) if is_local(store) else store
    click.echo("use it: export " + " ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items()))


@backup.command("list")
@_at
@_key
def list_command(uri: str, key_file: Path | None) -> None:
    """List the snapshots, oldest first."""
    from modelyard import backup as backups

    table = tables.table("snapshot", "files", "size")
    for snapshot in backups.snapshots(uri, key_file):
        cells = ("damaged", "-") if snapshot.problem else (str(len(snapshot.files)), _mib(snapshot.size_bytes))
        tables.add_row(table, snapshot.name, *cells)
    tables.console().print(table)


def _say(verb: str, report: Report, moved: str) -> None:
    sizes = f"{report.files} files, {_mib(report.size_bytes)}, {moved} {_mib(report.moved_bytes)}"
    click.echo(f"snapshot {report.snapshot} {verb} {sizes}")
    for warning in report.warnings:
        click.echo(f"warning: {warning}", err=True)
    for note in report.notes:
        click.echo(f"not in it: {note}")


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:.1f} MiB"
