"""Encoders of texts through a recipe: exported with their mask, verified, measured text by text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.compression.conftest import Folders
from tests.compression.workspaces import quality, weight_bytes, workspace
from tests.tasks.conftest import texts_folder, train

from modelyard.artifacts import Registry
from modelyard.compression import Recipe, compress
from modelyard.compression.engines import open_engine
from modelyard.compression.export import export
from modelyard.compression.quantize import quantize
from modelyard.compression.recipe import Export, Quantize, Shrink
from modelyard.compression.shrink import shrink
from modelyard.errors import ConfigError
from modelyard.tasks import TextClassification, TokenClassification, load_model

SIZES = {"layers": 2, "hidden_size": 64, "heads": 2, "dropout": 0.0}
PLACES, SUBJECTS = ["london", "paris", "rome", "oslo"], ["rain", "music", "trains", "bread", "taxes"]


def _labelled(count: int) -> tuple[list[str], list[str]]:
    rng = np.random.default_rng(0)
    texts, labels = [], []
    for _ in range(count):
        words = list(rng.choice(SUBJECTS, size=rng.integers(1, 9)))
        is_good = bool(rng.integers(2))
        words.insert(int(rng.integers(len(words) + 1)), str(rng.choice(["lovely", "fine"] if is_good else ["awful"])))
        texts.append(" ".join(words))
        labels.append("good" if is_good else "bad")
    return texts, labels


def _tagged(count: int) -> tuple[list[list[str]], list[list[str]]]:
    rng = np.random.default_rng(0)
    texts = [list(map(str, rng.choice(PLACES + SUBJECTS, size=rng.integers(2, 9)))) for _ in range(count)]
    return texts, [["B-PLACE" if word in PLACES else "O" for word in words] for words in texts]


@pytest.fixture(scope="module", params=["text_classification", "token_classification"])
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """A small BERT, trained for a few seconds on texts of unlike lengths."""
    root = tmp_path_factory.mktemp(request.param)
    kind = TextClassification if request.param == "text_classification" else TokenClassification
    dataset = texts_folder(root / "data", *(_labelled if kind is TextClassification else _tagged)(120))
    task = kind.model_validate({"model": SIZES})
    task.save(train(task, dataset, 80), root / "model", dataset)
    return Folders(root / "model", dataset)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "needs", "least"),
    [
        ({"format": "onnx"}, "onnxscript", 1.0),
        ({"format": "onnx", "quantize": "int8_dynamic"}, "onnxruntime", 0.97),
        ({"format": "onnx", "quantize": "int8_static"}, "onnxruntime", 0.9),
        ({"format": "openvino"}, "openvino", 1.0),
        ({"format": "openvino", "quantize": "int8_static"}, "nncf", 0.9),
        ({"format": "torch_export"}, "torch", 1.0),
    ],
)
def test_an_encoder_answers_the_same_for_texts_of_any_length(
    encoder: Folders, tmp_path: Path, step: dict[str, Any], needs: str, least: float
) -> None:
    pytest.importorskip(needs)
    result = export(workspace(encoder, tmp_path / "s"), Export.model_validate({"verify_rows": 40, **step}))
    share = float(result.notes[-1].split(": ")[1].partition("%")[0]) / 100
    assert share >= least
    other = open_engine(step["format"], result.folder, 1)
    ids = np.array([[5, 6, 7, 8, 9, 0, 0, 0]], dtype=np.int64)
    mask = np.array([[1, 1, 1, 1, 1, 0, 0, 0]], dtype=np.int64)
    padded, short = other.scores(ids, mask), other.scores(ids[:, :5], mask[:, :5])
    padded = padded[:, :5] if padded.ndim == 3 else padded
    assert np.abs(padded - short).max() < (1e-3 if step.get("quantize", "none") == "none" else 0.5)


@pytest.mark.slow
def test_an_encoder_is_quantized_and_loads(encoder: Folders, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    result = quantize(workspace(encoder, tmp_path / "s"), Quantize()).folder
    task, _ = load_model(result)
    name = task.objective[0]
    assert quality(result, encoder.dataset)[name] > quality(encoder.model, encoder.dataset)[name] - 0.02
    assert weight_bytes(encoder.model) > 3 * weight_bytes(result)


@pytest.mark.slow
def test_half_of_the_feed_forward_and_a_layer_leave_smaller_tensors(encoder: Folders, tmp_path: Path) -> None:
    result = shrink(workspace(encoder, tmp_path / "s"), Shrink(mlp=0.5, layers=1)).folder
    _, before = load_model(encoder.model)
    _, after = load_model(result)
    assert (before.config.num_hidden_layers, after.config.num_hidden_layers) == (2, 1)
    place = "bert.encoder.layer.0.output.dense"
    assert before.get_submodule(place).weight.shape == (64, 256)
    assert after.get_submodule(place).weight.shape == (64, 128)
    name = load_model(result)[0].objective[0]
    assert quality(result, encoder.dataset)[name] > 0.5


@pytest.mark.slow
def test_heads_of_an_encoder_are_left_to_its_width(encoder: Folders, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="as many heads as its width asks for"):
        shrink(workspace(encoder, tmp_path / "s"), Shrink(heads=0.5))


@pytest.mark.slow
def test_a_recipe_ends_with_a_report_in_texts(
    encoder: Folders, registered: Callable[[Folders, str], tuple[str, str]], registry: Registry
) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, dataset = registered(encoder, "bert")
    steps = [{"kind": "export", "format": "onnx", "quantize": "int8_dynamic", "verify_rows": 40}]
    limits = {"max_accuracy_drop": 0.05, "min_size_ratio": 1.2}
    recipe = {"dataset": dataset, "steps": steps, "target": {"engine": "onnx"}, "limits": limits}
    done = compress(model, Recipe.model_validate({**recipe, "measuring": {"repeats": 1}}))
    table = "\n".join(done.report.lines())
    assert "texts/CPU-s" in table
    assert ("macro_f1" in table) or ("entity_f1" in table)
    assert done.report.before.quality[done.report.objective[0]] > 0.9
    task, loaded = load_model(registry.open(done.model)[1])
    assert len(task.predict(loaded, ["lovely rain in paris"])) == 1
