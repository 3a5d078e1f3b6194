"""Two real classifiers of scikit-learn's handwritten digits: a small MLP and a CNN, trained here in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file

from modelyard.data.dataset import Column, DatasetInfo
from modelyard.tasks import ImageClassification
from modelyard.tasks.saving import write_task

SMALL = ImageClassification(architecture="mlp", hidden=8, dropout=0.0)
LARGE = ImageClassification(architecture="cnn", channels=(16, 32), hidden=64)
TRAIN_ROWS = 597


class Digits(NamedTuple):
    """Rows that no model was trained on, (n, 8, 8) uint8 and (n,)."""

    pixels: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]


def info() -> DatasetInfo:
    """What the models know of their rows."""
    columns = (Column(name="pixels", dtype="uint8", shape=(1, 8, 8)), Column(name="label", dtype="int64"))
    return DatasetInfo(format="images", columns=columns, splits={}, classes=tuple("0123456789"))


def split(seed: int = 0) -> tuple[Digits, Digits]:
    """597 rows to train on, 1,200 that are held out."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(seed).permutation(len(data.target))
    pixels = np.rint(data.images * 15.9375).astype(np.uint8)[order]
    labels = data.target.astype(np.int64)[order]
    return Digits(pixels[:TRAIN_ROWS], labels[:TRAIN_ROWS]), Digits(pixels[TRAIN_ROWS:], labels[TRAIN_ROWS:])


def trained(task: ImageClassification, rows: Digits, folder: Path, *, steps: int, seed: int = 0) -> Path:
    """A model folder as training writes it."""
    torch.manual_seed(seed)
    model = task.build(info(), None).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.005, weight_decay=0.01)
    draw = np.random.default_rng(seed)
    for _ in range(steps):
        some = draw.integers(len(rows.labels), size=64)
        batch = task.collate({"pixels": rows.pixels[some][:, None], "label": rows.labels[some]}, "cpu")
        optimizer.zero_grad()
        task.loss(model, batch).mean().backward()
        optimizer.step()
    folder.mkdir(parents=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    write_task(folder, task, info())
    return folder
