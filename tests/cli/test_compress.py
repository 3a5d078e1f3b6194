"""`modelyard compress`: from the command line to a registered model, and refusals that say what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result
from tests.serving.models import classifier, register

from modelyard.artifacts import Registry
from modelyard.cli.main import modelyard
from modelyard.compression import Recipe
from modelyard.config import load
from modelyard.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "jobs" / "configs"


def run(*words: str) -> Result:
    return CliRunner().invoke(modelyard, ["compress", *words])


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("compress_*.yaml")), ids=lambda path: path.stem)
def test_the_recipes_that_are_shipped_are_read(path: Path) -> None:
    recipe = load(Recipe, path)
    assert recipe.steps
    assert load(Recipe, path, ["target.threads=2"]).target.threads == 2


def test_a_recipe_prints_every_field(tmp_path: Path) -> None:
    result = run("models:/any", "--recipe", str(CONFIGS / "compress_int8.yaml"), "--print-config")
    assert result.exit_code == 0
    printed = yaml.safe_load(result.output)
    assert printed["steps"][0]["granularity"] == "group"
    assert printed["split"] == "test"
    path = tmp_path / "printed.yaml"
    path.write_text(result.output)
    assert load(Recipe, path) == load(Recipe, CONFIGS / "compress_int8.yaml")


def test_an_unknown_model_is_named() -> None:
    result = run("models:/nothing", "--recipe", str(CONFIGS / "compress_int8.yaml"))
    assert "there is no model named 'nothing'" in str(result.exception)


def test_a_misspelt_step_shows_the_nearest(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"dataset": "datasets:/d", "steps": [{"kind": "quantise"}]}))
    result = run("models:/any", "--recipe", str(path))
    assert isinstance(result.exception, ConfigError)
    assert "quantize" in str(result.exception)


@pytest.mark.slow
def test_a_classifier_is_compressed_and_registered(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    registry = Registry.from_settings()
    model = register(classifier(tmp_path / "model"), "three")
    dataset = registry.register(registry.store.put(_images(tmp_path / "data"), kind="dataset", name="three"))
    path = tmp_path / "recipe.yaml"
    plain = {"dataset": dataset.reference, "steps": [{"kind": "quantize"}], "measuring": {"repeats": 1}}
    path.write_text(yaml.safe_dump(plain))
    result = run(model.reference, "--recipe", str(path), "--name=small")
    assert result.exit_code == 0, result.exception
    assert "models:/small/1" in result.output
    assert "accuracy" in result.output
    assert "peak memory" in result.output
    folder = registry.open("models:/small/1")[1]
    assert json.loads((folder / "compact.json").read_text())["quantized"]["body.1"]["codes"] == "int8"


def _images(folder: Path) -> Path:
    import numpy as np

    from modelyard.data.dataset import INFO_FILE, Column, DatasetInfo
    from modelyard.data.shards import ShardWriter

    columns = (Column(name="pixels", dtype="uint8", shape=(1, 8, 8)), Column(name="label", dtype="int64"))
    rng = np.random.default_rng(0)
    folder.mkdir()
    for split in ("train", "test"):
        writer = ShardWriter(folder, split, columns, rows_per_shard=100)
        writer.write({"pixels": rng.integers(256, size=(12, 1, 8, 8), dtype=np.uint8), "label": np.arange(12) % 3})
        writer.close()
    splits = {"train": 12, "test": 12}
    info = DatasetInfo(format="images", columns=columns, splits=splits, classes=("a", "b", "c"))
    (folder / INFO_FILE).write_text(info.model_dump_json())
    return folder
