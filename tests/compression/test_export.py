"""Exports: each runtime computes what the source computes, and what does not is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.compression.conftest import Folders
from tests.compression.workspaces import workspace

from modelyard.artifacts.unsafe import refuse_unsafe
from modelyard.compression.engines import open_engine
from modelyard.compression.export import check_published, compare, export
from modelyard.compression.quantize import quantize
from modelyard.compression.recipe import Export, Quantize
from modelyard.errors import ConfigError, IntegrityError
from modelyard.serving.export import write_gguf
from modelyard.tasks import load_model

pytestmark = pytest.mark.slow  # on models that are trained first


@pytest.mark.parametrize(
    ("step", "needs", "least"),
    [
        ({"format": "onnx"}, "onnxscript", 0.999),
        ({"format": "onnx", "quantize": "int8_static"}, "onnxruntime", 0.97),
        ({"format": "onnx", "quantize": "int8_dynamic"}, "onnxruntime", 0.97),
        ({"format": "openvino"}, "openvino", 0.999),
        ({"format": "openvino", "quantize": "int8_static"}, "nncf", 0.97),
        ({"format": "torch_export"}, "torch", 0.999),
    ],
)
def test_a_classifier_answers_the_same(
    digits: Folders, tmp_path: Path, step: dict[str, Any], needs: str, least: float
) -> None:
    pytest.importorskip(needs)
    work = workspace(digits, tmp_path / "s")
    result = export(work, Export.model_validate({"verify_rows": 200, **step}))
    for path in result.folder.rglob("*"):
        if path.is_file():
            refuse_unsafe(path, path.name)
    images = work.dataset.split("test").read(np.arange(200))["pixels"]
    name = step["format"]
    found = compare(open_engine("torch", work.folder, 1), open_engine(name, result.folder, 1), images)
    assert found.share >= least
    if step.get("quantize", "none") == "none":
        assert found.max_difference < 1e-4


@pytest.mark.parametrize(
    ("step", "needs", "least"),
    [
        ({"format": "onnx"}, "onnxscript", 0.999),
        ({"format": "onnx", "quantize": "int8_dynamic"}, "onnxruntime", 0.7),
        ({"format": "torch_export"}, "torch", 0.999),
        ({"format": "gguf"}, "gguf", 0.97),
        ({"format": "openvino"}, "openvino_genai", 0.97),
        ({"format": "openvino", "quantize": "int4"}, "nncf", 0.7),
        ({"format": "openvino", "quantize": "int4_awq", "calibration_rows": 16}, "nncf", 0.7),
    ],
)
def test_a_language_model_writes_the_same(
    language: Folders, tmp_path: Path, step: dict[str, Any], needs: str, least: float
) -> None:
    pytest.importorskip(needs)
    work = workspace(language, tmp_path / "s")
    result = export(work, Export.model_validate({**step, "min_agreement": least}))
    assert "greedy text the same" in result.notes[-1]


def test_eight_bits_in_groups_of_32_reach_the_engine_unchanged(language: Folders, tmp_path: Path) -> None:
    pytest.importorskip("openvino_genai")
    pytest.importorskip("torchao")
    for codes, most in (("int8", 0.01), ("int4", 0.01)):
        work = workspace(language, tmp_path / codes)
        step = Quantize.model_validate({"codes": codes, "granularity": "group", "group_size": 32})
        quantized = quantize(work, step)
        rows = work.dataset.split("test").read(np.arange(2))["input_ids"].astype(np.int64)
        engines = [open_engine(name, quantized.folder, 1) for name in ("torch", "openvino")]
        assert compare(*engines, rows).max_difference < most


@pytest.mark.parametrize("codes", ["int8", "int4"])
@pytest.mark.parametrize("method", ["nearest", "gptq", "hqq"])
def test_codes_are_in_a_gguf_file_as_they_were_chosen(
    language: Folders, tmp_path: Path, method: str, codes: str
) -> None:
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("torchao")
    step = {"codes": codes, "granularity": "group", "method": method, "calibration_rows": 8}
    folder = quantize(workspace(language, tmp_path / "s"), Quantize.model_validate(step)).folder
    layers = load_model(folder)[1].float().model.layers
    write_gguf(load_model(folder)[1].float(), folder, tmp_path / "model.gguf")
    written = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    for index, layer in enumerate(layers):
        for ours, theirs in (("up_proj", "ffn_up"), ("gate_proj", "ffn_gate"), ("down_proj", "ffn_down")):
            tensor = written[f"blk.{index}.{theirs}.weight"]
            found = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            np.testing.assert_array_equal(found, getattr(layer.mlp, ours).weight.detach().numpy())


def test_a_gguf_file_is_verified_by_itself_and_not_by_an_export_beside_it(
    language: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino_genai")
    from modelyard.compression import export as module

    real = module._gguf

    def broken(work: Any, target: Path) -> None:
        _, model = work.load()
        for parameter in model.parameters():
            parameter.data.normal_(0, 1)
        real(work.save(model, "noise"), target)

    once = export(workspace(language, tmp_path / "s"), Export(format="openvino"))
    monkeypatch.setattr(module, "_gguf", broken)
    with pytest.raises(IntegrityError, match="the gguf export is not the model"):
        export(once, Export(format="gguf"))


@pytest.mark.parametrize("name", ["weights", "onnx", "torch_export"])
def test_what_was_published_must_answer_as_what_was_measured(digits: Folders, tmp_path: Path, name: str) -> None:
    pytest.importorskip("onnxscript")
    work = workspace(digits, tmp_path / "s")
    for form in ("onnx", "torch_export"):
        work = export(work, Export.model_validate({"format": form}))
    published = tmp_path / "published"
    shutil.copytree(work.folder, published)
    check_published(work, published)
    other = quantize(workspace(digits, tmp_path / "o"), Quantize(codes="int4"))
    if name == "weights":
        shutil.copyfile(other.folder / "model.safetensors", published / "model.safetensors")
        shutil.copyfile(other.folder / "compact.json", published / "compact.json")
    else:
        wrong = export(other, Export.model_validate({"format": name}))
        shutil.rmtree(published / name)
        shutil.copytree(wrong.folder / name, published / name)
    with pytest.raises(IntegrityError, match=f"scores of the published {name} are not those"):
        check_published(work, published)


def test_an_export_that_computes_something_else_is_refused(
    digits: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxscript")
    from modelyard.compression import export as module

    real = module._onnx

    def broken(work: Any, step: Any, target: Path) -> None:
        _, model = work.load()
        for parameter in model.parameters():
            parameter.data.normal_(0, 1)
        other = work.save(model, "noise")
        real(other, step, target)

    monkeypatch.setattr(module, "_onnx", broken)
    with pytest.raises(IntegrityError, match="the onnx export is not the model"):
        export(workspace(digits, tmp_path / "s"), Export(format="onnx", verify_rows=100))


def test_gguf_takes_no_classifier(digits: Folders, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="language models only"):
        export(workspace(digits, tmp_path / "s"), Export(format="gguf"))


def test_an_exported_program_has_no_pickle_in_it(digits: Folders, tmp_path: Path) -> None:
    import zipfile

    result = export(workspace(digits, tmp_path / "s"), Export(format="torch_export"))
    names = zipfile.ZipFile(result.folder / "torch_export" / "program.pt2").namelist()
    assert not [name for name in names if name.endswith(".pt")]
    assert json.loads((result.folder / "task.json").read_text())["task"]["kind"] == "image_classification"
