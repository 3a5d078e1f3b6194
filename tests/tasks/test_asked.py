"""Every task is asked the same way: on the command line, and through the model server behind `/v1/predict`."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from tests.serving.gateway.running import Running, running

from modelyard.artifacts import Registry, Store
from modelyard.cli.main import modelyard
from modelyard.data.dataset import Column, Dataset, DatasetInfo
from modelyard.errors import ConfigError
from modelyard.security import KeyStore
from modelyard.serving.engines.choice import Machine
from modelyard.serving.gateway import GatewaySettings
from modelyard.serving.model_server import ModelServer
from modelyard.serving.server_config import ModelConfig, ServerConfig
from modelyard.tasks import (
    CausalLM,
    Forecasting,
    ImageClassification,
    ObjectDetection,
    Recommendation,
    Regression,
    SemanticSegmentation,
    SpeechRecognition,
    Task,
    TextClassification,
    TokenClassification,
    load_model,
)
from modelyard.tasks.encoders import BertModel
from modelyard.tasks.language_models import LlamaModel
from modelyard.tasks.object_detection import DeformableDetrModel
from modelyard.tasks.semantic_segmentation import SegformerModel
from modelyard.tasks.speech_recognition import ConformerModel

from .conftest import images_info, make_tokens, measure, texts_folder, write_dataset
from .scenes import boxes_info, masks_info, speech_info, tones, wav

TONES = wav(tones("abc", np.random.default_rng(0)))
TINY = BertModel(layers=1, hidden_size=16, heads=2, dropout=0.0)


class Case(NamedTuple):
    """A task with a dataset for it, and something to ask it: as JSON carries it, and as a person types it."""

    task: Task
    dataset: Callable[[Path], Path]
    asked: Any
    typed: str

    @property
    def name(self) -> str:
        """Name of its model in the registry."""
        return self.task.kind.replace("_", "-")


def _plain_dataset(info: DatasetInfo) -> Callable[[Path], Path]:
    rows = {column.name: np.ones((2, *column.shape), column.dtype) for column in info.columns}
    return lambda folder: write_dataset(folder, info, {"train": rows})


def _info(format: Any, columns: dict[str, tuple[str, tuple[int, ...]]], **facts: Any) -> DatasetInfo:
    described = tuple(Column(name=name, dtype=dtype, shape=shape) for name, (dtype, shape) in columns.items())
    return DatasetInfo(format=format, columns=described, splits={}, **facts)


NUMBERS = _info(
    "numbers", {"features": ("float32", (2,)), "targets": ("float32", (1,))}, features=("a", "b"), targets=("y",)
)
SERIES = _info(
    "series",
    {"past": ("float32", (8,)), "future": ("float32", (2,)), "series": ("int32", ()), "scale": ("float32", ())},
    features=("load",),
    season=4,
)
VISITS = _info(
    "interactions",
    {"history": ("int32", (4,)), "target": ("int32", ()), "popularity_rank": ("int32", ())},
    classes=tuple(f"film {number}" for number in range(12)),
)
CASES = {
    "regression": Case(Regression(), _plain_dataset(NUMBERS), [1.5, 2.0], "[1.5, 2.0]"),
    "forecasting": Case(
        Forecasting(hidden_size=8, patch=2), _plain_dataset(SERIES), list(range(8)), "[0, 1, 2, 3, 4, 5, 6, 7]"
    ),
    "recommendation": Case(
        Recommendation(hidden_size=8), _plain_dataset(VISITS), ["film 3", "film 4"], '["film 3", "film 4"]'
    ),
    "text_classification": Case(
        TextClassification(model=TINY),
        lambda folder: texts_folder(folder, ["so good", "so bad"], ["good", "bad"]),
        "it is good",
        "it is good",
    ),
    "token_classification": Case(
        TokenClassification(model=TINY),
        lambda folder: texts_folder(folder, [["Ann", "ran"]], [["B-PER", "O"]]),
        "Ann and Bob",
        "Ann and Bob",
    ),
    "image_classification": Case(
        ImageClassification(architecture="mlp"), _plain_dataset(images_info()), np.eye(8, dtype=np.uint8), "eye.png"
    ),
    "object_detection": Case(
        ObjectDetection(
            model=DeformableDetrModel(stride=2, widths=(8, 8, 8), layers=(1, 1, 1), hidden_size=32, queries=4),
            threshold=0.0,
        ),
        _plain_dataset(boxes_info()),
        np.eye(8, dtype=np.uint8),
        "eye.png",
    ),
    "semantic_segmentation": Case(
        SemanticSegmentation(model=SegformerModel(widths=(8, 8, 8, 8), heads=(1, 1, 1, 1), decoder_width=8)),
        _plain_dataset(masks_info()),
        np.eye(8, dtype=np.uint8),
        "eye.png",
    ),
    "speech_recognition": Case(
        SpeechRecognition(model=ConformerModel(layers=1, hidden_size=16, heads=2, bands=8)),
        _plain_dataset(speech_info()),
        base64.b64encode(TONES).decode(),
        "tones.wav",
    ),
}


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> tuple[Registry, Path]:
    """A registry with a model of every task, and the folder of the models."""
    folder = tmp_path_factory.mktemp("shop")
    registry = Registry(f"sqlite:///{folder / 'mlflow.db'}", Store(str(folder / "store"), folder / "cache"))
    for case in CASES.values():
        dataset = case.dataset(folder / f"{case.name}-data")
        torch.manual_seed(0)
        case.task.save(case.task.build(Dataset.open(dataset).info, dataset), folder / case.name, dataset)
        registry.register(registry.store.put(folder / case.name, kind="model", name=case.name))
    return registry, folder


@pytest.fixture(scope="module")
def gateway(shop: tuple[Registry, Path]) -> Iterator[Running]:
    """A gateway that serves them over HTTP, and lets everybody in."""
    registry, folder = shop
    models = tuple(ModelConfig(reference=f"models:/{case.name}") for case in CASES.values())
    server = ModelServer(ServerConfig(models=models, preload=False), registry, Machine(frozenset()))
    with running(server, GatewaySettings(database=f"sqlite:///{folder / 'gateway.db'}")) as found:
        yield found


@pytest.fixture(scope="module")
def key(shop: tuple[Registry, Path]) -> str:
    """An API key without bounds."""
    store = KeyStore(f"sqlite:///{shop[1] / 'gateway.db'}")
    try:
        return store.create(tenant="tests")
    finally:
        store.close()


def expected(case: Case, folder: Path) -> Any:
    task, model = load_model(folder)
    (answer,) = task.predict(model, [case.asked[None] if isinstance(case.asked, np.ndarray) else case.asked])
    return json.loads(json.dumps(answer))


def close(one: Any, other: Any) -> bool:
    """Equal but for the last digits of numbers."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(close(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(close, one, other))
    return bool(one == (pytest.approx(other, rel=1e-4, abs=1e-5) if isinstance(other, float) else other))


@pytest.mark.parametrize("name", CASES)
def test_the_served_model_answers_as_the_task_does(
    name: str, shop: tuple[Registry, Path], key: str, gateway: Running
) -> None:
    case = CASES[name]
    asked = base64.b64encode(_png(case.asked)).decode() if isinstance(case.asked, np.ndarray) else case.asked
    reply = gateway.ask(f"/v1/predict/{case.name}", {"inputs": [asked]}, key=key)
    assert reply.status == 200, reply.body
    assert close(reply.json()["data"][0]["output"], expected(case, shop[1] / case.name))


def test_what_a_task_refuses_is_the_callers_error(key: str, gateway: Running) -> None:
    reply = gateway.ask("/v1/predict/forecasting", {"inputs": [[1, 2, 3]]}, key=key)
    assert reply.status == 400
    assert "the model takes (8,)" in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("model", "asked", "reason"),
    [
        ("object-detection", "bm8gcGljdHVyZQ==", "no picture"),
        ("semantic-segmentation", "bm8gcGljdHVyZQ==", "no picture"),
        ("speech-recognition", "bm8gc291bmQ=", "no WAV file"),
        ("speech-recognition", [0.0] * 20000, "lasts 2.5 s, the model takes 1.5 s at most"),
        ("speech-recognition", {"samples": [0.0], "rate": 8000}, "other keys"),
    ],
)
def test_what_is_no_picture_or_sound_is_the_callers_error(
    model: str, asked: Any, reason: str, key: str, gateway: Running
) -> None:
    reply = gateway.ask(f"/v1/predict/{model}", {"inputs": [asked]}, key=key)
    assert (reply.status, reason in reply.json()["error"]["message"]) == (400, True), reply.body


def test_sound_may_come_as_numbers_or_as_a_file(key: str, gateway: Running) -> None:
    sound = tones("abc", np.random.default_rng(0)).tolist()
    asked = [sound, {"samples": sound, "sample_rate": 8000}, base64.b64encode(TONES).decode()]
    reply = gateway.ask("/v1/predict/speech-recognition", {"inputs": asked}, key=key)
    first, *others = [answer["output"] for answer in reply.json()["data"]]
    assert others == [first, first]
    head = b'--edge\r\ncontent-disposition: form-data; name="inputs"; filename="tones.wav"\r\n\r\n'
    body = head + TONES + b"\r\n--edge--\r\n"
    kind = "multipart/form-data; boundary=edge"
    reply = gateway.ask("/v1/predict/speech-recognition", body, key=key, content_type=kind)
    assert [answer["output"] for answer in reply.json()["data"]] == [first]


@pytest.mark.parametrize("name", CASES)
def test_a_task_says_beforehand_what_it_measures(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    dataset = case.dataset(tmp_path / "data")
    model = case.task.build(Dataset.open(dataset).info, dataset)
    found = case.task.metrics(measure(case.task, model, dataset, split="train"))
    assert set(found) == set(case.task.metric_names)


@pytest.mark.parametrize("name", CASES)
def test_the_command_line_answers_as_the_task_does(
    name: str, shop: tuple[Registry, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, folder = CASES[name], shop[1]
    monkeypatch.setenv("MODELYARD_STORE", str(folder / "store"))
    monkeypatch.setenv("MODELYARD_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
    monkeypatch.chdir(tmp_path)
    Path("eye.png").write_bytes(_png(np.eye(8, dtype=np.uint8)))
    Path("tones.wav").write_bytes(TONES)
    result = CliRunner().invoke(modelyard, ["predict", f"models:/{case.name}", case.typed], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert result.output.startswith(f"{case.typed}: ")
    assert close(json.loads(result.output.removeprefix(f"{case.typed}: ")), expected(case, folder / case.name))


@pytest.mark.parametrize("name", ["object_detection", "semantic_segmentation", "regression"])
def test_answers_are_written_to_a_folder_and_drawn_where_there_is_something_to_see(
    name: str, shop: tuple[Registry, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, folder = CASES[name], shop[1]
    monkeypatch.setenv("MODELYARD_STORE", str(folder / "store"))
    monkeypatch.setenv("MODELYARD_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
    monkeypatch.chdir(tmp_path)
    Path("eye.png").write_bytes(_png(np.eye(8, dtype=np.uint8)))
    asked = ["predict", f"models:/{case.name}", case.typed, "--out", "answers"]
    result = CliRunner().invoke(modelyard, asked, catch_exceptions=False)
    drawn = [] if name == "regression" else ["answers/1.png"]
    assert result.output == f"{case.typed}: {', '.join(['answers/1.json', *drawn])}\n"
    assert close(json.loads(Path("answers/1.json").read_text()), expected(case, folder / case.name))
    for path in drawn:
        assert _pixels(path).shape == (8, 8, 3)
        assert (_pixels(path).max(axis=-1) > 1).any(), "something is drawn over the picture of zeros and ones"


def test_a_text_that_goes_on_is_not_written_to_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELYARD_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("MODELYARD_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    data = make_tokens(tmp_path / "tokens")
    task = CausalLM(model=LlamaModel(layers=1, hidden_size=16, heads=2, max_positions=16))
    task.save(task.build(Dataset.open(data).info, data), tmp_path / "model", data)
    registry = Registry.from_settings()
    registry.register(registry.store.put(tmp_path / "model", kind="model", name="gpt"))
    with pytest.raises(ConfigError, match=r"--out=answers: models:/gpt goes on with a text"):
        CliRunner().invoke(modelyard, ["predict", "models:/gpt", "the", "--out", "answers"], catch_exceptions=False)


def _pixels(path: str) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(path))


def _png(pixels: np.ndarray) -> bytes:
    from PIL import Image

    held = io.BytesIO()
    Image.fromarray(pixels).save(held, "PNG")
    return held.getvalue()
