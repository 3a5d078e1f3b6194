"""Object detection: it finds real digits, counts each picture alone, is saved whole, refuses what does not fit."""

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

from modelyard.data.dataset import Dataset
from modelyard.errors import ConfigError, DataError, InputError, IntegrityError
from modelyard.tasks import ObjectDetection
from modelyard.tasks.average_precision import overlaps
from modelyard.tasks.detection_models import Answer, Truth, set_loss
from modelyard.tasks.language_models import PretrainedModel
from modelyard.tasks.object_detection import DeformableDetrModel

from .conftest import assert_saved_whole, images_info, measure, row_losses, train
from .scenes import SIDE, boxes_info, scene_rows, scenes_folder

TINY = DeformableDetrModel(
    stride=2, widths=(16, 24, 32), layers=(1, 1, 1), hidden_size=32, heads=2, queries=6, decoder_layers=2
)
TASK = ObjectDetection(model=TINY)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Canvases with real digits, zeros and ones."""
    return scenes_folder(tmp_path_factory.mktemp("scenes") / "data", boxes_info())


@pytest.fixture(scope="module")
def trained(folder: Path) -> torch.nn.Module:
    """A model that has learnt for some seconds."""
    return train(TASK, folder, 120)


def columns(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: rows[name] for name in ("pixels", "boxes", "labels")}


def test_real_digits_are_found(trained: torch.nn.Module, folder: Path) -> None:
    metrics = TASK.metrics(measure(TASK, trained, folder))
    assert metrics["map_50"] > 0.4
    assert metrics["map_75"] <= metrics["map_50"]
    assert TASK.objective[0] in metrics


def test_boxes_come_in_pixels_of_the_picture_that_was_given(trained: torch.nn.Module, folder: Path) -> None:
    pixels = Dataset.open(folder).split("test").read(np.arange(20))["pixels"]
    small = TASK.predict(trained, list(pixels))
    large = TASK.predict(trained, [np.kron(image, np.ones((1, 3, 5), np.uint8)) for image in pixels])
    surest = [(one[0], other[0]) for one, other in zip(small, large, strict=True) if one and other]
    assert len(surest) > 5, "something is found"
    for found, _ in surest:
        assert found["label"] in ("zero", "one")
        assert 1 >= found["score"] >= TASK.threshold
        x0, y0, x1, y1 = found["box"]
        assert 0 <= x0 < x1 <= SIDE
        assert 0 <= y0 < y1 <= SIDE
    boxes = np.array([[one["box"], np.array(other["box"]) / (5, 3, 5, 3)] for one, other in surest])
    assert np.median(np.diag(overlaps(boxes[:, 0], boxes[:, 1]))) > 0.6, "stretched pictures, stretched boxes"


def test_a_file_in_base64_is_asked_like_its_pixels(trained: torch.nn.Module, folder: Path) -> None:
    pixels = Dataset.open(folder).split("test").read(np.arange(1))["pixels"][0]
    held = io.BytesIO()
    Image.fromarray(np.moveaxis(pixels, 0, -1)).save(held, "PNG")
    plain = base64.b64encode(held.getvalue()).decode()
    (expected,) = TASK.predict(trained, [pixels])
    for file in (plain, f"data:image/png;base64,{plain}", held.getvalue()):
        assert TASK.predict(trained, [file]) == [expected]


def test_the_class_table_names_average_precisions(trained: torch.nn.Module, folder: Path) -> None:
    stats = measure(TASK, trained, folder)
    table = dict(TASK.class_table(stats, boxes_info()))
    assert table.keys() == {"zero", "one"}
    metrics = TASK.metrics(stats)
    scores: list[Any] = list(table.values())
    assert np.mean([score.ap for score in scores]) == pytest.approx(metrics["map"])
    assert np.mean([score.ap_50 for score in scores]) == pytest.approx(metrics["map_50"])
    assert sum(score.support for score in scores) == stats["truths"].sum()


def test_a_row_counts_the_same_in_any_batch_even_while_training() -> None:
    torch.manual_seed(0)
    model = TASK.build(boxes_info(), None).train()
    rows = columns(scene_rows(6))
    whole = row_losses(TASK, model, rows)
    parts = [row_losses(TASK, model, {k: v[i : i + 2] for k, v in rows.items()}) for i in (0, 2, 4)]
    torch.testing.assert_close(whole, torch.cat(parts), rtol=1e-4, atol=1e-4)


def test_a_picture_without_a_box_has_a_finite_loss_and_no_truth() -> None:
    torch.manual_seed(0)
    model = TASK.build(boxes_info(), None)
    rows = columns(scene_rows(2))
    rows["labels"][0] = -1
    losses = TASK.loss(model, TASK.collate(rows, "cpu"))
    losses.sum().backward()
    assert torch.isfinite(losses).all()
    stats = TASK.statistics(model.eval(), TASK.collate(rows, "cpu"))
    assert stats["truths"][0].sum() == 0
    assert stats["right"][0].sum() == 0


def test_every_weight_learns() -> None:
    torch.manual_seed(0)
    model = TASK.build(boxes_info(), None)
    TASK.loss(model, TASK.collate(columns(scene_rows(4)), "cpu")).mean().backward()
    assert [name for name, weight in model.named_parameters() if weight.grad is None] == []


@pytest.mark.parametrize("extra", [0, 1], ids=["yes or no", "with nothing"])
def test_the_loss_takes_the_cheapest_assignment(extra: int) -> None:
    """Two queries stand on the two true boxes, crossed: the loss is that of uncrossing them."""
    boxes = torch.tensor([[[0.2, 0.2, 0.2, 0.2], [0.7, 0.7, 0.2, 0.2], [0.5, 0.5, 0.9, 0.9]]])
    logits = torch.full((1, 3, 2 + extra), -9.0)
    logits[0, 0, 1], logits[0, 1, 0] = 9.0, 9.0
    if extra:
        logits[0, 2, 2] = 9.0
    right = Truth(torch.tensor([[0, 1]]), boxes[:, [1, 0]])
    wrong = Truth(torch.tensor([[1, 0]]), boxes[:, [1, 0]])
    assert float(set_loss(Answer(logits, boxes), right, 2)) < 0.01
    assert float(set_loss(Answer(logits, boxes), wrong, 2)) > 1
    padded = Truth(torch.tensor([[0, 1, -1]]), torch.cat([right.boxes, torch.zeros(1, 1, 4)], dim=1))
    assert torch.equal(set_loss(Answer(logits, boxes), padded, 2), set_loss(Answer(logits, boxes), right, 2))


def test_a_saved_model_is_whole(trained: torch.nn.Module, folder: Path, tmp_path: Path) -> None:
    assert_saved_whole(TASK, trained, folder, tmp_path)


def test_a_trained_folder_can_be_gone_on_from_with_other_classes(
    trained: torch.nn.Module, folder: Path, tmp_path: Path
) -> None:
    TASK.save(trained, tmp_path / "base", folder)
    again = ObjectDetection(model=PretrainedModel(pretrained=str(tmp_path / "base")))
    model = again.build(boxes_info().with_changes(classes=("zero", "one", "two")), None)
    kept, new = (dict(net.named_parameters()) for net in (trained, model))
    name = next(name for name in kept if "backbone" in name)
    assert torch.equal(kept[name], new[name])
    assert model.config.num_labels == 3  # type: ignore[union-attr]
    path = tmp_path / "base" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(IntegrityError, match="cannot be loaded"):
        again.build(boxes_info(), None)


def test_a_model_with_a_class_for_nothing_can_be_gone_on_from(folder: Path, tmp_path: Path) -> None:
    from transformers import YolosConfig, YolosForObjectDetection

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = YolosConfig(**sizes, image_size=[SIDE, SIDE], patch_size=8, num_detection_tokens=6)
    YolosForObjectDetection(config).save_pretrained(tmp_path / "yolos")
    task = ObjectDetection(model=PretrainedModel(pretrained=str(tmp_path / "yolos")))
    model = train(task, folder, 3)
    stats = measure(task, model, folder)
    assert stats["found"].max() < 2, "nothing is no class to find"
    assert np.isfinite(task.metrics(stats)["loss"])


def test_what_is_no_picture_is_refused(trained: torch.nn.Module) -> None:
    for wrong in ("not base64!", base64.b64encode(b"no picture").decode(), [1, 2, 3], np.zeros((2, 2, 2, 2), np.uint8)):
        with pytest.raises(InputError, match="no picture"):
            TASK.predict(trained, [wrong])
    with pytest.raises(InputError, match="uint8"):
        TASK.predict(trained, [np.full((3, 8, 8), 300)])
    with pytest.raises(InputError, match="no option 'threshold'"):
        TASK.predict(trained, [np.zeros((3, 8, 8), np.uint8)], threshold=0.1)
    assert TASK.predict(trained, []) == []


def test_datasets_that_do_not_fit_are_refused() -> None:
    with pytest.raises(DataError, match="needs a dataset of boxes, this one holds images"):
        TASK.check(images_info())
    with pytest.raises(ConfigError, match=r"32 x 32 pixels are too small for task\.model\.stride=8"):
        ObjectDetection(model=TINY.with_changes(stride=8)).check(boxes_info())
    with pytest.raises(ConfigError, match=r"queries=6 is below the 8 boxes"):
        TASK.check(boxes_info(most=8))
    with pytest.raises(ConfigError, match=r"queries=500 is more than the \d+ places"):
        ObjectDetection(model=TINY.with_changes(queries=500)).check(boxes_info())
    with pytest.raises(DataError, match="knows the classes zero, one, the dataset a, b"):
        TASK.check_saved(Path(), boxes_info(), boxes_info().with_changes(classes=("a", "b")), Path())
    with pytest.raises(DataError, match=r"images are \(3, 16, 16\), the model takes \(3, 32, 32\)"):
        TASK.check_saved(Path(), boxes_info(), boxes_info(side=16), Path())


def test_sizes_that_cannot_be_are_refused() -> None:
    with pytest.raises((ConfigError, ValidationError), match="hidden_size=40 is no multiple of 32"):
        DeformableDetrModel(hidden_size=40)
    with pytest.raises((ConfigError, ValidationError), match="below 1"):
        DeformableDetrModel(layers=(1, 0, 1))
