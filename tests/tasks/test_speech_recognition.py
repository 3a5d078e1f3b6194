"""Speech recognition: it spells tones, counts errors as people do, is saved whole, and refuses what it cannot hear."""

from __future__ import annotations

import base64
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from modelyard.data.dataset import Dataset
from modelyard.errors import ConfigError, DataError, InputError
from modelyard.tasks import SpeechRecognition
from modelyard.tasks.language_models import PretrainedModel
from modelyard.tasks.sound import Heard, log_mel, masked, num_frames
from modelyard.tasks.speech_recognition import ConformerModel, collapsed, distance

from .conftest import assert_saved_whole, images_info, measure, row_losses, train
from .scenes import RATE, speech_folder, speech_info, speech_rows, tones, wav

TINY = ConformerModel(layers=1, hidden_size=32, heads=2, bands=16, kernel=7, dropout=0.0)
TASK = SpeechRecognition(model=TINY, blanked=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Words of tones: each letter has its pitch."""
    return speech_folder(tmp_path_factory.mktemp("speech") / "data")


@pytest.fixture(scope="module")
def trained(folder: Path) -> nn.Module:
    """A model that has learnt for some seconds; what it answers with is known of a loaded one, too."""
    return train(TASK, folder, 220, rate=5e-3)


def test_words_of_tones_are_written_down(trained: nn.Module, folder: Path) -> None:
    metrics = TASK.metrics(measure(TASK, trained, folder))
    assert metrics["cer"] < 0.1
    assert metrics["wer"] < 0.3
    assert metrics["right_texts"] > 0.7


def test_a_recording_is_heard_however_it_comes(trained: nn.Module) -> None:
    sound = tones("cab", np.random.default_rng(5))
    file = wav(sound)
    twice = np.repeat(sound, 2)  # the same sound at another rate
    asked = [
        file,
        base64.b64encode(file).decode(),
        f"data:audio/wav;base64,{base64.b64encode(file).decode()}",
        sound,
        sound.tolist(),
        {"samples": sound.tolist(), "sample_rate": RATE},
        wav(twice, 2 * RATE),
        wav(np.stack([sound, sound], axis=1)),
    ]
    assert TASK.predict(trained, asked) == [{"text": "cab"}] * len(asked)
    assert TASK.predict(trained, []) == []


def test_the_command_line_names_a_wav_file(trained: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(wav(tones("ab", np.random.default_rng(1))))
    assert TASK.predict(trained, [TASK.parse_input(str(tmp_path / "a.wav"))]) == [{"text": "ab"}]
    with pytest.raises(ConfigError, match="name a WAV file"):
        TASK.parse_input(str(tmp_path / "b.wav"))


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ("nonsense!", "no WAV file in base64"),
        (base64.b64encode(b"RIFF....").decode(), "no WAV file"),
        ([0.0, float("nan")], "not finite"),
        ([0.0, 7.0], "between -1 and 1"),
        ([[0.0], [0.1]], "no sound"),
        (["a"], "no sound"),
        ([], "holds no sound"),
        ({"samples": [0.0]}, "other keys"),
        ({"samples": [0.0], "sample_rate": 10}, "10 samples per second"),
        ({"samples": [0.0] * 16000, "sample_rate": 8000}, r"lasts 2\.0 s, the model takes 1\.5 s at most"),
    ],
)
def test_what_cannot_be_heard_is_refused(wrong: Any, reason: str, trained: nn.Module) -> None:
    with pytest.raises(InputError, match=reason):
        TASK.predict(trained, [wrong])


def test_errors_are_counted_in_words_and_characters() -> None:
    counts = {"word_errors": [1, 2], "words": [3, 1], "character_errors": [0, 4], "characters": [8, 2]}
    stats = {name: np.array(values) for name, values in counts.items()} | {"nll": np.array([2.0, 3.0])}
    assert TASK.metrics(stats) == {
        "wer": pytest.approx(3 / 4),
        "cer": pytest.approx(4 / 10),
        "right_texts": 0.5,
        "loss": pytest.approx(5 / 10),
    }


def test_distance_is_the_fewest_edits() -> None:
    known = {("kitten", "sitting"): 3, ("", "abc"): 3, ("abc", ""): 3, ("abc", "abc"): 0, ("ab", "ba"): 2}
    assert {pair: distance(*pair) for pair in known} == known
    assert distance(["one", "two"], ["two"]) == 1

    def slow(one: str, other: str) -> int:
        if not one or not other:
            return len(one) + len(other)
        change = slow(one[1:], other[1:]) + (one[0] != other[0])
        return min(change, slow(one[1:], other) + 1, slow(one, other[1:]) + 1)

    draw = random.Random(0)
    for _ in range(60):
        one, other = ("".join(draw.choices("ab", k=draw.randrange(6))) for _ in range(2))
        assert distance(one, other) == slow(one, other)


def test_a_path_is_collapsed_as_ctc_says() -> None:
    assert collapsed([9, 1, 1, 9, 1, 2, 2, 9, 9], blank=9) == [1, 1, 2]
    assert collapsed([9, 9], blank=9) == []


@pytest.mark.parametrize("seconds", [0.5, 1.013, 2.0])
def test_what_is_heard_equals_the_feature_extractor_of_transformers(seconds: float) -> None:
    from transformers import SeamlessM4TFeatureExtractor

    draw = np.random.default_rng(0)
    sound = (0.1 * draw.normal(size=round(16000 * seconds))).astype(np.float32)
    given = SeamlessM4TFeatureExtractor()(sound, sampling_rate=16000, return_tensors="np", pad_to_multiple_of=None)
    padded = torch.nn.functional.pad(torch.from_numpy(sound), (0, 5000))[None]
    heard = log_mel(padded, torch.tensor([len(sound)]), 16000, 80)
    steps = int(heard.mask.sum())
    assert steps == given["input_features"].shape[1]
    np.testing.assert_allclose(heard.values[0, :steps].numpy(), given["input_features"][0], atol=2e-3)
    assert not heard.values[0, steps:].any(), "nothing is heard behind the end"


def test_a_row_counts_the_same_in_any_batch_even_while_training() -> None:
    torch.manual_seed(0)
    model = TASK.build(speech_info(), None).train()
    rows = speech_rows(6)
    whole = row_losses(TASK, model, rows)
    parts = [row_losses(TASK, model, {k: v[i : i + 2] for k, v in rows.items()}) for i in (0, 2, 4)]
    torch.testing.assert_close(whole, torch.cat(parts), rtol=1e-3, atol=1e-4)


def test_stretches_are_blanked_in_training_alone() -> None:
    torch.manual_seed(0)
    task = SpeechRecognition(model=TINY, blanked=2)
    model, rows = task.build(speech_info(), None), speech_rows(3)
    assert torch.equal(row_losses(task, model.eval(), rows), row_losses(TASK, model, rows))
    assert not torch.equal(row_losses(task, model.train(), rows), row_losses(TASK, model, rows))
    heard = Heard(torch.ones(4, 50, 32), torch.ones(4, 50, dtype=torch.int64))
    shares = (masked(heard, 16, 2).values == 0).float().mean(dim=(1, 2))
    assert ((shares > 0) & (shares < 0.7)).all()
    left, right = masked(heard, 16, 1).values.split(16, dim=2)
    assert torch.equal(left, right), "both frames of a step lose the same bands"


def test_a_very_short_recording_is_heard_as_little(trained: nn.Module) -> None:
    (answer,) = TASK.predict(trained, [[0.0] * 10])
    assert len(answer["text"]) <= 1
    assert num_frames(torch.tensor([0, 10, 280]), RATE).tolist() == [2, 2, 2]


def test_every_weight_learns() -> None:
    torch.manual_seed(0)
    model = TASK.build(speech_info(), None)
    TASK.loss(model, TASK.collate(speech_rows(4), "cpu")).mean().backward()
    assert [name for name, weight in model.named_parameters() if weight.grad is None] == []


def test_a_saved_model_is_whole(trained: nn.Module, folder: Path, tmp_path: Path) -> None:
    assert_saved_whole(TASK, trained, folder, tmp_path)


def base_folder(kind: str, folder: Path) -> Path:
    """A tiny model of transformers with other characters than ours."""
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config: Any
    if kind == "wav2vec2-bert":
        config = transformers.Wav2Vec2BertConfig(**sizes, vocab_size=40)
        transformers.Wav2Vec2BertForCTC(config).save_pretrained(folder)
    else:
        convolutions = {"conv_dim": (8, 8), "conv_stride": (20, 16), "conv_kernel": (40, 16)}
        grouped = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "vocab_size": 40}
        config = transformers.Wav2Vec2Config(**sizes, **convolutions, **grouped)
        transformers.Wav2Vec2ForCTC(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["wav2vec2-bert", "wav2vec2"])
def test_a_folder_can_be_gone_on_from_with_other_characters(kind: str, tmp_path: Path) -> None:
    info = speech_info(rate=16000)
    data = speech_folder(tmp_path / "data", 20, 8, info)
    task = SpeechRecognition(model=PretrainedModel(pretrained=str(base_folder(kind, tmp_path / "base"))), blanked=0)
    model: Any = task.build(Dataset.open(data).info, data)
    assert model.config.vocab_size == 5, "four characters and the blank"
    task.loss(model, task.collate(speech_rows(4, info=info), "cpu")).mean().backward()
    assert_saved_whole(task, model, data, tmp_path / "saved")
    rows = speech_rows(4, info=info)
    whole = row_losses(task, model.eval(), rows)
    parts = [row_losses(task, model, {k: v[i : i + 1] for k, v in rows.items()}) for i in range(4)]
    torch.testing.assert_close(whole, torch.cat(parts), rtol=1e-3, atol=1e-4)
    with pytest.raises(ConfigError, match="8000 samples per second, such models 16000"):
        task.check(speech_info())


def test_datasets_and_folders_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="needs a dataset of speech, this one holds images"):
        TASK.check(images_info())
    base = base_folder("wav2vec2", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "model_type": "whisper"}))
    with pytest.raises(ConfigError, match="holds a whisper model"):
        SpeechRecognition(model=PretrainedModel(pretrained=str(base))).check(speech_info(rate=16000))
    with pytest.raises((ConfigError, ValidationError), match="heads=3 does not divide"):
        ConformerModel(heads=3)
    with pytest.raises(DataError, match="writes the characters ' abc', the dataset ' abx'"):
        TASK.check_saved(Path(), speech_info(), speech_info().with_changes(classes=(" ", "a", "b", "x")), Path())
    with pytest.raises(DataError, match="16000 samples per second, the model hears 8000"):
        TASK.check_saved(Path(), speech_info(), speech_info(rate=16000), Path())
