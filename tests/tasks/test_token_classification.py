"""Named entities: tags become entities as conlleval reads them, and are scored whole, by type."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from modelyard.data.dataset import Dataset
from modelyard.errors import DataError, InputError
from modelyard.tasks import TokenClassification, load_model
from modelyard.tasks.encoders import BertModel
from modelyard.tasks.token_classification import IGNORED, Entity, entities, entity_counts, entity_names

from .conftest import assert_saved_whole, images_info, measure, texts_folder, train

TINY = BertModel(layers=1, hidden_size=32, heads=2, dropout=0.0)
CLASSES = ("O", "B-LOC", "I-LOC", "B-PER", "I-PER")


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Who met whom where: first names, and places of one or two words."""
    generator = np.random.default_rng(0)
    people, places = ["Ann", "Bob", "Cleo"], [["Rome"], ["New", "York"], ["Oslo"]]
    words, tags = [], []
    for _ in range(60):
        person, place = str(generator.choice(people)), places[generator.integers(0, 3)]
        before = list(generator.choice(["today", "then", "and"], size=generator.integers(0, 3)))
        words.append([*before, person, "went", "to", *place])
        tags.append([*["O"] * len(before), "B-PER", "O", "O", "B-LOC", *["I-LOC"] * (len(place) - 1)])
    return texts_folder(tmp_path_factory.mktemp("notes"), words, tags)


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("O O", []),
        ("B-PER I-PER O B-LOC", [("PER", 0, 2), ("LOC", 3, 4)]),
        ("B-PER B-PER", [("PER", 0, 1), ("PER", 1, 2)]),
        ("I-PER I-PER", [("PER", 0, 2)]),
        ("B-PER I-LOC", [("PER", 0, 1), ("LOC", 1, 2)]),
        ("O I-LOC B-LOC I-LOC", [("LOC", 1, 2), ("LOC", 2, 4)]),
    ],
)
def test_tags_spell_entities_as_conlleval_reads_them(tags: str, expected: list[tuple[str, int, int]]) -> None:
    assert entities(tags.split()) == [Entity(*each) for each in expected]


def test_an_entity_counts_only_when_its_words_and_its_type_are_right() -> None:
    true = np.array([[1, 2, 0, 3, IGNORED], [3, 4, 0, 0, 1]])  # LOC LOC . PER, and PER PER . . LOC
    given = np.array([[1, 0, 0, 3, 1], [1, 2, 0, 3, 1]])  # half a LOC, the PER; LOC for PER, a PER too much, the LOC
    counts = {name: values.tolist() for name, values in entity_counts(true, given, CLASSES).items()}
    assert counts == {
        "hit.LOC": [0, 1],
        "found.LOC": [1, 2],
        "true.LOC": [1, 1],
        "hit.PER": [1, 0],
        "found.PER": [1, 1],
        "true.PER": [1, 1],
    }


def test_scores_are_those_of_a_hand_computation(notes: Path) -> None:
    stats = {
        **{"hit.LOC": [3, 1], "found.LOC": [4, 1], "true.LOC": [5, 1], "hit.PER": [0, 0], "found.PER": [2, 0]},
        **{"true.PER": [1, 1], "words": [10, 5], "right_words": [9, 3], "nll": [4.0, 1.0]},
    }
    task, arrays = TokenClassification(model=TINY), {name: np.array(values) for name, values in stats.items()}
    assert task.metrics(arrays) == pytest.approx(
        {
            "entity_f1": 8 / 15,
            "entity_precision": 4 / 7,
            "entity_recall": 4 / 8,
            "macro_entity_f1": (8 / 11 + 0) / 2,
            "word_accuracy": 12 / 15,
            "loss": 5 / 15,
        }
    )
    (place, score), (person, none) = task.class_table(arrays, Dataset.open(notes).info)
    assert (place, person, none.f1, none.support) == ("LOC", "PER", 0.0, 2)
    assert tuple(score) == pytest.approx((4 / 5, 4 / 6, 8 / 11, 6))


def test_entities_are_learned_and_named_with_their_places(notes: Path, tmp_path: Path) -> None:
    task = TokenClassification(model=TINY)
    model = train(task, notes, 150)
    metrics = task.metrics(measure(task, model, notes))
    assert metrics["entity_f1"] > 0.95
    assert metrics["word_accuracy"] > 0.95
    task.save(model, tmp_path / "model", notes)
    loaded_task, loaded = load_model(tmp_path / "model")
    text, words = loaded_task.predict(loaded, [np.array("Ann went to New York"), ["then", "Bob", "went", "to", "Rome"]])
    assert text == [
        {"type": "PER", "text": "Ann", "start": 0, "stop": 3},
        {"type": "LOC", "text": "New York", "start": 12, "stop": 20},
    ]
    assert words == [
        {"type": "PER", "text": "Bob", "start": 1, "stop": 2},
        {"type": "LOC", "text": "Rome", "start": 4, "stop": 5},
    ]


def test_a_saved_model_answers_identically(notes: Path, tmp_path: Path) -> None:
    task = TokenClassification(model=TINY)
    assert_saved_whole(task, train(task, notes, 2), notes, tmp_path)


def test_what_does_not_fit_is_refused(notes: Path, tmp_path: Path) -> None:
    task = TokenClassification(model=TINY)
    info = Dataset.open(notes).info
    with pytest.raises(DataError, match="needs a dataset of tagged_text, this one holds images"):
        task.check(images_info())
    with pytest.raises(DataError, match="name no entity"):
        task.check(info.with_changes(classes=("O", "X")))
    task.save(train(task, notes, 0), tmp_path / "m", notes)
    loaded_task, loaded = load_model(tmp_path / "m")
    for wrong in ("", [], ["a", 3], 5):
        with pytest.raises(InputError, match="an input is no text"):
            loaded_task.predict(loaded, [wrong])


def test_types_are_named_once() -> None:
    assert entity_names(CLASSES) == ("LOC", "PER")
