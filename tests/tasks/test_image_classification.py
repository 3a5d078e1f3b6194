"""Image classification: it learns real digits, is saved whole, and refuses what does not fit."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch.nn import functional

from modelyard.data.dataset import Column, Dataset
from modelyard.errors import ConfigError, DataError, InputError, IntegrityError
from modelyard.tasks import ImageClassification, load_model
from modelyard.tasks.image_models import jittered

from .conftest import images_info

Architecture = Literal["cnn", "mlp", "linear", "resnet18", "vit_tiny"]


def build(task: ImageClassification, seed: int = 0, **info: Any) -> torch.nn.Module:
    torch.manual_seed(seed)
    return task.build(images_info(**info), None)


def digits() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """scikit-learn's real digits, 1,437 to train on and 360 to test."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(1797)
    pixels, labels = data.images.astype(np.uint8)[:, None][order], data.target[order]
    return pixels[:1437], labels[:1437], pixels[1437:], labels[1437:]


@pytest.mark.parametrize("architecture", ["cnn", "mlp"])
def test_digits_are_told_apart_in_seconds(architecture: Literal["cnn", "mlp"]) -> None:
    task = ImageClassification(architecture=architecture)
    pixels, labels, test_pixels, test_labels = digits()
    model = build(task)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    started = time.perf_counter()
    for epoch in range(8):
        order = np.random.default_rng(epoch).permutation(len(labels))
        for start in range(0, len(order), 64):
            rows = order[start : start + 64]
            batch = task.collate({"pixels": pixels[rows], "label": labels[rows]}, "cpu")
            optimizer.zero_grad()
            task.loss(model, batch).mean().backward()
            optimizer.step()
    assert time.perf_counter() - started < 60
    with torch.inference_mode():
        batch = task.collate({"pixels": test_pixels, "label": test_labels}, "cpu")
        stats = task.statistics(model.eval(), batch)
    metrics = task.metrics({name: value.numpy() for name, value in stats.items()})
    assert metrics["accuracy"] >= 0.97
    assert metrics["macro_f1"] >= 0.97


def test_the_same_seed_builds_the_same_weights() -> None:
    task = ImageClassification()
    one, same, other = (build(task, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_a_row_counts_the_same_in_any_batch_even_while_training() -> None:
    task = ImageClassification(dropout=0.0)
    model = build(task).train()
    generator = np.random.default_rng(0)
    rows = {"pixels": generator.integers(0, 256, (6, 1, 8, 8)).astype(np.uint8), "label": np.arange(6)}
    whole = task.loss(model, task.collate(rows, "cpu"))
    parts = [task.loss(model, task.collate({k: v[i : i + 2] for k, v in rows.items()}, "cpu")) for i in (0, 2, 4)]
    torch.testing.assert_close(whole, torch.cat(parts), rtol=1e-5, atol=1e-6)


def test_jitter_moves_images_in_training_alone() -> None:
    task = ImageClassification(jitter=0.2, dropout=0.0)
    model = build(task)
    rows = {"pixels": digits()[0][:4], "label": digits()[1][:4]}
    batch = task.collate(rows, "cpu")
    plain = ImageClassification(dropout=0.0).loss(model, batch)
    assert not torch.allclose(task.loss(model.train(), batch), plain)
    assert torch.equal(task.loss(model.eval(), batch), ImageClassification().loss(model, batch))
    torch.testing.assert_close(jittered(batch["pixels"], 0.0), batch["pixels"].float())
    moved = jittered(batch["pixels"].repeat(64, 1, 1, 1), 0.2)
    assert moved.shape == (256, 1, 8, 8)
    assert 0 <= float(moved.min()) <= float(moved.max()) <= 16


def test_loss_is_the_negative_log_probability_of_the_label() -> None:
    task, model = ImageClassification(), build(ImageClassification()).eval()
    batch = task.collate({"pixels": np.full((2, 1, 8, 8), 3, np.uint8), "label": np.array([1, 7])}, "cpu")
    by_hand = -functional.softmax(model(batch["pixels"]), dim=1)[[0, 1], [1, 7]].log()
    torch.testing.assert_close(task.loss(model, batch), by_hand)


def test_the_range_of_the_pixels_does_not_matter() -> None:
    model = build(ImageClassification()).eval()
    pixels = np.random.default_rng(0).integers(0, 16, (3, 1, 8, 8)).astype(np.uint8)
    dim, bright = (model(torch.from_numpy(pixels * factor)) for factor in (1, 15))
    torch.testing.assert_close(dim, bright, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 64, 48), (1, 2, 2), (4, 1, 9)])
@pytest.mark.parametrize("architecture", ["cnn", "mlp"])
def test_images_of_any_size_fit(architecture: Literal["cnn", "mlp"], shape: tuple[int, ...]) -> None:
    task = ImageClassification(architecture=architecture, channels=(6, 10, 14))
    model = build(task, shape=shape, classes=3)
    assert model(torch.zeros(2, *shape, dtype=torch.uint8)).shape == (2, 3)


@pytest.mark.parametrize("architecture", ["linear", "resnet18", "vit_tiny"])
def test_the_well_known_networks_learn_real_digits(architecture: Architecture) -> None:
    """Zeros and ones, in a few steps: the wiring is right, from pixels to classes."""
    task = ImageClassification(architecture=architecture, dropout=0.0)
    pixels, labels, _, _ = digits()
    pixels, labels = pixels[labels < 2], labels[labels < 2]
    model = build(task, classes=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for start in 3 * list(range(0, 128, 16)):
        batch = task.collate({"pixels": pixels[start : start + 16], "label": labels[start : start + 16]}, "cpu")
        optimizer.zero_grad()
        task.loss(model, batch).mean().backward()
        optimizer.step()
    with torch.inference_mode():
        batch = task.collate({"pixels": pixels[128:192], "label": labels[128:192]}, "cpu")
        stats = task.statistics(model.eval(), batch)
    assert task.metrics({name: value.numpy() for name, value in stats.items()})["accuracy"] >= 0.95


@pytest.mark.parametrize(("architecture", "millions"), [("resnet18", 11.2), ("vit_tiny", 5.4)])
def test_the_well_known_networks_have_their_published_size(architecture: Architecture, millions: float) -> None:
    model = build(ImageClassification(architecture=architecture), shape=(3, 32, 32))
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)
    assert not [name for name, _ in model.named_buffers() if "running" in name], "no batch statistics"


def test_flops_are_those_of_the_layers() -> None:
    task = ImageClassification(architecture="mlp", hidden=16)
    assert task.flops_per_row(build(task)) == 3 * 2 * (64 * 16 + 16 * 10)
    cnn = ImageClassification(channels=(4,), hidden=8)
    expected = 2 * (4 * 64 * 9) + 2 * (4 * 16 * 8 + 8 * 10)
    assert cnn.flops_per_row(build(cnn)) == 3 * expected


@pytest.mark.parametrize("architecture", ["cnn", "mlp", "linear", "resnet18", "vit_tiny"])
@pytest.mark.parametrize("gathered", [True, False])
def test_a_saved_model_answers_identically(
    architecture: Literal["cnn", "mlp", "linear", "resnet18", "vit_tiny"],
    gathered: bool,
    images_folder: Path,
    tmp_path: Path,
) -> None:
    task = ImageClassification(architecture=architecture)
    model = build(task).eval()
    rows = Dataset.open(images_folder).split("test").read(np.arange(5))
    expected = model(torch.from_numpy(rows["pixels"]))
    state = {k: v.clone() for k, v in model.state_dict().items()} if gathered else None
    task.save(model, tmp_path / "model", images_folder, state)
    loaded_task, loaded = load_model(tmp_path / "model")
    assert loaded_task == task
    assert torch.equal(loaded(torch.from_numpy(rows["pixels"])), expected)
    assert {p.name for p in (tmp_path / "model").iterdir()} == {"model.safetensors", "task.json"}


def test_weights_of_another_model_are_refused(images_folder: Path, tmp_path: Path) -> None:
    task = ImageClassification()
    task.save(build(task), tmp_path / "model", images_folder)
    other = ImageClassification(hidden=64)
    other.save(build(other), tmp_path / "other", images_folder)
    (tmp_path / "other" / "model.safetensors").replace(tmp_path / "model" / "model.safetensors")
    with pytest.raises(IntegrityError, match="does not hold this model"):
        load_model(tmp_path / "model")


def test_predict_names_the_likeliest_class() -> None:
    task, model = ImageClassification(), build(ImageClassification())
    images = list(np.random.default_rng(0).integers(0, 17, (3, 1, 8, 8)).astype(np.uint8))
    answers = task.predict(model, images)
    with torch.inference_mode():
        shares = model.eval()(torch.from_numpy(np.stack(images))).softmax(dim=1)
    assert [answer["label"] for answer in answers] == shares.argmax(dim=1).tolist()
    assert [answer["probability"] for answer in answers] == pytest.approx(shares.amax(dim=1).tolist())
    assert task.predict(model, []) == []
    with pytest.raises(InputError, match=r"shape \(8, 8\), the model takes \(1, 8, 8\)"):
        task.predict(model, [np.zeros((8, 8), np.uint8)])
    with pytest.raises(InputError, match="no option 'temperature'"):
        task.predict(model, images, temperature=1)


def test_datasets_that_do_not_fit_are_refused(tokens_folder: Path) -> None:
    task = ImageClassification()
    with pytest.raises(DataError, match="needs a dataset of images, this one holds tokens"):
        task.check(Dataset.open(tokens_folder).info)
    with pytest.raises(DataError, match="names 1 classes"):
        task.check(images_info(classes=1))
    with pytest.raises(DataError, match="needs the columns 'pixels'"):
        task.check(images_info().with_changes(columns=(Column(name="label", dtype="int64"),)))
    with pytest.raises(ConfigError, match=r"task\.patch=3 does not divide images of 8 x 8 pixels"):
        ImageClassification(architecture="vit_tiny", patch=3).check(images_info())
    with pytest.raises(ConfigError, match="below 1"):
        ImageClassification(channels=(8, 0)).check(images_info())
