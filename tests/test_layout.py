"""The shape of the repository: what must exist, what must not, and that public names are what they say."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import modelyard

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "platform" / "modelyard"
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
)


def test_the_source_root_is_not_a_package() -> None:
    assert not (ROOT / "platform" / "__init__.py").exists(), "it would shadow the standard library's `platform`"


def test_platform_is_the_standard_library_even_from_the_root_of_the_repository() -> None:
    code = "import platform; print(platform.system(), platform.__file__)"
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert str(ROOT / "platform") not in answer.stdout


def test_tests_are_no_packages() -> None:
    assert list((ROOT / "tests").rglob("__init__.py")) == []


@pytest.mark.parametrize("name", ["pyproject.toml", "Makefile", "CHANGELOG.md", "LICENSE", ".ci/run", "docs/decisions"])
def test_the_top_level_holds(name: str) -> None:
    assert (ROOT / name).exists()


def test_every_package_has_an_init_file_and_no_module_is_called_utils() -> None:
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []
    assert [name for name in MODULES if name.rpartition(".")[2] in ("utils", "helpers", "common", "misc")] == []


def test_the_version_of_the_package_is_the_newest_one_in_the_changelog() -> None:
    first = next(line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## "))
    assert modelyard.__version__ in first
    assert f'version = "{modelyard.__version__}"' in (ROOT / "pyproject.toml").read_text()


def test_the_makefile_installs_the_torch_that_the_package_asks_for() -> None:
    pin = next(line for line in (ROOT / "pyproject.toml").read_text().splitlines() if '"torch' in line)
    assert pin.strip().strip('",') in (ROOT / "Makefile").read_text()


def test_ci_needs_no_file_mode_or_terminal_of_anyone() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    text = script.read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "set -euo pipefail" in text
    assert "</dev/null" in text
    assert "make test" in text


def test_make_without_a_python_says_what_to_do(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    answer = subprocess.run(
        ["make", "setup", "PYTHON=no-such-python"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert answer.returncode != 0
    assert "none of these is Python 3.11 or newer: no-such-python" in answer.stderr
    assert "make PYTHON=/path/to/python3.11" in answer.stderr


def test_all_of_the_package_is_exactly_what_can_be_imported() -> None:
    assert sorted(modelyard.__all__) == list(modelyard.__all__)
    assert sorted(modelyard.__all__) == sorted([*modelyard._HOMES, "__version__"])
    for name in modelyard.__all__:
        assert getattr(modelyard, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        modelyard.no_such_name  # noqa: B018


@pytest.mark.parametrize("module", [name for name in MODULES if name.count(".") == 1])
def test_what_a_part_lists_in_all_is_there_and_sorted(module: str) -> None:
    imported = importlib.import_module(module)
    names = getattr(imported, "__all__", [])
    assert list(names) == sorted(names)
    assert [name for name in names if not hasattr(imported, name)] == []
