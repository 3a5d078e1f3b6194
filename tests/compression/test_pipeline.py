"""From a registered model and a recipe to a registered result, or to a refusal that names the limit."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml
from tests.compression.conftest import Folders

from modelyard.artifacts import Registry, Store
from modelyard.compression import Recipe, compress
from modelyard.compression.measuring import Figures
from modelyard.compression.pipeline import remarks, scratch_folder
from modelyard.compression.recipe import Limits
from modelyard.compression.report import Report, broken_limits
from modelyard.compression.silence import errors_only
from modelyard.data.dataset import Dataset
from modelyard.errors import ConfigError, DataError, IntegrityError, LimitError
from modelyard.tasks import load_model

INT8 = {"kind": "quantize", "codes": "int8", "granularity": "group", "group_size": 32}
QUICK = {"rows": 8, "prompt_tokens": 8, "new_tokens": 8, "repeats": 1}
Register = Callable[[Folders, str], tuple[str, str]]


def recipe(dataset: str, *steps: dict[str, Any], **more: Any) -> Recipe:
    return Recipe.model_validate({"dataset": dataset, "steps": steps, "measuring": QUICK, **more})


@pytest.mark.slow
def test_a_language_model_in_a_smaller_one_out_and_served(
    language: Folders, registered: Register, registry: Registry
) -> None:
    pytest.importorskip("torchao")
    pytest.importorskip("openvino_genai")
    model, dataset = registered(language, "tiny")
    limits = {"max_perplexity_increase": 0.02, "min_size_ratio": 3.0}
    done = compress(model, recipe(dataset, INT8, name="tiny-int8", target={"engine": "openvino"}, limits=limits))
    assert done.model == "models:/tiny-int8/1"
    version, folder = registry.open(done.model)
    assert version.metrics["compression/size_ratio"] == pytest.approx(done.report.size_ratio)
    manifest = registry.store.manifest("model", version.digest)
    assert [parent.reference for parent in manifest.parents] == [model, dataset]
    assert done.picture.read_bytes().startswith(b"\x89PNG")
    task, loaded = load_model(folder)
    assert len(task.predict(loaded, ["The for statement"], max_new_tokens=4, temperature=0)[0]) > 0
    assert _served_answer(done.model, registry)


def _served_answer(reference: str, registry: Registry) -> list[int]:
    from modelyard.serving.engines.choice import Machine
    from modelyard.serving.loading import describe, load
    from modelyard.serving.protocol import EngineRequest, Sampling
    from modelyard.serving.server_config import ModelConfig

    config = ModelConfig(reference=reference, cache_mib=16, context_tokens=64)
    entry = describe(config, registry, Machine.here())
    assert entry.choice.engine in ("openvino", "vllm")

    async def ask() -> list[int]:
        served: Any = load(entry, threads=1)
        try:
            sampling = Sampling(temperature=0.0, max_tokens=4)
            return [
                n async for tokens in served.engine.stream(EngineRequest("1", [5, 6, 7], sampling)) for n in tokens.ids
            ]
        finally:
            await served.close()

    return asyncio.run(ask())


@pytest.mark.slow
def test_a_result_that_breaks_a_limit_is_not_registered(
    language: Folders, registered: Register, registry: Registry
) -> None:
    model, dataset = registered(language, "tiny")
    ruin = {"kind": "prune", "sparsity": 0.95}
    with pytest.raises(LimitError, match=r"max_perplexity_increase=0\.02: perplexity rose by"):
        compress(model, recipe(dataset, ruin, name="ruined", limits={"max_perplexity_increase": 0.02}))
    assert registry.versions("model", "ruined") == []


@pytest.mark.slow
def test_what_is_damaged_on_its_way_into_the_store_is_not_registered(
    digits: Folders, registered: Register, registry: Registry, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    model, dataset = registered(digits, "digits")
    put = Store.put

    def damaging(store: Store, folder: Path, **about: Any) -> Any:
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy)
        state = load_file(copy / "model.safetensors")
        save_file({name: tensor + 1 for name, tensor in state.items()}, copy / "model.safetensors")
        return put(store, copy, **about)

    monkeypatch.setattr(Store, "put", damaging)
    with pytest.raises(IntegrityError, match="not registered: scores of the published weights are not those"):
        compress(model, recipe(dataset, {"kind": "prune", "sparsity": 0.1}, name="damaged"))
    assert registry.versions("model", "damaged") == []


@pytest.mark.slow
def test_libraries_write_nothing_to_the_terminal(
    digits: Folders, registered: Register, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    for needed in ("onnxruntime", "onnxscript", "nncf"):
        pytest.importorskip(needed)
    model, dataset = registered(digits, "digits")
    exports = [{"kind": "export", "format": name, "quantize": "int8_static"} for name in ("onnx", "openvino")]
    capfd.readouterr()
    caplog.clear()
    compress(model, recipe(dataset, *exports, target={"engine": "onnx"}))
    assert capfd.readouterr() == ("", "")
    shown = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert [(record.name, record.getMessage()) for record in shown] == []


@pytest.mark.parametrize(
    ("logger", "file"),
    [("root", "onnxruntime/quantization/quantize.py"), ("DeepSpeed", "real_accelerator.py"), ("ray.serve", "api.py")],
)
def test_libraries_are_silenced_for_a_while_but_not_their_errors(logger: str, file: str) -> None:
    def is_shown(level: int, path: str = f"/lib/{file}") -> bool:
        record = logging.LogRecord(logger, level, path, 1, "said", None, None)
        return bool(logging.getLogger(None if logger == "root" else logger).filter(record))

    with errors_only():
        assert not is_shown(logging.WARNING)
        assert is_shown(logging.ERROR)
        assert is_shown(logging.WARNING, "/home/me/ours.py") == (logger == "root")
    assert is_shown(logging.WARNING)


@pytest.mark.slow
def test_a_classifier_is_measured_on_onnx(digits: Folders, registered: Register, registry: Registry) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, dataset = registered(digits, "digits")
    export = {"kind": "export", "format": "onnx", "quantize": "int8_static", "verify_rows": 64}
    measuring = {"repeats": 1}
    done = compress(
        model,
        recipe(dataset, export, target={"engine": "onnx"}, measuring=measuring, limits={"max_accuracy_drop": 0.01}),
    )
    assert done.model == "models:/digits-compressed/1"
    assert done.report.after.peak_memory_mib < done.report.before.peak_memory_mib
    assert done.report.latency_ratio > 1
    task, loaded = load_model(registry.open(done.model)[1])
    images = Dataset.open(digits.dataset).split("test").read(np.arange(4))["pixels"]
    assert len(task.predict(loaded, list(images))) == 4


def test_the_wrong_dataset_is_refused_before_any_work(language: Folders, digits: Folders, registered: Register) -> None:
    model, _ = registered(language, "tiny")
    _, dataset = registered(digits, "digits")
    with pytest.raises(DataError, match="the model was trained on tokens, the dataset holds images"):
        compress(model, recipe(dataset, INT8))


@pytest.mark.parametrize(
    ("step", "problem"),
    [
        ({"kind": "quantize", "codes": "int4", "activations": "static"}, "weights only"),
        (
            {"kind": "quantize", "group_size": 64},
            "group_size=64 is for granularity group .got granularity=channel.: set",
        ),
        ({"kind": "quantize", "percentile": 99}, "percentile=99 is for static scales .got activations=none.: set"),
        ({"kind": "quantize", "method": "hqq", "symmetric": False}, "hqq puts zero points between two codes"),
        ({"kind": "quantize", "method": "hqq", "codes": "fp8"}, "method hqq is for int8 and int4"),
        ({"kind": "quantize", "method": "gptq", "training": {}}, "leave method or training out"),
        ({"kind": "prune", "criterion": "movement"}, "give `training`"),
        ({"kind": "shrink"}, "nothing to remove"),
        ({"kind": "shrink", "mlp": 0.5, "rounds": 3}, "without `training`"),
        ({"kind": "export", "format": "gguf", "quantize": "int4"}, "takes quantize none"),
        ({"kind": "distill", "training": {"distillation": {"student_text": 0.8, "teacher_text": 0.8}}}, "above 1"),
    ],
)
def test_recipes_that_cannot_work_are_refused_when_they_are_read(
    tmp_path: Path, step: dict[str, Any], problem: str
) -> None:
    import yaml

    from modelyard.config import load

    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"dataset": "datasets:/d", "steps": [step]}))
    with pytest.raises(ConfigError, match=problem):
        load(Recipe, path)


def figures(**changes: Any) -> Figures:
    plain: dict[str, Any] = {
        "engine": "torch",
        "size_bytes": 400,
        "quality": {"perplexity": 10.0, "accuracy": 0.99},
        "latency_p50_ms": 10.0,
        "latency_p99_ms": 20.0,
        "first_token_ms": 30.0,
        "per_s": 100.0,
        "per_cpu_s": 100.0,
        "scored_per_cpu_s": 1000.0,
        "peak_memory_mib": 300.0,
    }
    return Figures(**{**plain, **changes})


def test_every_limit_is_judged_with_both_numbers() -> None:
    worse = figures(size_bytes=200, quality={"perplexity": 11.0}, latency_p99_ms=50.0, per_cpu_s=120.0)
    report = Report(("perplexity", "min"), figures(), worse, "token")
    limits = Limits(
        max_perplexity_increase=0.02, min_size_ratio=3, min_speedup=1.8, max_p99_ms=40, max_peak_memory_mib=200
    )
    broken = broken_limits(report, limits)
    assert [line.partition(":")[0] for line in broken] == [
        "max_perplexity_increase=0.02",
        "min_size_ratio=3",
        "min_speedup=1.8",
        "max_p99_ms=40",
        "max_peak_memory_mib=200",
    ]
    assert "rose by 0.1" in broken[0]
    wide = Limits(max_perplexity_increase=0.2, min_size_ratio=1.5, min_speedup=1.1)
    assert broken_limits(report, wide) == []


def test_a_report_says_that_zeros_bring_no_speed() -> None:
    pruned = remarks(recipe("datasets:/d", {"kind": "prune"}))
    report = Report(("perplexity", "min"), figures(), figures(), "token", pruned)
    assert "no speed, no size" in report.lines()[-1]
    assert report.as_dict()["remarks"] == list(pruned)
    assert "2:4" in remarks(recipe("datasets:/d", {"kind": "prune", "pattern": "2:4"}))[0]
    assert remarks(recipe("datasets:/d", {"kind": "shrink", "mlp": 0.5})) == ()


@pytest.mark.parametrize(
    ("engine", "exports", "named"),
    [
        ("torch", ["onnx"], {"onnx": "--target.engine=onnx"}),
        ("torch", ["gguf", "torch_export"], {"gguf": "--target.engine=llamacpp", "torch_export": "no target.engine"}),
        ("onnx", ["onnx", "openvino"], {"openvino": "--target.engine=openvino"}),
        ("openvino", ["gguf"], {}),
        ("openvino", ["gguf", "openvino"], {"gguf": "--target.engine=llamacpp"}),
    ],
)
def test_a_report_names_each_export_that_was_not_measured(
    engine: str, exports: list[str], named: dict[str, str]
) -> None:
    steps = [{"kind": "export", "format": form} for form in exports]
    found = remarks(recipe("datasets:/d", *steps, target={"engine": engine}))
    assert len(found) == len(named)
    for line, (form, how) in zip(found, named.items(), strict=True):
        assert line.startswith(f"the {form} export ")
        assert how in line


def test_a_report_says_when_the_quality_is_torchs() -> None:
    found = remarks(recipe("datasets:/d", {"kind": "export", "format": "gguf"}, target={"engine": "llamacpp"}))
    assert len(found) == 1
    assert found[0].startswith("quality is that of the weights on torch")


def test_too_many_threads_are_refused_before_the_model_is_looked_for(registry: Registry) -> None:
    with pytest.raises(ConfigError, match=r"target\.threads"):
        compress("models:/nothing", recipe("datasets:/nothing", INT8, target={"threads": 100_000}))


def test_a_scratch_folder_outlives_its_use_only_until_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with scratch_folder() as folder:
        left_over = folder.with_name(f"{folder.name}-killed")
        (left_over / "step").mkdir(parents=True)
        with scratch_folder() as other:
            assert folder.is_dir()  # its process lives
            assert not left_over.exists()
            assert other != folder
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_leaves_neither_a_measuring_process_nor_files(
    digits: Folders, registered: Register, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    model, dataset = registered(digits, "digits")
    path = tmp_path / "recipe.yaml"
    endless = {"dataset": dataset, "steps": [{"kind": "prune"}], "measuring": {"repeats": 1_000_000}}
    path.write_text(yaml.safe_dump(endless))
    scratch = tmp_path / "tmp"
    scratch.mkdir()
    command = [str(Path(sys.executable).with_name("modelyard")), "compress", model, "--recipe", str(path)]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(scratch)}, cwd=tmp_path
    )
    try:
        until(lambda: process.poll() is not None or len(_measuring(process.pid)) == 1, timeout_s=120)
        assert process.poll() is None, process.communicate()
        [child] = _measuring(process.pid)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    until(lambda: not child.is_running(), timeout_s=60)
    if number == signal.SIGTERM:
        assert process.returncode == 130
        assert said.endswith("interrupted\n")
    else:
        monkeypatch.setattr(tempfile, "tempdir", str(scratch))
        assert len(list(scratch.glob("modelyard-*"))) == 1
        with scratch_folder():
            pass
    assert list(scratch.glob("modelyard-*")) == []


def _measuring(parent: int) -> list[psutil.Process]:
    """Its processes that read a model already."""
    found = []
    for one in psutil.Process(parent).children():
        with suppress(psutil.Error):  # another child, gone since
            if "modelyard.compression.measuring" in one.cmdline() and one.cpu_times().user > 1:
                found.append(one)
    return found


def until(holds: Callable[[], bool], timeout_s: float) -> None:
    end = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < end, f"not within {timeout_s:g} s"
        time.sleep(0.1)
