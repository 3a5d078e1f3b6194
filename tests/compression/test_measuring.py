"""Figures in a process of its own, and what is refused or survives at their edges."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.compression.conftest import Folders

from modelyard.compression.measuring import Figures, Request, best_speed, check_threads, take
from modelyard.data.dataset import INFO_FILE, Column, Dataset
from modelyard.data.shards import ShardWriter
from modelyard.errors import ConfigError

FIGURES = Figures("torch", 4, {"accuracy": 1.0}, 10.0, 20.0, None, 100.0, 100.0, 1000.0, 300.0)


def request(folders: Folders, **changes: Any) -> Request:
    measuring = {"rows": 4, "prompt_tokens": 8, "new_tokens": 4, "repeats": 1, **changes.pop("measuring", {})}
    place = {"folder": str(folders.model), "dataset": str(folders.dataset), "split": "test", "threads": 1}
    return Request(engine="torch", measuring=measuring, **{**place, **changes})


def test_of_two_passes_the_better_speed_counts_and_all_else_is_of_the_first() -> None:
    disturbed = replace(FIGURES, latency_p50_ms=30.0, latency_p99_ms=3000.0, per_s=30.0, per_cpu_s=60.0)
    quiet = replace(FIGURES, quality={}, scored_per_cpu_s=None, peak_memory_mib=999.0)
    assert best_speed(disturbed, quiet) == FIGURES
    assert best_speed(FIGURES, replace(disturbed, quality={})) == FIGURES
    texts = [replace(FIGURES, first_token_ms=ms) for ms in (40.0, 30.0)]
    assert best_speed(*texts).first_token_ms == 30.0


def test_rows_with_room_for_one_new_token_still_have_a_speed_after_the_first(language: Folders, tmp_path: Path) -> None:
    columns = (Column(name="input_ids", dtype="uint16", shape=(2,)),)
    writer = ShardWriter(tmp_path, "test", columns, rows_per_shard=10)
    writer.write({"input_ids": np.arange(8, dtype=np.uint16).reshape(4, 2)})
    writer.close()
    info = Dataset.open(language.dataset).info.model_copy(update={"splits": {"test": 4}, "block_tokens": 2})
    (tmp_path / INFO_FILE).write_text(info.model_copy(update={"columns": columns}).model_dump_json())
    found = take(request(language, dataset=str(tmp_path)))
    assert found.latency_p50_ms > 0
    assert found.per_cpu_s > 0
    assert found.quality["perplexity"] > 1


def test_a_pass_for_speed_reads_no_held_out_rows(language: Folders) -> None:
    found = take(request(language, speed_only=True))
    assert found.per_cpu_s > 0
    assert (found.quality, found.scored_per_cpu_s) == ({}, None)


def test_more_threads_than_cpus_are_refused_with_the_limit() -> None:
    most = os.cpu_count()
    check_threads(most or 1)
    with pytest.raises(ConfigError, match=rf"target\.threads: 100000 threads, .* {most} CPU(.|\n)*at most {most}"):
        check_threads(100_000)
