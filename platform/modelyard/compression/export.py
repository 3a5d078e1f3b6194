"""A model for other runtimes, beside its weights; each file is compared with the source before it is kept."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from modelyard.compression.engines import (
    EXTRA,
    Engine,
    EngineName,
    Floats,
    Ints,
    LlamaCppEngine,
    gguf_to_ir,
    open_engine,
)
from modelyard.compression.program import save_program
from modelyard.compression.recipe import Export
from modelyard.compression.workspace import EXPORT_FOLDERS, Workspace, batches
from modelyard.errors import ConfigError, IntegrityError
from modelyard.extras import optional, quiet
from modelyard.tasks import Task
from modelyard.tasks.encoders import LENGTH, attention_mask

if TYPE_CHECKING:
    from torch import Tensor, nn

_ENGINES: dict[str, EngineName] = {
    "onnx": "onnx",
    "openvino": "openvino",
    "gguf": "openvino",  # the engine that serves these files; it shows scores, llama.cpp does not
    "torch_export": "torch_export",
}
_GREEDY_TOKENS = 16
_PUBLISHED_ROWS = 2
_SAME = 1e-4
"""Largest difference of scores, as a share of the largest, of the same files read twice."""
_ONNX_BYTES = 1 << 31
"""Most that one ONNX file holds, and its quantizer reads no others."""
_NAMES = ["inputs", "mask"]
"""Of what exported models take."""


class Agreement(NamedTuple):
    """How near two engines are on the same inputs."""

    max_difference: float
    """Largest difference of two scores, as a share of the source's largest score."""
    share: float
    """Share of the places where both find the same answer likeliest."""
    greedy: float | None
    """Share of the tokens of a greedy continuation that are the same up to the first that differs; None: no text."""


def export(work: Workspace, step: Export) -> Workspace:
    """Write the model for another runtime and verify it on held-out rows.

    Raises:
        ConfigError: the format has no place for this model.
        MissingExtraError: the runtime is not installed.
        IntegrityError: what was written computes something else.
    """
    folder = work.new_folder(step.format)
    shutil.copytree(work.folder, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json"))
    target = folder / EXPORT_FOLDERS[step.format]
    target.mkdir()
    is_text = work.task.kind == "causal_lm"
    if step.format == "onnx":
        _onnx(work, step, target)
    elif step.format == "torch_export":
        _, model = work.load()
        save_program(_scoring(model, work.task), _example(work), target)
    elif step.format == "gguf":
        _gguf(work, target)
    elif is_text:
        _language_ir(work, step, target)
    else:
        _classifier_ir(work, step, target)
    found = verify(work, step, folder)
    note = f"{step.format}: {found.share:.2%} of answers as before, scores differ by {found.max_difference:.2%} at most"
    if found.greedy is not None:
        note += f", greedy text the same for {found.greedy:.0%}"
    return work.moved(folder, note)


def verify(work: Workspace, step: Export, folder: Path) -> Agreement:
    """Run both on held-out rows.

    Raises:
        IntegrityError: they agree less than the step asks for.
    """
    threads = work.recipe.target.threads
    source = open_engine("torch", work.folder, threads)
    other = open_export(work, step.format, folder)
    inputs, *masks = (each.numpy() for each in _held_out(work, step.verify_rows))
    found = compare(source, other, inputs, masks[0] if masks else None)
    limit = step.max_difference
    if found.share < step.min_agreement or (limit is not None and found.max_difference > limit):
        raise IntegrityError(
            f"the {step.format} export is not the model: {found.share:.2%} of {inputs.shape[0]} rows' answers agree "
            f"(min_agreement={step.min_agreement:g}), scores differ by {found.max_difference:.2%}"
            + (f" (max_difference={limit:g})" if limit is not None else ""),
            "quantize less, or lower the limit if this is good enough",
        )
    return found


def open_export(work: Workspace, form: str, folder: Path) -> Engine:
    """The export in `folder`, on an engine that shows scores."""
    prepared = None
    if form == "gguf":  # not an OpenVINO export that may be beside it
        prepared = gguf_to_ir(folder / EXPORT_FOLDERS[form] / "model.gguf", work.new_folder("ir"))
    return open_engine(_ENGINES[form], folder, work.recipe.target.threads, prepared)


def check_published(work: Workspace, folder: Path) -> None:
    """Load the weights, and every export beside them, from where they are published; they must answer as in `work`.

    Raises:
        IntegrityError: what was published cannot be read, or computes something else than what was measured.
    """
    for form in ["weights", *(form for form, name in EXPORT_FOLDERS.items() if (work.folder / name).is_dir())]:
        measured, published = _answers(work, form, work.folder), _answers(work, form, folder)
        difference = float(np.abs(measured - published).max() / np.abs(measured).max())
        if not difference <= _SAME:  # NaN is not the same
            raise IntegrityError(
                f"not registered: scores of the published {form} are not those that were measured, "
                f"they differ by {difference:.2%}",
                "check the disk of the store, and compress again",
            )


def _answers(work: Workspace, form: str, folder: Path) -> Floats:
    """Scores of held-out rows by the weights or an export in `folder`."""
    inputs, *masks = (each.numpy() for each in _held_out(work, _PUBLISHED_ROWS))
    threads = work.recipe.target.threads
    engine = open_engine("torch", folder, threads) if form == "weights" else open_export(work, form, folder)
    return engine.scores(inputs, masks[0] if masks else None)


def compare(source: Engine, other: Engine, inputs: npt.NDArray[Any], mask: Ints | None = None) -> Agreement:
    """Agreement of two engines on tokens (B, T), for encoders with their mask (B, T), or on pixels (B, C, H, W)."""
    a, b = source.scores(inputs, mask), other.scores(inputs, mask)
    if mask is not None and a.ndim == 3:
        a, b = a[mask == 1], b[mask == 1]
    width = min(a.shape[-1], b.shape[-1])  # GGUF leaves out rows of the embedding that belong to no token
    a, b = a[..., :width], b[..., :width]
    difference = float(np.abs(a - b).max() / np.abs(a).max())
    share = float((a.argmax(axis=-1) == b.argmax(axis=-1)).mean())
    greedy = None
    if mask is None and inputs.ndim == 2 and not isinstance(other, LlamaCppEngine):
        prompt = inputs[0, : inputs.shape[1] // 2].tolist()
        left, right = (e.generate(prompt, min(_GREEDY_TOKENS, len(prompt))).ids for e in (source, other))
        same = [x == y for x, y in zip(left, right, strict=True)]
        greedy = (same.index(False) if False in same else len(same)) / len(same)
    return Agreement(difference, share, greedy)


def _held_out(work: Workspace, rows: int) -> tuple[Tensor, ...]:
    return _inputs(next(batches(work.task, work.dataset, work.recipe.split, rows, batch_size=rows)))


def _inputs(batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Tokens or pixels, which come first in every task; of padded texts their mask too."""
    first = next(iter(batch.values()))
    return (first, attention_mask(batch)) if LENGTH in batch else (first,)


def _feed(batch: dict[str, Tensor]) -> dict[str, npt.NDArray[Any]]:
    return {name: each.numpy() for name, each in zip(_NAMES, _inputs(batch), strict=False)}


def _example(work: Workspace) -> tuple[Tensor, ...]:
    return _held_out(work, 2)


def _scoring(model: nn.Module, task: Task) -> nn.Module:
    """A module from tokens (and their mask), or pixels, to one tensor of scores."""
    from torch import nn

    is_text = task.kind == "causal_lm"

    class Scoring(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
            if mask is not None:
                result: Tensor = self.model(input_ids=inputs, attention_mask=mask).logits
            elif is_text:
                result = self.model(input_ids=inputs, use_cache=False).logits
            else:
                result = self.model(inputs)
            return result

    if hasattr(model, "config"):
        settings: Any = model
        settings.config._attn_implementation = "eager"  # its mask has no branch on the data
    return Scoring().eval()


def _onnx(work: Workspace, step: Export, target: Path) -> None:
    """Scores of whole texts or of images; for texts there is no cache of keys and values in it."""
    import torch

    optional("onnx", "onnx", EXTRA)
    optional("onnxscript", "onnxscript", EXTRA)
    _, model = work.load()
    size = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    if step.quantize != "none" and size >= _ONNX_BYTES:
        raise ConfigError(
            f"steps.export.quantize: the onnx quantizer reads at most 2 GiB, the model has {size / 2**30:.1f} in fp32",
            "choose format openvino or gguf, or quantize none",
        )
    example = _example(work)
    batch = torch.export.Dim("batch", min=1, max=1 << 16)
    longest = getattr(getattr(model, "config", None), "max_position_embeddings", None) or 1 << 16
    length = torch.export.Dim("length", min=2, max=int(longest))
    path = target / "model.onnx"
    with quiet(), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _scoring(model, work.task),
            example,
            str(path),
            input_names=_NAMES[: len(example)],
            output_names=["scores"],
            dynamic_shapes=tuple({0: batch, 1: length} if each.ndim == 2 else {0: batch} for each in example),
            dynamo=True,
            external_data=work.task.kind == "causal_lm" and step.quantize == "none",
            verbose=False,
        )
    if step.quantize != "none":
        _quantize_onnx(work, step, path)


def _quantize_onnx(work: Workspace, step: Export, path: Path) -> None:
    is_image = work.task.kind == "image_classification"
    library = optional("onnxruntime.quantization", "onnxruntime", EXTRA)
    full = path.with_name("full.onnx")
    with quiet():
        library.shape_inference.quant_pre_process(str(path), str(full), skip_symbolic_shape=True)
    for file in path.parent.iterdir():
        if file != full and not file.name.startswith("full"):
            file.unlink()

    class Rows(library.CalibrationDataReader):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            self._batches: Iterator[dict[str, Tensor]] = work.calibration_batches(step.calibration_rows)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self._batches, None)
            return None if batch is None else _feed(batch)

    with quiet():
        if step.quantize == "int8_dynamic":
            library.quantize_dynamic(str(full), str(path), per_channel=True, weight_type=library.QuantType.QInt8)
        else:
            library.quantize_static(
                str(full),
                str(path),
                Rows(),
                per_channel=True,
                activation_type=library.QuantType.QUInt8 if is_image else library.QuantType.QInt8,
                weight_type=library.QuantType.QInt8,
            )
    for file in path.parent.glob("full*"):
        file.unlink()


def _gguf(work: Workspace, target: Path) -> None:
    from modelyard.serving.export import write_gguf

    if work.task.kind != "causal_lm":
        raise ConfigError("steps.export.format: GGUF holds language models only", "choose onnx or openvino")
    _, model = work.load()
    write_gguf(model, work.folder, target / "model.gguf")


def _language_ir(work: Workspace, step: Export, target: Path) -> None:
    """A stateful IR with a cache; 8-bit weights, or 4-bit ones by NNCF or where the model's own have 4."""
    from modelyard.serving.export import write_gguf

    openvino = optional("openvino", "openvino-genai", EXTRA)
    _, model = work.load()
    scratch = work.new_folder("ir")
    write_gguf(model, work.folder, scratch / "model.gguf", exact=step.quantize != "none")
    path = gguf_to_ir(scratch / "model.gguf", scratch)
    if step.quantize != "none":
        nncf = optional("nncf", "nncf", EXTRA)
        by_inputs = {}
        if step.quantize == "int4_awq":
            rows = [_generating(b) for b in work.calibration_batches(step.calibration_rows, batch_size=1)]
            by_inputs = {"awq": True, "scale_estimation": True, "dataset": nncf.Dataset(rows), "subset_size": len(rows)}
        with quiet():
            smaller = nncf.compress_weights(
                openvino.Core().read_model(path),
                mode=nncf.CompressWeightsMode.INT4_SYM,
                group_size=32,
                ratio=1.0,
                **by_inputs,
            )
            openvino.save_model(smaller, target / "openvino_model.xml", compress_to_fp16=False)
        for name in ("openvino_tokenizer", "openvino_detokenizer"):
            for suffix in (".xml", ".bin"):
                shutil.copyfile(path.with_name(name + suffix), target / (name + suffix))
    else:
        for file in path.parent.iterdir():
            shutil.move(file, target / file.name)


def _generating(batch: dict[str, Tensor]) -> dict[str, npt.NDArray[Any]]:
    """What a stateful language model takes for a whole text."""
    ids = _inputs(batch)[0].numpy()
    places = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int64), ids.shape)
    return {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "position_ids": np.ascontiguousarray(places),
        "beam_idx": np.arange(ids.shape[0], dtype=np.int32),
    }


def _classifier_ir(work: Workspace, step: Export, target: Path) -> None:
    import torch

    openvino = optional("openvino", "openvino-genai", EXTRA)
    _, model = work.load()
    example = _example(work)
    shapes = [[-1, -1] if each.ndim == 2 else [-1, *each.shape[1:]] for each in example]
    with quiet(), torch.no_grad():
        converted = openvino.convert_model(_scoring(model, work.task), example_input=example)
        converted.reshape(dict(zip(converted.inputs, shapes, strict=True)))
        if step.quantize == "int8_static":
            nncf = optional("nncf", "nncf", EXTRA)
            rows = [list(_feed(b).values()) for b in work.calibration_batches(step.calibration_rows)]
            kind = {} if work.task.kind == "image_classification" else {"model_type": nncf.ModelType.TRANSFORMER}
            converted = nncf.quantize(converted, nncf.Dataset(rows), subset_size=len(rows), **kind)
        openvino.save_model(converted, target / "openvino_model.xml", compress_to_fp16=False)
