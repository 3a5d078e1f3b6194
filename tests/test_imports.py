"""The direction of imports, and that light modules stay light."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ("ray", "torch", "deepspeed", "transformers", "mlflow", "pyarrow", "matplotlib", "numpy")


def loaded_by(module: str) -> list[str]:
    """Which heavy packages a fresh interpreter holds after importing `module`."""
    code = f"import sys, {module}; print([name for name in {HEAVY!r} if name in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return [name for name in HEAVY if repr(name) in answer.stdout]


def test_imports_point_downwards() -> None:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert answer.returncode == 0, answer.stdout + answer.stderr


@pytest.mark.parametrize(
    "module",
    ["modelyard", "modelyard.errors", "modelyard.config", "modelyard.config_file", "modelyard.cli.main"],
)
def test_a_light_module_imports_nothing_heavy(module: str) -> None:
    assert loaded_by(module) == []


@pytest.mark.parametrize("module", ["modelyard.training.config", "modelyard.tasks", "modelyard.data.dataset"])
def test_configs_are_read_without_ray_or_torch(module: str) -> None:
    pytest.importorskip(module)
    assert not set(loaded_by(module)) & {"ray", "torch", "deepspeed", "transformers", "mlflow"}
