"""Encrypted, incremental backups of registry, artifacts, scheduler journal and keys, to any `pyarrow.fs` URI."""

from modelyard.backup.backups import Report, create, restore, snapshots, verify

__all__ = ["Report", "create", "restore", "snapshots", "verify"]
