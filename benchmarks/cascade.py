"""A small model that asks a large one when it is unsure: accuracy against the share and the bytes sent up.

    python benchmarks/cascade.py [--quick] [--json FILE] [--png FILE] [--max-accuracy-drop 0.02]

Data: scikit-learn's 1,797 handwritten digits (UCI), 8 x 8 pixels, 64 bytes each. 597 rows train both models: an MLP
with 8 hidden units and a CNN, both of the task image_classification. Of the other 1,200, half choose the threshold and
half prove it. Everything goes through the real parts: registry, model server, `CascadeBackend`.

`random` sends the same share up by lot; `drop_kept_share` is the share of seeds (each another split into training,
choice and proof, with models trained anew) whose accuracy on the 600 proof rows fell by no more than promised; those
rows' own chance counts against it. `refuted_share` is the share whose proof rows speak against the promise by more than
chance (95 %).
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits

from modelyard.artifacts import Parent, Registry, Store, VersionInfo
from modelyard.data.dataset import Column, DatasetInfo
from modelyard.serving.cascade.backend import CascadeBackend
from modelyard.serving.cascade.calibration import Observations, calibrate
from modelyard.serving.cascade.collect import observe_predictions
from modelyard.serving.cascade.config import CascadeConfig
from modelyard.serving.cascade.picture import draw_curve
from modelyard.serving.cascade.records import Calibration, Score, Target
from modelyard.serving.model_server import ModelServer
from modelyard.serving.server_config import ModelConfig, ServerConfig
from modelyard.tasks import ImageClassification
from modelyard.tasks.saving import write_task

TRAIN_ROWS = 597
SMALL = ImageClassification(architecture="mlp", hidden=8, dropout=0.0)
LARGE = ImageClassification(architecture="cnn", channels=(16, 32), hidden=64)


class Round(NamedTuple):
    """One seed."""

    calibration: Calibration
    live: dict[str, float]
    """What a `CascadeBackend` with that calibration did on the rows of the proof."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 seeds instead of 10")
    parser.add_argument("--max-accuracy-drop", type=float, default=0.02)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--png", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    target = Target(max_accuracy_drop=options.max_accuracy_drop)
    rounds = []
    for seed in range(2 if options.quick else 10):
        started = time.monotonic()
        rounds.append(run(seed, target))
        show(seed, rounds[-1], time.monotonic() - started, with_header=not seed)
    print("\nthe curve of seed 0, on the rows of its proof")
    show_curve(rounds[0].calibration)
    found = figures(rounds, target)
    print("\n" + "  ".join(f"{key} {value:.4g}" for key, value in found.items()))
    if options.png:
        draw_curve(rounds[0].calibration, options.png)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


def run(seed: int, target: Target) -> Round:
    """Train, register, calibrate, and serve the rows of the proof through the cascade."""
    data = load_digits()
    order = np.random.default_rng(seed).permutation(len(data.target))
    pixels = np.rint(data.images * 15.9375).astype(np.uint8)[order]
    labels = data.target.astype(np.int64)[order]
    seen, held_out = slice(None, TRAIN_ROWS), slice(TRAIN_ROWS, None)
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        registry = Registry(f"sqlite:///{home / 'mlflow.db'}", Store(str(home / "store"), home / "cache"))
        small = trained(SMALL, "digits-mlp", pixels[seen], labels[seen], registry, home, steps=200, seed=seed)
        large = trained(LARGE, "digits-cnn", pixels[seen], labels[seen], registry, home, steps=150, seed=seed)
        return asyncio.run(cascaded(registry, small, large, pixels[held_out], labels[held_out], target, seed))


def trained(
    task: ImageClassification,
    name: str,
    pixels: Any,
    labels: Any,
    registry: Registry,
    home: Path,
    *,
    steps: int,
    seed: int,
) -> VersionInfo:
    """A registered model."""
    columns = (Column(name="pixels", dtype="uint8", shape=(1, 8, 8)), Column(name="label", dtype="int64"))
    info = DatasetInfo(format="images", columns=columns, splits={}, classes=tuple("0123456789"))
    torch.manual_seed(seed)
    model = task.build(info, None).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.005, weight_decay=0.01)
    draw = np.random.default_rng(seed)
    for _ in range(steps):
        some = draw.integers(len(labels), size=64)
        batch = task.collate({"pixels": pixels[some][:, None], "label": labels[some]}, "cpu")
        optimizer.zero_grad()
        task.loss(model, batch).mean().backward()
        optimizer.step()
    folder = home / name
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    write_task(folder, task, info)
    return registry.register(registry.store.put(folder, kind="model", name=name))


async def cascaded(
    registry: Registry, small: VersionInfo, large: VersionInfo, pixels: Any, labels: Any, target: Target, seed: int
) -> Round:
    """The calibration, and what it does when it is served."""
    models = tuple(ModelConfig(reference=info.reference) for info in (small, large))
    server = ModelServer(ServerConfig(models=models, threads=1), registry)
    try:
        rows: Observations = await observe_predictions(server, small.name, large.name, list(pixels), labels.tolist())
        found = calibrate(
            rows,
            score=Score(kind="probability"),
            target=target,
            small=Parent(reference=small.reference, digest=small.digest),
            large=Parent(reference=large.reference, digest=large.digest),
            dataset=Parent(
                reference="sklearn:load_digits",
                digest=f"sha256:{hashlib.sha256(pixels.tobytes() + labels.tobytes()).hexdigest()}",
            ),
            seed=seed,
        )
        half = np.random.default_rng(seed).permutation(len(labels))[len(labels) // 2 :]
        config = CascadeConfig(name="digits", small=small.name, large=large.name, calibration=found)
        backend = CascadeBackend(
            server, [config], digest_of=lambda reference: registry.resolve(reference, "model").digest
        )
        await backend.start()
        answers = []
        for start in range(0, len(half), 50):
            answers += await backend.predict("digits", list(pixels[half[start : start + 50]]))
        counters = backend.counters()["digits"]
        right = [answer["label"] == label for answer, label in zip(answers, labels[half].tolist(), strict=True)]
        live = {"accuracy": statistics.fmean(right), "share_up": counters.share_up}
        live |= {"bytes_up": counters.bytes_up / len(half), "bytes_down": counters.bytes_down / len(half)}
        await backend.close()
        return Round(found, live)
    finally:
        await server.close()


def show(seed: int, one: Round, seconds: float, *, with_header: bool) -> None:
    """A line of the table."""
    proof, live = one.calibration.proof, one.live
    if with_header:
        print("seed  small %  large %  cascade %  random %  sent up %  bytes up/down  wrong kept %  threshold  T     s")
    by_lot = proof.accuracy_small + live["share_up"] * (proof.accuracy_large - proof.accuracy_small)
    print(
        f"{seed:4}{100 * proof.accuracy_small:9.2f}{100 * proof.accuracy_large:9.2f}{100 * live['accuracy']:11.2f}"
        f"{100 * by_lot:10.2f}{100 * live['share_up']:11.1f}{live['bytes_up']:9.1f}/{live['bytes_down']:4.1f}"
        f"{100 * (proof.figures.kept_error or 0):14.2f}{one.calibration.threshold:11.4f}"
        f"{one.calibration.temperature:6.2f}{seconds:5.0f}",
        flush=True,
    )


def show_curve(found: Calibration) -> None:
    """Accuracy, share and bytes at several thresholds."""
    print("threshold  accuracy %  sent up %  bytes up  bytes down  regret %")
    for point in found.curve[::4]:
        print(
            f"{point.threshold:9.4f}{100 * point.accuracy:12.2f}{100 * point.share_up:11.1f}{point.bytes_up:10.1f}"
            f"{point.bytes_down:12.1f}{100 * point.regret:10.2f}"
        )


def figures(rounds: list[Round], target: Target) -> dict[str, float]:
    """Medians over the seeds."""
    proofs = [one.calibration.proof for one in rounds]

    def median(values: list[float]) -> float:
        return statistics.median(values)

    drops = [p.accuracy_large - one.live["accuracy"] for p, one in zip(proofs, rounds, strict=True)]
    return {
        "accuracy_small": median([p.accuracy_small for p in proofs]),
        "accuracy_large": median([p.accuracy_large for p in proofs]),
        "accuracy_cascade": median([one.live["accuracy"] for one in rounds]),
        "share_up": median([one.live["share_up"] for one in rounds]),
        "bytes_up_over_large": median([one.live["bytes_up"] / 64 for one in rounds]),
        "accuracy_over_random": median(
            [
                one.live["accuracy"] - p.accuracy_small - one.live["share_up"] * (p.accuracy_large - p.accuracy_small)
                for p, one in zip(proofs, rounds, strict=True)
            ]
        ),
        "drop_kept_share": statistics.fmean(drop <= target.bound + 1e-9 for drop in drops),
        "refuted_share": statistics.fmean(one.calibration.is_refuted for one in rounds),
        "largest_drop": max(drops),
        "live_equals_proof": float(
            all(
                abs(one.live["accuracy"] - p.figures.accuracy) < 1e-9
                and abs(one.live["share_up"] - p.figures.share_up) < 1e-9
                for p, one in zip(proofs, rounds, strict=True)
            )
        ),
        "calibration_error": median([p.calibration_error or 0.0 for p in proofs]),
        "calibration_error_raw": median([p.calibration_error_raw or 0.0 for p in proofs]),
    }


if __name__ == "__main__":
    main()
