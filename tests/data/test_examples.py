"""Annotated images and recordings become rows, in the splits their source says, or an error that names the line."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.io import wavfile

from modelyard.config import parse
from modelyard.data import audio, sources
from modelyard.data.config import PrepareConfig
from modelyard.data.dataset import Dataset, DatasetInfo
from modelyard.data.examples import form
from modelyard.data.prepare import plan, prepare_folder
from modelyard.errors import ConfigError, DataError

ALL = {"train": 1.0, "validation": 0.0}
RATE = 8000


def config(source: dict[str, Any], **more: Any) -> PrepareConfig:
    return parse(PrepareConfig, {"name": "things", "source": source, "splits": ALL, **more})


def picture(path: Path, size: tuple[int, int] = (20, 10), seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path)


def lines(path: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"paths": [str(path)]}


def examples(settings: PrepareConfig) -> list[Any]:
    """What the source gives, read in this process."""
    return [
        found for part in plan(settings) for found in sources.read(settings.source, part, section=form(settings)[1])
    ]


def boxed(folder: Path, **changes: Any) -> PrepareConfig:
    picture(folder / "a.png")
    row = {"image": "a.png", "boxes": [[2, 1, 12, 6], [0, 0, 20, 10]], "labels": ["cat", 7], **changes}
    return config({"kind": "boxes", **lines(folder / "a.jsonl", [row])})


def test_boxes_are_shares_of_the_image_however_it_is_resized(tmp_path: Path) -> None:
    settings = boxed(tmp_path)
    for section in ({}, {"height": 16, "width": 16}):
        (found,) = examples(settings.with_changes(boxes={"max_boxes": 3, **section}))
        np.testing.assert_allclose(
            found.columns["boxes"], [[0.35, 0.35, 0.5, 0.5], [0.5, 0.5, 1, 1], [0, 0, 0, 0]], rtol=1e-6
        )
        assert found.names == ("cat", "7")
    assert found.columns["pixels"].shape == (3, 16, 16)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"boxes": [[2, 1, 2, 6]], "labels": ["cat"]}, r"box \[2, 1, 2, 6\] is empty"),
        ({"boxes": [[5, 1, 2, 6]], "labels": ["cat"]}, "is empty"),
        ({"boxes": [[2, 1, 25, 6]], "labels": ["cat"]}, r"lies outside of its image of 20 x 10 pixels"),
        ({"boxes": [[-3, 1, 5, 6]], "labels": ["cat"]}, "outside"),
        ({"boxes": [[20.5, 1, 21, 6]], "labels": ["cat"]}, "is empty"),
        ({"boxes": [[float("nan"), 1, 5, 6]], "labels": ["cat"]}, "not finite"),
        ({"boxes": [[1, 2, 3]], "labels": ["cat"]}, "no list of"),
        ({"boxes": "all", "labels": ["cat"]}, "no list of"),
        ({"boxes": 3, "labels": ["cat"]}, "no list of"),
        ({"labels": ["cat"]}, "2 boxes, but 1 labels"),
        ({"labels": "cat"}, "2 boxes, but no list of labels"),
        ({"boxes": [[0, 0, 1, 1]] * 51, "labels": ["cat"] * 51}, "51 boxes, more than boxes.max_boxes=50"),
        ({"image": "b.png"}, "there is no file"),
        ({"image": 3}, "no text"),
    ],
)
def test_a_wrong_box_is_refused_with_its_line(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=reason) as caught:
        examples(boxed(tmp_path, **changes))
    assert f"{tmp_path / 'a.jsonl'}, line 1" in str(caught.value)


def test_a_box_a_hair_over_the_edge_is_cut(tmp_path: Path) -> None:
    (found,) = examples(boxed(tmp_path, boxes=[[-0.4, 0, 20.9, 10]], labels=["cat"]))
    np.testing.assert_allclose(found.columns["boxes"][0], [0.5, 0.5, 1, 1])


def test_lines_that_are_no_objects_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for text, reason in (("{", "line 1 is no JSON"), ("[1]", "holds no JSON object"), ('{"img": 1}', "no key 'image'")):
        path.write_text(text)
        with pytest.raises(DataError, match=reason):
            examples(config({"kind": "boxes", "paths": [str(path)]}))


def coco(folder: Path, **changes: Any) -> PrepareConfig:
    picture(folder / "images" / "a.png")
    annotations = [
        {"image_id": 5, "category_id": 9, "bbox": [2, 1, 10, 5]},
        {"image_id": 5, "category_id": 9, "bbox": [0, 0, 20, 10], "iscrowd": 1},
    ]
    record = {
        "images": [{"id": 5, "file_name": "a.png"}],
        "categories": [{"id": 9, "name": "cat"}],
        "annotations": annotations,
        **changes,
    }
    (folder / "coco.json").write_text(json.dumps(record))
    return config({"kind": "coco", "path": str(folder / "coco.json"), "images": str(folder / "images")})


def test_coco_boxes_are_corner_and_size_and_crowds_are_left_out(tmp_path: Path) -> None:
    (found,) = examples(coco(tmp_path))
    assert found.names == ("cat",)
    np.testing.assert_allclose(found.columns["boxes"][0], [0.35, 0.35, 0.5, 0.5])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"annotations": [{"image_id": 5, "category_id": 4, "bbox": [0, 0, 1, 1]}]}, "category 4, which"),
        ({"annotations": [{"image_id": 6, "category_id": 9, "bbox": [0, 0, 1, 1]}]}, "image 6, which"),
        ({"annotations": [{"image_id": 5, "category_id": 9, "bbox": [0, 0, 0, 1]}]}, "is empty"),
        ({"annotations": [{"image_id": 5}]}, "is no COCO file"),
        ({"images": [{"id": 5, "file_name": "b.png"}], "annotations": []}, "there is no file"),
    ],
)
def test_a_wrong_coco_file_is_refused(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=reason):
        examples(coco(tmp_path, **changes))


def masked(folder: Path, mask: np.ndarray, **changes: Any) -> PrepareConfig:
    picture(folder / "images" / "a.jpg")
    (folder / "masks").mkdir(exist_ok=True)
    Image.fromarray(mask).save(folder / "masks" / "a.png")
    source = {"kind": "masks", "images": str(folder / "images"), "masks": str(folder / "masks")}
    return config({**source, "classes": ["ground", "cat"], **changes})


def test_masks_keep_their_numbers_when_resized(tmp_path: Path) -> None:
    mask = np.zeros((10, 20), np.uint8)
    mask[:5], mask[:, 18:] = 1, 255
    settings = masked(tmp_path, mask)
    (found,) = examples(settings)
    assert np.array_equal(found.columns["mask"], mask)
    (small,) = examples(settings.with_changes(masks={"height": 4, "width": 7}))
    assert small.columns["pixels"].shape == (3, 4, 7)
    assert set(np.unique(small.columns["mask"])) == {0, 1, 255}, "classes are not mixed"
    (other,) = examples(masked(tmp_path, np.where(mask == 255, 9, mask).astype(np.uint8), ignored=9))
    assert np.array_equal(other.columns["mask"], mask)


def test_masks_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="20 x 10 and 20 x 11 pixels"):
        examples(masked(tmp_path, np.zeros((11, 20), np.uint8)))
    with pytest.raises(DataError, match=r"holds the number 2, but source.classes names only 0..1"):
        examples(masked(tmp_path, np.full((10, 20), 2, np.uint8)))
    with pytest.raises(DataError, match="holds the number 255"):
        examples(masked(tmp_path, np.full((10, 20), 255, np.uint8), ignored=None))
    with pytest.raises(DataError, match="is a RGB picture"):
        examples(masked(tmp_path, np.zeros((10, 20, 3), np.uint8)))
    settings = masked(tmp_path, np.zeros((10, 20), np.uint8), split_folders=True)
    with pytest.raises(DataError, match="lies in no folder of a split"):
        examples(settings)
    (tmp_path / "masks" / "a.png").rename(tmp_path / "masks" / "b.png")
    with pytest.raises(DataError, match="has no mask"):
        examples(settings)


def sound(seconds: float = 0.5, rate: int = RATE) -> np.ndarray:
    time = np.arange(round(seconds * rate)) / rate
    return (0.5 * np.sin(2 * np.pi * 440 * time)).astype(np.float32)


def spoken(folder: Path, values: np.ndarray | None = None, rate: int = RATE, **changes: Any) -> PrepareConfig:
    wavfile.write(folder / "a.wav", rate, sound(rate=rate) if values is None else values)
    section = {"sample_rate": RATE, "max_seconds": 1.0, "max_characters": 12}
    row = {"audio": "a.wav", "text": "Four  Two", **changes}
    return config({"kind": "speech", **lines(folder / "a.jsonl", [row])}, speech=section)


def test_recordings_of_any_kind_become_the_same_row(tmp_path: Path) -> None:
    (plain,) = examples(spoken(tmp_path))
    assert "".join(plain.names) == "four two"
    assert plain.columns["length"] == RATE // 2
    kinds = {
        "16-bit": ((sound() * 32767).astype(np.int16), RATE),
        "stereo": (np.stack([sound(), sound()], axis=1), RATE),
        "44.1 kHz": (sound(rate=44100), 44100),
        "8-bit": ((sound() * 127 + 128).astype(np.uint8), RATE),
    }
    for name, (values, rate) in kinds.items():
        (other,) = examples(spoken(tmp_path, values, rate))
        inner = slice(400, 3600)  # filters swing at the ends
        error = np.abs(other.columns["samples"][inner].astype(float) - plain.columns["samples"][inner]).max()
        assert error < 0.02 * 32767, name
        assert abs(int(other.columns["length"]) - RATE // 2) <= 1, name


@pytest.mark.parametrize(
    ("values", "changes", "reason"),
    [
        (sound(1.2), {}, r"lasts 1\.2 s, longer than speech\.max_seconds=1"),
        (np.zeros(0, np.float32), {}, "holds no sound"),
        (np.array([0.0, np.nan] * 2000, np.float32), {}, "not finite"),
        (None, {"text": "  "}, "empty text"),
        (None, {"text": "a" * 13}, "13 characters, more than speech.max_characters=12"),
        (sound(0.2), {"text": "ten letters"}, "more than can be spoken"),
        (None, {"text": 4}, "no text"),
        (None, {"audio": "a.jsonl"}, "is no WAV file"),
        (None, {"audio": "b.wav"}, "there is no file"),
    ],
)
def test_a_wrong_recording_is_refused_with_its_line(
    values: np.ndarray | None, changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=reason) as caught:
        examples(spoken(tmp_path, values, **changes))
    assert "line 1" in str(caught.value)


def test_rates_that_carry_no_speech_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="2000 samples per second; 4000 to 192000 are understood"):
        examples(spoken(tmp_path, rate=2000))
    with pytest.raises(ConfigError, match="sample_rate"):
        config({"kind": "speech", "paths": ["x"]}, speech={"sample_rate": 100})


def test_whole_numbers_of_any_size_are_shares_of_the_largest() -> None:
    for kind in (np.int16, np.int32):
        most = np.iinfo(kind)
        assert audio.mono(np.array([most.min, 0, most.max], kind), "x").tolist() == pytest.approx([-1, 0, 1], abs=1e-4)
    assert audio.mono(np.array([0, 128, 255], np.uint8), "x").tolist() == pytest.approx([-1, 0, 1], abs=0.01)


def test_resampling_keeps_pitch_and_loudness() -> None:
    other = audio.resample(sound(rate=16000), 16000, RATE)
    assert len(other) == RATE // 2
    np.testing.assert_allclose(other[200:-200], sound()[200:-200], atol=0.01)


def test_sections_belong_to_their_sources() -> None:
    with pytest.raises(ConfigError, match=r"'masks' has no meaning for source\.kind='speech'; use 'speech'"):
        config({"kind": "speech", "paths": ["x"]}, masks={})


def prepared(settings: PrepareConfig, folder: Path) -> DatasetInfo:
    return prepare_folder(settings, folder)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_the_split_a_source_says_is_kept_and_the_rest_goes_by_content(tmp_path: Path) -> None:
    rows = []
    for number in range(80):
        picture(tmp_path / f"{number}.png", seed=number)
        split = "test" if number < 10 else ""
        rows.append({"image": f"{number}.png", "boxes": [[0, 0, 5, 5]], "labels": [f"c{number % 3}"], "split": split})
    rows.append({**rows[0], "split": "train"})  # seen twice: the first stays
    source = {"kind": "boxes", **lines(tmp_path / "a.jsonl", rows), "split_column": "split"}
    shares = {"train": 0.8, "validation": 0.0, "test": 0.2}
    info = prepared(config(source, splits=shares, boxes={"max_boxes": 2}), tmp_path / "out")
    assert info.classes == ("c0", "c1", "c2")
    assert info.documents["kept"] == sum(info.splits.values()) == 80
    assert info.splits["test"] > 10, "some of the others, too"
    test = Dataset.open(tmp_path / "out").split("test").read(np.arange(10))
    first = np.stack([np.asarray(Image.open(tmp_path / f"{n}.png")) for n in range(10)]).transpose(0, 3, 1, 2)
    assert np.array_equal(test["pixels"], first)
    assert test["labels"][:3].tolist() == [[0, -1], [1, -1], [2, -1]]
    rows[3]["split"] = "dev"
    source |= lines(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match="says split 'dev', but the config wants train, test"):
        prepared(config(source, splits=shares), tmp_path / "other")


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_recordings_and_masks_are_prepared_whole(tmp_path: Path) -> None:
    info = prepared(spoken(tmp_path), tmp_path / "speech")
    assert (info.format, info.sample_rate, info.classes) == ("speech", RATE, tuple(" fortuw"))
    row = Dataset.open(tmp_path / "speech").split("train").read(np.arange(1))
    assert "".join(info.classes[n] for n in row["text"][0] if n >= 0) == "four two"
    assert row["length"].shape == (1,)
    mask = np.eye(10, 20, dtype=np.uint8)
    info = prepared(masked(tmp_path, mask), tmp_path / "masks-out")
    assert (info.format, info.classes) == ("masks", ("ground", "cat"))
    assert np.array_equal(Dataset.open(tmp_path / "masks-out").split("train").read(np.arange(1))["mask"][0], mask)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_broken_images_are_counted_and_other_errors_reach_the_caller(tmp_path: Path) -> None:
    settings = boxed(tmp_path)
    (tmp_path / "b.png").write_bytes(b"no picture")
    picture(tmp_path / "c.png", (30, 10))
    row = {"boxes": [[0, 0, 5, 5]], "labels": ["cat"]}
    both = [{"image": "a.png", **row}, {"image": "b.png", **row}]
    info = prepared(config({"kind": "boxes", **lines(tmp_path / "a.jsonl", both)}), tmp_path / "out")
    assert (info.documents["kept"], info.documents["unreadable"]) == (1, 1)
    sizes = [*both, {"image": "c.png", **row}]
    with pytest.raises(DataError, match=r"2 different sizes: 20x10, 30x10"):
        prepared(config({"kind": "boxes", **lines(tmp_path / "a.jsonl", sizes)}), tmp_path / "two")
    with pytest.raises(DataError, match="is empty"):
        prepared(boxed(tmp_path, boxes=[[1, 1, 1, 1]], labels=["cat"]), tmp_path / "three")
    assert settings.boxes is not None


def test_a_wav_file_may_hold_other_chunks(tmp_path: Path) -> None:
    held = io.BytesIO()
    wavfile.write(held, RATE, sound())
    data = held.getvalue()
    chunk = b"LIST" + (4).to_bytes(4, "little") + b"INFO"
    data = data[:4] + (len(data) - 8 + len(chunk)).to_bytes(4, "little") + data[8:] + chunk
    samples, rate = audio.read_wav(data, "it")
    assert (len(samples), rate) == (RATE // 2, RATE)
