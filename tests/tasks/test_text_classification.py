"""Text classification: it learns what words mean, reads padding as nothing, and is saved as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from modelyard.data.dataset import Dataset
from modelyard.errors import ConfigError, DataError, InputError, IntegrityError
from modelyard.tasks import TextClassification, load_model
from modelyard.tasks.encoders import BertModel
from modelyard.tasks.language_models import PretrainedModel

from .conftest import assert_saved_whole, images_info, measure, row_losses, texts_folder, train

GOOD, BAD, FILLER = (
    ["lovely", "great", "superb"],
    ["awful", "dull", "broken"],
    ["the", "a", "film", "was", "it", "and", "so"],
)
TINY = BertModel(layers=1, hidden_size=32, heads=2, dropout=0.0)


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 short sentences, with a word that decides at any place."""
    generator = np.random.default_rng(0)
    texts, labels = [], []
    for number in range(60):
        words = list(generator.choice(FILLER, size=generator.integers(2, 8)))
        words.insert(int(generator.integers(0, len(words))), str(generator.choice([GOOD, BAD][number % 2])))
        texts.append(" ".join(words))
        labels.append(["good", "bad"][number % 2])
    return texts_folder(tmp_path_factory.mktemp("reviews"), texts, labels)


def test_the_words_that_decide_are_learned(reviews: Path, tmp_path: Path) -> None:
    task = TextClassification(model=TINY)
    model = train(task, reviews, 120)
    stats = measure(task, model, reviews)
    assert task.metrics(stats)["macro_f1"] > 0.95
    assert [(name, score.support) for name, score in task.class_table(stats, Dataset.open(reviews).info)] == [
        ("bad", 30),
        ("good", 30),
    ]
    task.save(model, tmp_path / "model", reviews)
    loaded_task, loaded = load_model(tmp_path / "model")
    answers = loaded_task.predict(loaded, ["it was so superb and great", np.array("the awful film was dull")])
    assert [answer["label"] for answer in answers] == ["good", "bad"]
    assert all(0.5 <= answer["probability"] <= 1 for answer in answers)


def test_padding_changes_nothing(reviews: Path) -> None:
    task = TextClassification(model=TINY)
    model = train(task, reviews, 1)
    rows = Dataset.open(reviews).split("test").read(np.arange(6))
    alone = [row_losses(task, model, {k: v[i : i + 1] for k, v in rows.items()}) for i in range(6)]
    assert len(set(rows["length"].tolist())) > 1
    torch.testing.assert_close(row_losses(task, model, rows), torch.cat(alone), rtol=1e-4, atol=1e-5)
    noisy = {**rows, "input_ids": np.where(np.arange(16) < rows["length"][:, None], rows["input_ids"], 9)}
    torch.testing.assert_close(row_losses(task, model, noisy), row_losses(task, model, rows))


def test_a_saved_model_answers_identically(reviews: Path, tmp_path: Path) -> None:
    task = TextClassification(model=TINY)
    model = train(task, reviews, 2)
    assert_saved_whole(task, model, reviews, tmp_path)
    assert task.flops_per_row(model) > 1000


def test_any_hugging_face_encoder_can_be_gone_on_from(reviews: Path, tmp_path: Path) -> None:
    """The encoder's weights are kept, the head is new, and other tools read what training wrote."""
    from transformers import AutoModel, AutoModelForSequenceClassification

    first: Any = train(TextClassification(model=TINY), reviews, 2)
    TextClassification(model=TINY).save(first, tmp_path / "first", reviews)
    AutoModel.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "encoder")
    task = TextClassification(model=PretrainedModel(pretrained=str(tmp_path / "encoder")))
    again: Any = train(task, reviews, 0)
    torch.testing.assert_close(again.bert.state_dict(), first.bert.state_dict())
    assert not torch.equal(again.classifier.weight, first.classifier.weight)
    read = AutoModelForSequenceClassification.from_pretrained(tmp_path / "first")
    assert read.config.id2label == {0: "bad", 1: "good"}
    torch.testing.assert_close(read.state_dict(), first.state_dict())


def test_a_folder_without_some_of_its_layers_is_refused(reviews: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    TextClassification(model=TINY).save(train(TextClassification(model=TINY), reviews, 0), tmp_path / "m", reviews)
    path = tmp_path / "m" / "model.safetensors"
    state = {name: tensor for name, tensor in load_file(path).items() if "attention.self.query" not in name}
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(IntegrityError, match="lacks 2 of the weights"):
        load_model(tmp_path / "m")
    task = TextClassification(model=PretrainedModel(pretrained=str(tmp_path / "m")))
    with pytest.raises(IntegrityError, match="lacks 2 of the weights"):
        task.build(Dataset.open(reviews).info, None)


def test_what_does_not_fit_is_refused(reviews: Path, tmp_path: Path) -> None:
    info = Dataset.open(reviews).info
    task = TextClassification(model=TINY)
    with pytest.raises(DataError, match="needs a dataset of labelled_text, this one holds images"):
        task.check(images_info())
    model = train(task, reviews, 0)
    task.save(model, tmp_path / "m", reviews)
    with pytest.raises(DataError, match="knows the classes bad, good"):
        task.check_saved(tmp_path / "m", info, info.with_changes(classes=("good", "bad")), reviews)
    narrow = TextClassification(model=PretrainedModel(pretrained=str(tmp_path / "m")))
    with pytest.raises(ConfigError, match="rows have 99 tokens, the model sees 16 at most"):
        narrow.check(info.with_changes(block_tokens=99))
    loaded_task, loaded = load_model(tmp_path / "m")
    for wrong in ("", 3, ["a", "b"]):
        with pytest.raises(InputError, match="an input is no text"):
            loaded_task.predict(loaded, [wrong])
    with pytest.raises(DataError, match="no tokenizer"):
        task.predict(model, ["hello"])
    other = texts_folder(tmp_path / "other", ["zebra zebra yak yak", "quiz quiz"], ["bad", "good"])
    with pytest.raises(ConfigError, match="mean something else"):
        task.check_saved(tmp_path / "m", info, Dataset.open(other).info, other)


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="heads=3 does not divide hidden_size=32"):
        BertModel(hidden_size=32, heads=3)
