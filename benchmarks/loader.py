"""Tokens per second of the loader against numpy.memmap and Hugging Face datasets: same data, same batches.

    python benchmarks/loader.py [--quick] [--json FILE]

Every variant yields batches of rows x tokens as int64, in random order, from the same tokens in the page cache.
Rounds are interleaved; a figure is the median over rounds, a ratio the median of the ratios within rounds.

- memmap: the common way (nanoGPT): reopen the memmap for each batch, stack random blocks. Samples with
  replacement, cannot resume.
- fancy index: the best case of numpy: one open memmap, a permutation held in memory, one index per batch.
- hf datasets: a dataset saved to disk and mapped, shuffled, numpy format, `iter(batch_size)`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from modelyard.data.dataset import Column, Split
from modelyard.data.loader import Loader, LoaderState
from modelyard.data.shards import ShardWriter, find

Batches = Iterator[np.ndarray]

ROWS_PER_SHARD = 1 << 16
SEED = 1234


def write_shards(folder: Path, tokens: np.ndarray) -> Split:
    """The tokens (rows, block) as a split of ours."""
    column = Column(name="input_ids", dtype="uint16", shape=(tokens.shape[1],))
    writer = ShardWriter(folder, "train", [column], ROWS_PER_SHARD)
    writer.write({"input_ids": tokens})
    writer.close()
    return Split("train", (column,), find(folder)["train"])


def modelyard_batches(split: Split, batch: int) -> Batches:
    with Loader(split, global_batch_size=batch, start=0, stop=batch, state=LoaderState(SEED)) as loader:
        for loaded in loader:
            yield loaded.rows["input_ids"].astype(np.int64)


def memmap_batches(path: Path, batch: int, block: int) -> Batches:
    dice = np.random.default_rng(SEED)
    while True:
        data = np.memmap(path, dtype=np.uint16, mode="r")  # reopened each time, as nanoGPT does against a leak
        starts = dice.integers(0, len(data) - block, batch)
        yield np.stack([data[start : start + block].astype(np.int64) for start in starts])


def fancy_index_batches(path: Path, batch: int, block: int) -> Batches:
    data = np.memmap(path, dtype=np.uint16, mode="r").reshape(-1, block)
    dice = np.random.default_rng(SEED)
    while True:
        order = dice.permutation(len(data))
        for at in range(0, len(order) - batch + 1, batch):
            yield data[order[at : at + batch]].astype(np.int64)


def hf_batches(folder: Path, batch: int) -> Batches:
    import datasets

    datasets.disable_progress_bars()
    rows = datasets.load_from_disk(str(folder))
    seed = SEED
    while True:
        for found in rows.shuffle(seed=seed, keep_in_memory=True).with_format("numpy").iter(batch_size=batch):
            yield found["input_ids"].astype(np.int64)
        seed += 1


def save_hf(folder: Path, tokens: np.ndarray) -> None:
    import datasets

    datasets.disable_progress_bars()
    flat = pa.array(tokens.reshape(-1))
    table = pa.table({"input_ids": pa.FixedSizeListArray.from_arrays(flat, tokens.shape[1])})
    datasets.Dataset(table).save_to_disk(str(folder))


def measure(batches: Batches, seconds: float) -> tuple[float, float]:
    """Tokens per second of wall time and of CPU time, over about `seconds`."""
    for _ in range(20):
        next(batches)
    count, began, cpu = 0, time.perf_counter(), time.process_time()
    while (wall := time.perf_counter() - began) < seconds:
        for _ in range(20):
            count += next(batches).size
    return count / wall, count / (time.process_time() - cpu)


def run(
    variants: dict[str, Callable[[], Batches]], rounds: int, seconds: float
) -> dict[str, list[tuple[float, float]]]:
    """Interleaved rounds: each variant once per round, the order turned round each time."""
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    open_batches = {name: make() for name, make in variants.items()}
    for number in range(rounds):
        for name in list(variants)[:: 1 if number % 2 == 0 else -1]:
            if name == "modelyard":  # its thread must not run while others are measured
                open_batches[name] = variants[name]()
            results[name].append(measure(open_batches[name], seconds))
            if name == "modelyard":
                open_batches[name].close()  # type: ignore[attr-defined]
    return results


def ratio(results: dict[str, list[tuple[float, float]]], other: str) -> float:
    pairs = zip(results["modelyard"], results[other], strict=True)
    return statistics.median(ours[0] / theirs[0] for ours, theirs in pairs)


def show(results: dict[str, list[tuple[float, float]]], figures: dict[str, float]) -> None:
    print(f"{'variant':<14}{'Mtokens/s':>11}{'lowest':>9}{'highest':>9}{'per CPU-s':>11}")
    for name, values in results.items():
        walls = [wall / 1e6 for wall, _ in values]
        cpu = statistics.median(per_cpu for _, per_cpu in values) / 1e6
        print(f"{name:<14}{statistics.median(walls):>11.1f}{min(walls):>9.1f}{max(walls):>9.1f}{cpu:>11.1f}")
    for name, value in figures.items():
        print(f"{name:<28}{value:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds: under a minute")
    parser.add_argument("--json", type=Path, help="write the figures as one flat object")
    parser.add_argument("--batch", type=int, default=8, help="rows per batch")
    parser.add_argument("--block", type=int, default=256, help="tokens per row")
    arguments = parser.parse_args()
    rows = (16 if arguments.quick else 64) * (1 << 20) // arguments.block
    rounds, seconds = (5, 0.5) if arguments.quick else (11, 2.0)

    has_hf = importlib.util.find_spec("datasets") is not None
    versions = {"python": platform.python_version(), "numpy": np.__version__, "pyarrow": pa.__version__}
    if has_hf:
        import datasets

        versions["datasets"] = datasets.__version__
    print("python", *sys.argv)
    print(", ".join(f"{name} {version}" for name, version in versions.items()), f"; {os.cpu_count()} CPUs")
    print(f"{rows:,} rows of {arguments.block} tokens, batches of {arguments.batch}, {rounds} rounds of {seconds} s")

    tokens = np.random.default_rng(0).integers(0, 50_000, (rows, arguments.block)).astype(np.uint16)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        split = write_shards(folder, tokens)
        path = folder / "tokens.bin"
        tokens.tofile(path)
        variants: dict[str, Callable[[], Any]] = {
            "modelyard": lambda: modelyard_batches(split, arguments.batch),
            "memmap": lambda: memmap_batches(path, arguments.batch, arguments.block),
            "fancy index": lambda: fancy_index_batches(path, arguments.batch, arguments.block),
        }
        if has_hf:
            save_hf(folder / "hf", tokens)
            variants["hf datasets"] = lambda: hf_batches(folder / "hf", arguments.batch)
        results = run(variants, rounds, seconds)

    figures = {
        "loader_over_memmap": ratio(results, "memmap"),
        "loader_over_fancy_index": ratio(results, "fancy index"),
    }
    if has_hf:
        figures["loader_over_hf_datasets"] = ratio(results, "hf datasets")
    show(results, figures)
    if not has_hf:
        print("hf datasets is not installed: pip install 'modelyard[bench]'")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
