"""Evaluation and comparison of registered models, on real stores, registries and tiny models."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from modelyard.artifacts import Parent, Registry, Store, VersionInfo
from modelyard.cli.main import modelyard
from modelyard.data.dataset import Column, Dataset, DatasetInfo
from modelyard.data.shards import ShardWriter
from modelyard.errors import DataError, InputError, NotFoundError
from modelyard.tasks import CausalLM, ImageClassification, Task
from modelyard.tasks.language_models import LlamaModel
from modelyard.training.comparison import compare
from modelyard.training.evaluation import evaluate

NAMES = tuple("abcd")


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """One registry for the whole module: making MLflow's tables is slow."""
    home = tmp_path_factory.mktemp("home")
    return Registry(f"sqlite:///{home / 'mlflow.db'}", Store(str(home / "store"), home / "cache"))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models gain nothing from threads and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class World:
    """Makes datasets and models in a registry."""

    def __init__(self, registry: Registry, folder: Path) -> None:
        self.registry, self.folder = registry, folder
        self.count = 0

    def _fresh(self) -> Path:
        self.count += 1
        path = self.folder / f"part{self.count}"
        path.mkdir()
        return path

    def dataset(self, name: str, info: DatasetInfo, rows: dict[str, np.ndarray], **files: Path) -> VersionInfo:
        folder = self._fresh()
        writer = ShardWriter(folder, "test", info.columns, 1000)
        writer.write(rows)
        writer.close()
        filled = info.with_changes(splits={"test": writer.num_rows})
        (folder / "dataset.json").write_text(json.dumps(filled.model_dump(mode="json")))
        for sub, source in files.items():
            (folder / sub).mkdir()
            for path in source.iterdir():
                (folder / sub / path.name).write_bytes(path.read_bytes())
        return self.registry.register(self.registry.store.put(folder, kind="dataset", name=name))

    def images(self, name: str = "shapes", classes: tuple[str, ...] = NAMES, seed: int = 0) -> VersionInfo:
        """Images whose class shows as the quarter that is bright; 400 rows."""
        columns = (Column(name="pixels", dtype="uint8", shape=(1, 4, 4)), Column(name="label", dtype="int64"))
        info = DatasetInfo(format="images", columns=columns, splits={}, classes=classes)
        generator = np.random.default_rng(seed)
        labels = generator.integers(0, len(classes), 400)
        pixels = generator.integers(0, 120, (400, 1, 4, 4)).astype(np.uint8)
        for row, label in enumerate(labels):
            pixels[row, 0, label] += 60
        return self.dataset(name, info, {"pixels": pixels, "label": labels.astype(np.int64)})

    def tokens(self, name: str = "text", text: str = "abc abd bcd. " * 60, block: int = 8) -> VersionInfo:
        """Text with a byte-level tokenizer trained on it."""
        from tokenizers import ByteLevelBPETokenizer
        from transformers import PreTrainedTokenizerFast

        bpe = ByteLevelBPETokenizer()
        bpe.train_from_iterator([text], vocab_size=262, show_progress=False)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer)
        folder = self._fresh()
        tokenizer.save_pretrained(folder)
        ids = tokenizer(text).input_ids
        rows = np.array(ids[: len(ids) // block * block], dtype=np.uint16).reshape(-1, block)
        column = Column(name="input_ids", dtype="uint16", shape=(block,))
        info = DatasetInfo(
            format="tokens",
            columns=(column,),
            splits={},
            vocab_size=len(tokenizer),
            block_tokens=block,
            tokenizer="tokenizer",
        )
        return self.dataset(name, info, {"input_ids": rows}, tokenizer=folder)

    def model(
        self, task: Task, dataset: VersionInfo, *, steps: int = 0, seed: int = 0, name: str = "tiny"
    ) -> VersionInfo:
        folder = self.registry.open(dataset.reference)[1]
        data = Dataset.open(folder)
        torch.manual_seed(seed)
        model = task.build(data.info, folder)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        split = data.split("test")
        for step in range(steps):
            rows = split.read(np.random.default_rng(step).integers(0, split.num_rows, 32))
            optimizer.zero_grad()
            task.loss(model, task.collate(rows, "cpu")).mean().backward()
            optimizer.step()
        target = self._fresh()
        task.save(model.eval(), target, folder, None)
        parents = (Parent(reference=dataset.reference, digest=dataset.digest),)
        return self.registry.register(self.registry.store.put(target, kind="model", name=name, parents=parents))


@pytest.fixture(scope="module")
def world(registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(registry, tmp_path_factory.mktemp("world"))


MLP = ImageClassification(architecture="mlp", hidden=16, dropout=0.0)
LLAMA = CausalLM(model=LlamaModel(layers=1, hidden_size=16, heads=2))


def test_a_classifiers_figures_equal_scikit_learns_and_are_recorded(world: World, registry: Registry) -> None:
    from sklearn import metrics as sk

    from modelyard.tasks import load_model

    data = world.images()
    version = world.model(MLP, data, steps=20)
    result = evaluate(version.reference, data.reference, registry=registry, batch_size=33)

    rows = Dataset.open(registry.open(data.reference)[1]).split("test").read(np.arange(400))
    model = load_model(registry.open(version.reference)[1])[1]
    with torch.inference_mode():
        predictions = model(torch.from_numpy(rows["pixels"])).argmax(1).numpy()
    accuracy = sk.accuracy_score(rows["label"], predictions)
    assert result.metrics["accuracy"].value == pytest.approx(accuracy)
    assert result.metrics["macro_f1"].value == pytest.approx(sk.f1_score(rows["label"], predictions, average="macro"))
    table = sk.precision_recall_fscore_support(rows["label"], predictions, zero_division=0)
    assert [row.name for row in result.classes] == list(NAMES)
    for column, expected in enumerate(table):
        assert [row.score[column] for row in result.classes] == pytest.approx(list(expected))

    recorded = registry.resolve(version.reference).metrics
    value, low, high = result.metrics["accuracy"]
    assert low < value < high
    assert recorded["test/accuracy"] == value
    assert (recorded["test/accuracy_low"], recorded["test/accuracy_high"]) == (low, high)
    assert recorded["test/rows"] == 400
    assert f"{int(recorded['test/dataset_digest']):012x}" == data.digest.removeprefix("sha256:")[:12]


def test_perplexity_and_bits_per_byte_agree_with_a_hand_computation(world: World, registry: Registry) -> None:
    from modelyard.tasks import load_model
    from modelyard.tasks.generation import load_tokenizer

    data = world.tokens()
    version = world.model(LLAMA, data, steps=5)
    result = evaluate(version.reference, data.reference, registry=registry, batch_size=7)
    folder = registry.open(version.reference)[1]
    tokens = Dataset.open(registry.open(data.reference)[1]).split("test")
    ids = torch.from_numpy(tokens.read(np.arange(tokens.num_rows))["input_ids"].astype(np.int64))
    model, tokenizer = load_model(folder)[1], load_tokenizer(folder)
    with torch.inference_mode():
        loss = float(model(input_ids=ids, labels=ids).loss)
    num_bytes = sum(len(tokenizer.decode(row[1:]).encode()) for row in ids)
    assert result.metrics["loss"].value == pytest.approx(loss, rel=1e-5)
    assert result.metrics["perplexity"].value == pytest.approx(math.exp(loss), rel=1e-5)
    bits = loss * ids[:, 1:].numel() / math.log(2) / num_bytes
    assert result.metrics["bits_per_byte"].value == pytest.approx(bits, rel=1e-5)


def test_the_batch_size_does_not_change_the_result(world: World, registry: Registry) -> None:
    data = world.tokens()
    version = world.model(LLAMA, data)
    one, many = (
        evaluate(version.reference, data.reference, registry=registry, batch_size=size, bootstrap_samples=0)
        for size in (1, 64)
    )
    assert one.metrics["loss"].value == pytest.approx(many.metrics["loss"].value, rel=1e-6)
    assert one.num_rows == many.num_rows


def test_a_trained_model_is_better_than_an_untrained_one_both_ways_round(world: World) -> None:
    data = world.images()
    good, bad = (world.model(MLP, data, steps=steps) for steps in (60, 0))
    forward = compare(good.reference, bad.reference, registry=world.registry)
    backward = compare(bad.reference, good.reference, registry=world.registry)
    assert (forward.better, backward.better) == ("first", "second")
    value, low, high = forward.differences["accuracy"]
    assert 0 < low <= value <= high
    assert backward.differences["accuracy"].value == -value


def test_less_perplexity_is_better(world: World) -> None:
    data = world.tokens()
    good, bad = (world.model(LLAMA, data, steps=steps) for steps in (60, 0))
    assert compare(good.reference, bad.reference, data.reference, registry=world.registry).better == "first"
    assert compare(bad.reference, good.reference, data.reference, registry=world.registry).better == "second"


def test_equal_models_cannot_be_told_apart(world: World) -> None:
    data = world.images()
    one = world.model(MLP, data, seed=1)
    assert compare(one.reference, one.reference, registry=world.registry).better is None
    # two untrained models of other seeds guess: their difference is chance
    other = world.model(ImageClassification(architecture="mlp", hidden=16), data, seed=1)
    assert compare(one.reference, other.reference, registry=world.registry).better is None


def test_models_that_cannot_be_compared_are_refused(world: World) -> None:
    images, text = world.images(), world.tokens()
    classifier, language = world.model(MLP, images), world.model(LLAMA, text)
    with pytest.raises(InputError, match=r"is for image_classification.*for causal_lm"):
        compare(classifier.reference, language.reference, registry=world.registry)

    other_text = world.tokens("other", text="xyz zyx yxz! " * 60)
    other = world.model(LLAMA, other_text)
    with pytest.raises(InputError, match=r"was trained on datasets:/text/1.*datasets:/other/1"):
        compare(language.reference, other.reference, registry=world.registry)
    with pytest.raises(InputError, match=r"(?s)same rows: .*tokens are others.*bits_per_byte"):
        compare(language.reference, other.reference, text.reference, registry=world.registry)

    for model, data in ((language, text), (other, other_text)):
        evaluate(model.reference, data.reference, registry=world.registry, bootstrap_samples=5)
    with pytest.raises(InputError, match=r"(?s)models:/tiny/\d+ \d+\.\d+, models:/tiny/\d+ \d+\.\d+"):
        compare(language.reference, other.reference, text.reference, registry=world.registry)


def test_datasets_a_model_cannot_read_are_refused(world: World) -> None:
    images, text = world.images(), world.tokens()
    classifier, language = world.model(MLP, images), world.model(LLAMA, text)

    def refuse(model: VersionInfo, data: VersionInfo, message: str, **options: Any) -> None:
        with pytest.raises(DataError, match=message):
            evaluate(model.reference, data.reference, registry=world.registry, **options)

    refuse(classifier, text, "trained on images, the dataset holds tokens")
    refuse(language, images, "trained on tokens, the dataset holds images")
    refuse(classifier, world.images("five", classes=tuple("abcde")[:3]), "knows 4 classes, the dataset has 3")
    refuse(classifier, world.images("order", classes=tuple("bacd")), "in another order")
    refuse(language, world.tokens("long", block=16), "16 tokens, the model sees 8")
    refuse(language, text, "has no split 'tests'", split="tests")
    with pytest.raises(NotFoundError, match="nobody"):
        evaluate("models:/nobody", text.reference, registry=world.registry)


def test_a_diverged_model_is_measured_without_an_error(
    world: World, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = world.tokens()
    version = world.model(LLAMA, data, seed=7)  # a version that nothing was recorded on yet
    monkeypatch.setattr(CausalLM, "metrics", lambda self, stats: {"perplexity": math.nan, "loss": 1.0})
    evaluate(version.reference, data.reference, registry=world.registry, bootstrap_samples=3)
    recorded = world.registry.resolve(version.reference).metrics
    assert "test/perplexity" not in recorded
    assert recorded["test/loss"] == 1.0
    assert "not finite" in caplog.text


@pytest.fixture
def run() -> Callable[..., str]:
    def invoke(*arguments: str) -> str:
        result = CliRunner().invoke(modelyard, list(arguments), catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    return invoke


def test_the_evaluate_command_prints_metrics_and_classes(
    world: World, run: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODELYARD_TRACKING_URI", world.registry.tracking_uri)
    monkeypatch.setenv("MODELYARD_STORE", world.registry.store.uri)
    data = world.images()
    version = world.model(MLP, data, steps=20)
    config = tmp_path / "evaluate.yaml"
    config.write_text(f"model: {version.reference}\ndataset: {data.reference}\nbootstrap_samples: 50\n")
    from_file = run("evaluate", "--config", str(config))
    from_flags = run("evaluate", "--model", version.reference, "--dataset", data.reference, "--bootstrap_samples=50")
    assert from_file == from_flags
    assert "accuracy" in from_file
    assert "95% interval" in from_file
    assert "precision" in from_file
    assert "bootstrap_samples: 50" in run("evaluate", "--config", str(config), "--print-config")
