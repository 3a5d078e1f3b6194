from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from tests.tasks.conftest import write_dataset
from tests.tasks.scenes import boxes_info, speech_info

from modelyard.artifacts import Registry
from modelyard.cli.data import data
from modelyard.cli.main import run

CONFIGS = Path(__file__).parents[2] / "jobs" / "configs"


def exit_of(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        run(data, list(words), "data")
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.parametrize("name", ["pydocs.yaml", "digits_data.yaml"])
def test_the_shipped_configs_are_valid_and_print(name: str) -> None:
    result = CliRunner().invoke(data, ["prepare", "--config", str(CONFIGS / name), "--print-config"])
    assert result.exit_code == 0, result.output
    assert yaml.safe_load(result.output)["splits"]["train"] > 0


def test_overrides_reach_the_config() -> None:
    words = ["prepare", "--config", str(CONFIGS / "pydocs.yaml"), "--text.block_tokens=64", "--print-config"]
    result = CliRunner().invoke(data, words)
    assert yaml.safe_load(result.output)["text"]["block_tokens"] == 64


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--text.block_token=64"], "did you mean 'block_tokens'"),
        (["--source.kind=text", '--source.paths=["/no/such/corpus"]'], "'/no/such/corpus' does not exist"),
        (["--splits.train=0.2"], "must be 1"),
        (["--config", "/no/such.yaml"], "does not exist"),
    ],
)
def test_bad_input_ends_with_exit_code_2_and_says_why(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    base = [] if "--config" in words else ["--name=x"]
    kind = [] if any("source.kind" in word for word in words) else ["--source.kind=pydocs"]
    assert exit_of("prepare", *base, *kind, *words) == 2
    assert message in capsys.readouterr().err


def test_showing_an_unknown_dataset_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_of("show", "nothing") != 0
    assert "nothing" in capsys.readouterr().err


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_corpus_is_prepared_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [{"text": f"Story {number}: " + f"the {number * 7919 % 1013} cats sat down. " * 8} for number in range(60)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    source = ["--source.kind=jsonl", f'--source.paths=["{tmp_path}/a.jsonl"]']
    text = ["--text.block_tokens=8", "--text.tokenizer.vocab_size=300", "--text.deduplicate.near=false"]
    assert exit_of("prepare", "--name=cats", *source, *text) == 0
    output = capsys.readouterr().out
    assert "60 documents, 0 too short" in output
    assert "datasets:/cats/1" in output
    assert exit_of("show", "cats", "--samples", "1") == 0
    output = capsys.readouterr().out
    assert "datasets:/cats/1" in output
    assert "8 tokens" in output
    assert "Story" in output


def test_boxes_and_spoken_texts_are_shown_as_people_write_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MODELYARD_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("MODELYARD_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    boxes, speech = boxes_info(), speech_info()
    rows = {column.name: np.zeros((1, *column.shape), column.dtype) for column in boxes.columns}
    height, width = rows["pixels"].shape[2:]
    rows["labels"][0, 1:] = -1
    rows["boxes"][0, 0] = [0.5, 0.25, 4 / width, 2 / height]
    spoken = {column.name: np.zeros((1, *column.shape), column.dtype) for column in speech.columns}
    spoken["text"][0] = [1, 0, *[-1] * (spoken["text"].shape[1] - 2)]
    registry = Registry.from_settings()
    for name, info, written in (("scenes", boxes, rows), ("spoken", speech, spoken)):
        folder = write_dataset(tmp_path / name, info, {"train": written})
        registry.register(registry.store.put(folder, kind="dataset", name=name))
    assert exit_of("show", "scenes", "--samples", "1") == 0
    corners = [width // 2 - 2, height // 4 - 1, width // 2 + 2, height // 4 + 1]
    assert f"labels: {boxes.classes[0]} at {corners}\n" in capsys.readouterr().out
    assert exit_of("show", "spoken", "--samples", "1") == 0
    assert f"text: {speech.classes[1]}{speech.classes[0]}\n" in capsys.readouterr().out


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_the_digits_are_prepared_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_of("prepare", "--config", str(CONFIGS / "digits_data.yaml")) == 0
    assert "1,797 documents" in capsys.readouterr().out
    assert exit_of("show", "datasets:/digits/1") == 0
    assert "10: 0, 1, 2, 3" in capsys.readouterr().out
