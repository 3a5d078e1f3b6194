"""Small builders for artifact tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from modelyard.artifacts import Store

Files = dict[str, bytes]
FILES: Files = {"config.json": b'{"layers": 2}', "weights/part 1.safetensors": bytes(range(256)) * 300}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the two files of `FILES`, ready to be stored."""
    return fill(tmp_path / "source", FILES)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty local store."""
    return Store(str(tmp_path / "store"), tmp_path / "cache")


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    """Make a folder from `{name: content}`."""
    return lambda name, files: fill(tmp_path / name, files)


def fill(folder: Path, files: Files) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder
