"""Quantized folders: loadable, small, near the source, on the grids of the formats they claim."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.compression.conftest import Folders
from tests.compression.workspaces import quality, weight_bytes, workspace

from modelyard.compression.gptq import gptq
from modelyard.compression.hqq import hqq
from modelyard.compression.quantize import quantize
from modelyard.compression.recipe import Quantize
from modelyard.data.dataset import Dataset
from modelyard.errors import ConfigError, IntegrityError
from modelyard.tasks import load_model
from modelyard.tasks.compact import StoredLayer, dequantize, pack_int4, read_compact, unpack_int4
from modelyard.tasks.rounding import quantize_weight

pytestmark = pytest.mark.slow  # on models that are trained first

pytest.importorskip("torchao")


@pytest.fixture
def work(tmp_path: Path) -> Any:
    return lambda folders: workspace(folders, tmp_path / uuid.uuid4().hex)


def perplexity(folder: Path, dataset: Path) -> float:
    return quality(folder, dataset)["perplexity"]


@pytest.mark.parametrize(
    ("step", "most", "times"),
    [
        ({"codes": "int8"}, 0.01, 3.7),
        ({"codes": "int8", "granularity": "tensor"}, 0.03, 3.7),
        ({"codes": "int8", "granularity": "group"}, 0.005, 3.5),
        ({"codes": "int8", "symmetric": False}, 0.01, 3.6),
        ({"codes": "int8", "symmetric": False, "granularity": "group"}, 0.005, 3.4),
        ({"codes": "int8", "activations": "dynamic"}, 0.02, 3.7),
        ({"codes": "int8", "activations": "static"}, 0.05, 3.7),
        ({"codes": "int4", "granularity": "group"}, 0.25, 5.0),
        ({"codes": "int4", "granularity": "group", "symmetric": False}, 0.25, 4.8),
        ({"codes": "int8", "method": "hqq"}, 0.01, 3.7),
        ({"codes": "int4", "granularity": "group", "method": "hqq"}, 0.25, 5.0),
        ({"codes": "fp8"}, 0.03, 3.6),
    ],
)
def test_perplexity_stays_near_and_the_file_shrinks(
    language: Folders, work: Any, step: dict[str, Any], most: float, times: float
) -> None:
    result = quantize(work(language), Quantize.model_validate(step)).folder
    before = perplexity(language.model, language.dataset)
    assert perplexity(result, language.dataset) < before * (1 + most)
    assert weight_bytes(language.model) > times * weight_bytes(result)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", ["group", "channel", "tensor"])
def test_gptq_is_the_nearest_code_where_inputs_have_nothing_in_common(granularity: Any, symmetric: bool) -> None:
    weight = torch.randn(24, 96, generator=torch.Generator().manual_seed(0))
    layer = StoredLayer(codes="int4", granularity=granularity, symmetric=symmetric, group_size=32)
    a, b = gptq(weight, torch.eye(96), layer), quantize_weight(weight, layer)
    assert torch.equal(a.codes, b.codes)
    assert torch.equal(a.scale, b.scale)
    assert symmetric or torch.equal(a.zero_point, b.zero_point)


@pytest.mark.parametrize("granularity", ["group", "channel"])
def test_gptq_loses_less_of_what_correlated_inputs_give(granularity: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 256, generator=generator)
    x = torch.randn(2000, 24, generator=generator) @ torch.randn(24, 256, generator=generator)
    x += 0.3 * torch.randn(2000, 256, generator=generator)
    layer = StoredLayer(codes="int4", granularity=granularity, group_size=32)
    errors = []
    for found in (gptq(weight, x.T @ x, layer), quantize_weight(weight, layer)):
        near = dequantize(found.codes, found.scale, found.zero_point)
        errors.append(float((x @ (near - weight).T).square().mean()))
    assert errors[0] < 0.6 * errors[1]


@pytest.mark.parametrize("granularity", ["group", "channel", "tensor"])
@pytest.mark.parametrize(("codes", "most"), [("int4", 0.96), ("int8", 0.999)])
def test_hqq_loses_less_of_weights_with_outliers(codes: Any, most: float, granularity: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 256, generator=generator)
    weight[torch.rand(64, 256, generator=generator) < 0.01] *= 8
    layer = StoredLayer(codes=codes, granularity=granularity, group_size=32 if granularity == "group" else None)
    errors = []
    for found in (hqq(weight, layer), quantize_weight(weight, layer)):
        near = dequantize(found.codes, found.scale, found.zero_point)
        errors.append(float((near - weight).square().mean()))
    assert errors[0] < most * errors[1]


@pytest.mark.parametrize("granularity", ["group", "channel", "tensor"])
def test_hqq_keeps_weights_that_are_on_the_grid_and_zeros(granularity: Any) -> None:
    layer = StoredLayer(codes="int4", granularity=granularity, group_size=32 if granularity == "group" else None)
    weight = torch.randint(-8, 8, (6, 64), generator=torch.Generator().manual_seed(0)) / 4
    weight[:, ::32] = -2.0  # the outermost code, in every group
    for exact in (weight, torch.zeros(6, 64)):
        found = hqq(exact, layer)
        assert torch.allclose(dequantize(found.codes, found.scale, None), exact, atol=1e-3)


def test_gptq_makes_four_bits_of_a_language_model_better(language: Folders, work: Any) -> None:
    step = {"codes": "int4", "granularity": "channel", "embeddings": False, "calibration_rows": 128}
    losses = [
        quality(quantize(work(language), Quantize.model_validate({**step, "method": method})).folder, language.dataset)
        for method in ("nearest", "gptq")
    ]
    whole = quality(language.model, language.dataset)["loss"]
    assert losses[1]["loss"] - whole < 0.7 * (losses[0]["loss"] - whole)


def test_rounded_inputs_are_felt(language: Folders, work: Any) -> None:
    weights_only = quantize(work(language), Quantize()).folder
    _, a = load_model(weights_only)
    assert not any(module._forward_pre_hooks for module in a.modules())
    static = quantize(workspace(language, weights_only.parent / "x"), Quantize(activations="static")).folder
    _, b = load_model(static)
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        assert not torch.equal(a(input_ids=ids).logits, b(input_ids=ids).logits)


def test_four_bits_are_packed_and_unpacked_unchanged() -> None:
    codes = torch.randint(-8, 8, (5, 13), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    packed = pack_int4(codes)
    assert packed.shape == (5, 2)
    assert torch.equal(unpack_int4(packed, (5, 13)), codes)


@pytest.mark.parametrize("step", [{"codes": "int8"}, {"codes": "int4", "granularity": "group"}])
def test_transformers_itself_reads_the_folder(language: Folders, work: Any, step: dict[str, Any]) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    result = quantize(work(language), Quantize.model_validate({**step, "embeddings": False})).folder
    theirs = AutoModelForCausalLM.from_pretrained(result, local_files_only=True, dtype=torch.float32)
    _, ours = load_model(result)
    ids = torch.arange(3, 43)[None]
    with torch.inference_mode():
        difference = (theirs(input_ids=ids).logits - ours(input_ids=ids).logits).abs().max()
    assert difference < 0.05


def test_a_convolutional_classifier_keeps_its_accuracy(digits: Folders, work: Any) -> None:
    result = quantize(work(digits), Quantize(activations="static")).folder
    task, model = load_model(result)
    rows = Dataset.open(digits.dataset).split("test").read(np.arange(400))
    right = np.mean([a["label"] for a in task.predict(model, list(rows["pixels"]))] == rows["label"])
    assert right > 0.95
    assert weight_bytes(digits.model) > 3.5 * weight_bytes(result)


@pytest.mark.parametrize("method", ["nearest", "hqq", "gptq"])
def test_four_bits_are_for_matrices_and_convolutions_keep_eight(digits: Folders, work: Any, method: Any) -> None:
    result = quantize(work(digits), Quantize(codes="int4", method=method)).folder
    _, model = load_model(result)
    compact = read_compact(result)
    assert compact is not None
    for name, layer in compact.quantized.items():
        assert layer.codes == ("int4" if model.get_submodule(name).weight.ndim == 2 else "int8")
    assert quality(result, digits.dataset)["accuracy"] > 0.95


def test_groups_that_do_not_divide_a_row_are_refused_by_name(digits: Folders, work: Any) -> None:
    with pytest.raises(ConfigError, match=r"body\.0 have 9 weights, no multiple of group_size=32"):
        quantize(work(digits), Quantize(granularity="group"))


def test_layers_to_skip_stay_exact(language: Folders, work: Any) -> None:
    result = quantize(work(language), Quantize(skip=("*.down_proj",))).folder
    compact = read_compact(result)
    assert compact is not None
    assert not [name for name in compact.quantized if name.endswith("down_proj")]
    name = "model.layers.0.mlp.down_proj"
    exact, kept = (load_model(folder)[1].get_submodule(name).weight for folder in (language.model, result))
    assert torch.equal(exact, kept)


def test_a_folder_without_one_of_its_scales_is_refused(language: Folders, work: Any) -> None:
    from safetensors.torch import load_file, save_file

    result = quantize(work(language), Quantize()).folder
    state = load_file(result / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight_scale"]
    save_file(state, result / "model.safetensors")
    with pytest.raises(IntegrityError, match="cannot be read"):
        load_model(result)


def test_a_quantized_model_is_not_quantized_again(language: Folders, work: Any) -> None:
    once = quantize(work(language), Quantize())
    with pytest.raises(ConfigError, match="is quantized already"):
        quantize(once, Quantize())
