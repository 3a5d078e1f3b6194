"""Semantic segmentation: it tells ink from ground, counts pixels exactly, is saved whole, refuses what does not fit."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torch import nn

from modelyard.data.dataset import Dataset
from modelyard.errors import ConfigError, DataError, InputError
from modelyard.tasks import SemanticSegmentation
from modelyard.tasks.language_models import PretrainedModel
from modelyard.tasks.semantic_segmentation import IGNORED, SegformerModel

from .conftest import assert_saved_whole, images_info, measure, row_losses, train
from .scenes import SIDE, masks_info, scene_rows, scenes_folder

TINY = SegformerModel(stride=2, widths=(8, 16, 24, 32), heads=(1, 1, 1, 1), decoder_width=16, dropout=0.0)
TASK = SemanticSegmentation(model=TINY)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Canvases with real digits, zeros and ones."""
    return scenes_folder(tmp_path_factory.mktemp("scenes") / "data", masks_info())


@pytest.fixture(scope="module")
def trained(folder: Path) -> nn.Module:
    """A model that has learnt for some seconds."""
    return train(TASK, folder, 80, rate=5e-3)


def columns(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: rows[name] for name in ("pixels", "mask")}


class Fixed(nn.Module):
    """A model that gives the same scores for any picture."""

    def __init__(self, scores: torch.Tensor) -> None:
        super().__init__()
        self.scores = nn.Parameter(scores)
        self.config: Any = type("Config", (), {"image_mean": [0.5], "image_std": [0.5]})

    def forward(self, pixel_values: torch.Tensor) -> Any:
        return type("Output", (), {"logits": self.scores.expand(len(pixel_values), -1, -1, -1)})


def test_ink_is_told_from_ground_and_digits_from_each_other(trained: nn.Module, folder: Path) -> None:
    stats = measure(TASK, trained, folder)
    metrics = TASK.metrics(stats)
    ground = stats["true"][:, 0].sum() / stats["true"].sum()
    assert metrics["mean_iou"] > ground / 3 + 0.1, "better than calling all of it ground"
    assert metrics["pixel_accuracy"] > ground


def test_figures_are_those_of_pixels_counted_by_hand() -> None:
    """Truth 0 0 1 2, of which the model says 0 1 1 1; a fifth pixel does not count."""
    scores = torch.tensor([[[[9.0, 0, 0, 0, 0]], [[0, 9.0, 9, 9, 0]], [[0.0, 0, 0, 0, 9]]]])
    rows = {"pixels": np.zeros((1, 3, 1, 5), np.uint8), "mask": np.array([[[0, 0, 1, 2, IGNORED]]], np.uint8)}
    stats = TASK.statistics(Fixed(scores), TASK.collate(rows, "cpu"))
    found = {name: values.detach().numpy() for name, values in stats.items()}
    assert {name: found[name].tolist() for name in ("hit", "found", "true")} == {
        "hit": [[1, 1, 0]],
        "found": [[1, 3, 0]],
        "true": [[2, 1, 1]],
    }
    metrics = TASK.metrics(found)
    assert metrics["mean_iou"] == pytest.approx((1 / 2 + 1 / 3 + 0) / 3)
    assert metrics["pixel_accuracy"] == pytest.approx(2 / 4)
    table: dict[str, Any] = dict(TASK.class_table(found, masks_info()))
    assert [round(score.iou, 4) for score in table.values()] == [0.5, 0.3333, 0.0]
    assert [score.support for score in table.values()] == [2, 1, 1]


def test_the_overlap_loss_is_one_less_the_dice_of_the_classes_of_a_row() -> None:
    """Truth 0 0 1 (2 does not occur), said with certainty 0 1 1: Dice 2/3 for both classes."""
    scores = torch.tensor([[[[90.0, 0, 0, 0]], [[0, 90.0, 90, 0]], [[0.0, 0, 0, 90]]]])
    rows = {"pixels": np.zeros((1, 3, 1, 4), np.uint8), "mask": np.array([[[0, 0, 1, IGNORED]]], np.uint8)}
    batch, model = TASK.collate(rows, "cpu"), Fixed(scores)
    plain, both = (TASK.with_changes(overlap_weight=weight).loss(model, batch) for weight in (0.0, 2.0))
    assert plain.item() == pytest.approx(90 / 3)
    assert (both - plain).item() == pytest.approx(2 * (1 - 2 / 3), rel=1e-4)


def test_a_class_that_nobody_sees_does_not_lower_the_mean() -> None:
    stats = {"hit": np.array([[3, 0]]), "found": np.array([[4, 0]]), "true": np.array([[3, 0]]), "nll": np.zeros(1)}
    assert TASK.metrics(stats)["mean_iou"] == pytest.approx(0.75)


def test_pixels_that_do_not_count_change_nothing() -> None:
    torch.manual_seed(0)
    model = TASK.build(masks_info(), None).eval()
    rows = columns(scene_rows(2))
    rows["mask"][:, :16] = IGNORED
    other = {**rows, "mask": np.where(rows["mask"] == IGNORED, IGNORED, rows["mask"])}
    assert torch.equal(row_losses(TASK, model, rows), row_losses(TASK, model, other))
    nothing = {**rows, "mask": np.full_like(rows["mask"], IGNORED)}
    assert row_losses(TASK, model, nothing).tolist() == [0.0, 0.0]
    assert int(TASK.statistics(model, TASK.collate(nothing, "cpu"))["true"].sum()) == 0


def test_a_row_counts_the_same_in_any_batch_even_while_training() -> None:
    """Batch normalisation keeps to its own mean: neither rows nor workers see each other."""
    torch.manual_seed(0)
    model = TASK.build(masks_info(), None).train()
    rows = columns(scene_rows(6))
    whole = row_losses(TASK, model, rows)
    parts = [row_losses(TASK, model, {k: v[i : i + 2] for k, v in rows.items()}) for i in (0, 2, 4)]
    torch.testing.assert_close(whole, torch.cat(parts), rtol=1e-4, atol=1e-5)


def test_a_saved_model_is_whole_and_others_read_it_alike(trained: nn.Module, folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSemanticSegmentation

    assert_saved_whole(TASK, trained, folder, tmp_path)
    pixels = torch.rand(2, 3, SIDE, SIDE)
    plain = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "own").eval()
    with torch.inference_mode():
        torch.testing.assert_close(plain(pixels).logits, trained(pixel_values=pixels).logits)


def test_a_folder_can_be_gone_on_from_with_its_own_normalisation(folder: Path, tmp_path: Path) -> None:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "num_attention_heads": [1] * 4}
    config = SegformerConfig(**sizes, decoder_hidden_size=16, num_labels=7)
    base = SegformerForSemanticSegmentation(config)
    base.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "preprocessor_config.json").write_text(
        '{"image_mean": [0.1, 0.2, 0.3], "image_std": [1.0, 1.0, 1.0]}'
    )
    task = SemanticSegmentation(model=PretrainedModel(pretrained=str(tmp_path / "base")))
    model: Any = task.build(masks_info(), None)
    assert model.config.num_labels == 3
    assert model.config.image_mean == [0.1, 0.2, 0.3]
    name = next(name for name, _ in base.named_parameters() if "decode_head" not in name)
    assert torch.equal(dict(base.named_parameters())[name], dict(model.named_parameters())[name])
    assert_saved_whole(task, model, folder, tmp_path)


def test_the_mask_has_the_size_of_the_picture_that_was_given(trained: nn.Module, folder: Path) -> None:
    rows = Dataset.open(folder).split("test").read(np.arange(2))
    large = np.kron(rows["pixels"][0], np.ones((1, 2, 3), np.uint8))
    small, other = TASK.predict(trained, [rows["pixels"][0], large])
    masks = [np.asarray(Image.open(io.BytesIO(base64.b64decode(one["mask"])))) for one in (small, other)]
    assert masks[0].shape == (SIDE, SIDE)
    assert masks[1].shape == (2 * SIDE, 3 * SIDE)
    assert (masks[0] == masks[1][::2, 1::3]).mean() > 0.95
    assert small["classes"] == ["ground", "zero", "one"]
    assert small["shares"]["ground"] == pytest.approx((masks[0] == 0).mean())
    assert sum(small["shares"].values()) == pytest.approx(1)
    assert (masks[0] == rows["mask"][0]).mean() > 0.9
    with pytest.raises(InputError, match="no picture"):
        TASK.predict(trained, ["nonsense"])


def test_datasets_and_sizes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="needs a dataset of masks, this one holds images"):
        TASK.check(images_info())
    with pytest.raises(ConfigError, match=r"24 x 24 pixels are too small for task\.model\.stride=4"):
        SemanticSegmentation(model=TINY.with_changes(stride=4)).check(masks_info(side=24))
    with pytest.raises((ConfigError, ValidationError), match="heads=3 does not divide a width of 8"):
        SegformerModel(widths=(8, 16, 24, 32), heads=(3, 1, 1, 1))
    grey = masks_info().columns[0].with_changes(shape=(1, SIDE, SIDE))
    with pytest.raises(ConfigError, match=r"pictures have 1 channel, such models take 3"):
        SemanticSegmentation(model=PretrainedModel(pretrained=str(tmp_path))).check(
            masks_info().with_changes(columns=(grey, masks_info().columns[1]))
        )
