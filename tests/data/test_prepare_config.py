from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import yaml

from modelyard.config import parse
from modelyard.data.config import PrepareConfig
from modelyard.errors import ConfigError


def config(**changes: Any) -> PrepareConfig:
    return parse(PrepareConfig, {"name": "corpus", "source": {"kind": "pydocs"}, **changes})


def test_a_text_source_gets_the_text_section_and_its_defaults() -> None:
    assert config().text is not None
    assert config().text.block_tokens == 256
    assert config().images is None


def test_an_image_source_gets_the_image_section() -> None:
    digits = config(source={"kind": "sklearn_digits"})
    assert digits.images is not None
    assert digits.text is None


@pytest.mark.parametrize("kind", ["pydocs", "sklearn_digits"])
def test_the_printed_config_reads_back_equal(kind: str) -> None:
    printed = config(source={"kind": kind})
    assert parse(PrepareConfig, yaml.safe_load(printed.to_yaml())) == printed


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"text": {"block_token": 3}}, "did you mean 'block_tokens'"),
        ({"source": {"kind": "pydoc"}}, "pydocs"),
        ({"source": {"kind": "text", "path": "x"}}, "did you mean 'paths'"),
        ({"source": {"kind": "text", "paths": []}}, "source.paths"),
        ({"splits": {"train": 0.9, "validation": 0.2}}, "must be 1, but is 1.1"),
        ({"splits": {"train": 1.5}}, "splits.train"),
        ({"splits": {"train": 0, "validation": 0.5, "test": 0.5}}, "splits.train"),
        ({"text": {"block_tokens": 1}}, "text.block_tokens"),
        ({"text": {"tokenizer": {"kind": "train", "vocab_size": 256}}}, "vocab_size"),
        ({"text": {"clean": {"min_characters": 5, "max_characters": 4}}}, "is above max_characters"),
        ({"images": {"channels": 1}}, "no meaning for source.kind='pydocs'"),
        ({"source": {"kind": "sklearn_digits"}, "text": {"block_tokens": 8}}, "use 'images'"),
        ({"source": {"kind": "sklearn_digits"}, "images": {"height": 8}}, "set both height and width"),
        ({"name": "My Data"}, "name"),
        ({"name": "../up"}, "name"),
    ],
)
def test_a_bad_value_is_refused_and_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(**changes)
    assert words in str(caught.value)


def test_the_config_needs_neither_ray_nor_torch() -> None:
    code = "import sys, modelyard.data.config as c; print({'ray', 'torch', 'pyarrow', 'numpy'} & set(sys.modules))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "set()"
