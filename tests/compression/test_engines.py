"""What engines say of themselves: the size of their files, and the time of each token."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.compression.conftest import Folders

from modelyard.compression.engines import open_engine, token_seconds


def test_tokens_of_llama_cpp_have_a_time_each() -> None:
    timings = [
        {"predicted_n": n, "predicted_ms": ms} for n, ms in ((1, 0.0), (2, 1.0), (3, 51.0), (4, 52.0), (4, 52.0))
    ]
    assert token_seconds(timings) == pytest.approx([0.001, 0.05, 0.001])


def test_tokens_that_llama_cpp_gives_at_once_share_their_time() -> None:
    timings = [{"predicted_n": n, "predicted_ms": ms} for n, ms in ((2, 4.0), (5, 10.0))]
    assert token_seconds(timings) == pytest.approx([0.004, 0.002, 0.002, 0.002])


@pytest.mark.slow
def test_llama_cpp_times_every_token_of_a_text(language: Folders) -> None:
    pytest.importorskip("xllamacpp")
    pytest.importorskip("gguf")
    made = open_engine("llamacpp", language.model, threads=1).generate([5, 6, 7, 8], 12)
    assert len(made.token_s) == 11
    assert min(made.token_s) > 0
    assert len(set(made.token_s)) > 1  # not their mean, repeated
    assert made.prefill_s > 0


def test_an_openvino_export_weighs_all_of_its_files(tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    from openvino import opset13 as ops

    folder = tmp_path / "openvino"
    folder.mkdir()
    pixels = ops.parameter([1, 3], np.float32)
    scores = ops.matmul(pixels, ops.constant(np.ones((3, 2), np.float32)), False, False)
    openvino.save_model(openvino.Model([scores], [pixels]), folder / "openvino_model.xml", compress_to_fp16=False)
    xml, binary = (folder / f"openvino_model.{end}" for end in ("xml", "bin"))
    assert open_engine("openvino", tmp_path, threads=1).weight_bytes == xml.stat().st_size + binary.stat().st_size
