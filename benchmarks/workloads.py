"""Every workload on real data: prepared, trained and measured through the same two commands, against its baseline.

    python benchmarks/corpora.py all                    # the data, once
    python benchmarks/workloads.py [NAME ...] [--json FILE]

Each row trains `jobs/configs/NAME.yaml` (with the changes given below) on the dataset of `NAME_data.yaml` and measures
the model on its test split. Baselines are fitted on the same train split. Everything lives in `MODELYARD_HOME`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("RAY_ADDRESS", "local")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np

if TYPE_CHECKING:
    from modelyard.artifacts import Registry
    from modelyard.data.dataset import Dataset
    from modelyard.training.evaluation import EvaluationResult

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "jobs" / "configs"
Baselines = dict[str, float]


@dataclass(frozen=True)
class Workload:
    """One row of the table."""

    name: str
    config: str
    """Name of the files in `jobs/configs`, without their endings."""
    metric: str
    target: Callable[[float, Baselines], bool]
    """Whether a value is good enough, given the baselines."""
    target_text: str
    baselines: Callable[[Dataset, dict[str, float]], Baselines]
    """From the dataset and the model's own metrics to what a simple method reaches."""
    corpora: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()
    """Overrides on the training config."""
    look: Callable[[Path], dict[str, float]] | None = None
    """Further figures, from the folder of the model."""


@dataclass(frozen=True)
class Row:
    """What a workload reached."""

    name: str
    metric: str
    value: float
    low: float
    high: float
    target: str
    reached: bool
    baselines: Baselines
    test_rows: int
    train_seconds: float
    metrics: dict[str, float]
    classes: list[dict[str, Any]]


# --- baselines --------------------------------------------------------------------------------------------------


def _all_rows(dataset: Dataset, split: str) -> dict[str, np.ndarray]:
    rows = dataset.split(split)
    return rows.read(np.arange(rows.num_rows))


def none(dataset: Dataset, metrics: dict[str, float]) -> Baselines:
    """Nothing simpler is known."""
    return {}


def logistic_pixels(dataset: Dataset, metrics: dict[str, float]) -> Baselines:
    """Logistic regression on the pixels."""
    from sklearn.linear_model import LogisticRegression

    train, test = _all_rows(dataset, "train"), _all_rows(dataset, "test")
    flat = [rows["pixels"].reshape(len(rows["label"]), -1) / 255.0 for rows in (train, test)]
    model = LogisticRegression(C=0.1, max_iter=500).fit(flat[0], train["label"])
    return {"logistic regression": float(model.score(flat[1], test["label"]))}


def _texts(dataset: Dataset, rows: dict[str, np.ndarray]) -> list[str]:
    """The texts as the model reads them: decoded from its own tokens, so that nobody sees more of a long one."""
    from tokenizers import Tokenizer

    assert dataset.tokenizer_folder is not None
    tokenizer = Tokenizer.from_file(str(dataset.tokenizer_folder / "tokenizer.json"))
    ids = [row[:n].tolist() for row, n in zip(rows["input_ids"], rows["length"], strict=True)]
    return list(tokenizer.decode_batch(ids))


def text_baselines(dataset: Dataset, metrics: dict[str, float]) -> Baselines:
    """The most frequent class; TF-IDF of words and pairs of words with logistic regression."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import f1_score
    from sklearn.pipeline import make_pipeline

    train, test = _all_rows(dataset, "train"), _all_rows(dataset, "test")
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    model = make_pipeline(vectorizer, LogisticRegression(C=10.0, max_iter=1000))
    model.fit(_texts(dataset, train), train["label"])
    found = model.predict(_texts(dataset, test))
    majority = np.full_like(test["label"], np.bincount(train["label"]).argmax())
    return {
        "majority": float(f1_score(test["label"], majority, average="macro")),
        "TF-IDF + logistic": float(f1_score(test["label"], found, average="macro")),
    }


def tag_lookup(dataset: Dataset, metrics: dict[str, float]) -> Baselines:
    """Each word's most frequent tag in the train split, `O` for unknown words; words by their first token."""
    from collections import Counter, defaultdict

    from modelyard.tasks.token_classification import IGNORED, entity_counts

    train, test = _all_rows(dataset, "train"), _all_rows(dataset, "test")
    seen: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
    for ids, tags in zip(train["input_ids"], train["tags"], strict=True):
        for word, tag in _words(ids, tags):
            seen[word][tag] += 1
    found = np.full_like(test["tags"], IGNORED)
    for row, (ids, tags) in enumerate(zip(test["input_ids"], test["tags"], strict=True)):
        places = np.flatnonzero(tags != IGNORED)
        guesses = [seen[word].most_common(1)[0][0] if word in seen else 0 for word, _ in _words(ids, tags)]
        found[row, places] = guesses
    counts = entity_counts(test["tags"], found, dataset.info.classes)
    total = {
        part: sum(int(v.sum()) for k, v in counts.items() if k.startswith(part)) for part in ("hit", "found", "true")
    }
    return {"tag of the word": 2 * total["hit"] / max(1, total["found"] + total["true"])}


def _words(ids: np.ndarray, tags: np.ndarray) -> list[tuple[tuple[int, ...], int]]:
    places = [*np.flatnonzero(tags >= 0).tolist(), len(ids)]
    return [
        (tuple(ids[start : min(stop, start + 8)].tolist()), int(tags[start]))
        for start, stop in itertools.pairwise(places)
    ]


def seasonal_naive(dataset: Dataset, metrics: dict[str, float]) -> Baselines:
    """The same hour of the season before."""
    return {"seasonal naive": metrics["seasonal_naive_mase"]}


def popularity(dataset: Dataset, metrics: dict[str, float]) -> Baselines:
    """The most popular items that the user does not know."""
    return {"popularity": metrics["popularity_ndcg_at_10"]}


def untrained(dataset: Dataset, metrics: dict[str, float]) -> Baselines:
    """The model before it was fine-tuned."""
    import torch

    from modelyard.tasks import CausalLM
    from modelyard.tasks.language_models import PretrainedModel

    task = CausalLM(model=PretrainedModel(pretrained="corpora/smollm2"))
    model = task.build(dataset.info, dataset.folder).eval()
    rows, parts = dataset.split("test"), []
    with torch.inference_mode():
        for start in range(0, rows.num_rows, 8):
            chosen = rows.read(np.arange(start, min(start + 8, rows.num_rows)))
            parts.append({k: v.numpy() for k, v in task.statistics(model, task.collate(chosen, "cpu")).items()})
    stats = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return {"before": task.metrics(stats)["perplexity"]}


def components(dataset: Dataset, metrics: dict[str, float]) -> Baselines:
    """Connected regions that differ from the colours around them, told apart by logistic regression on their pixels."""
    from scipy import ndimage
    from sklearn.linear_model import LogisticRegression

    from modelyard.tasks.average_precision import average_precisions, matched

    train, test = _all_rows(dataset, "train"), _all_rows(dataset, "test")
    side, most = train["pixels"].shape[-1], 20
    crops, labels = [], []
    for pixels, boxes, numbers in zip(train["pixels"], train["boxes"], train["labels"], strict=True):
        crops += [_crop(pixels, box) for box in _corners(boxes[numbers >= 0], side)]
        labels += numbers[numbers >= 0].tolist()
    model = LogisticRegression(C=0.1, max_iter=200).fit(np.stack(crops), labels)
    scores = np.full((len(test["pixels"]), most), -1.0)
    found, right = np.full(scores.shape, -1), np.zeros(scores.shape, np.int64)
    for row, (pixels, boxes, numbers) in enumerate(zip(test["pixels"], test["boxes"], test["labels"], strict=True)):
        values = pixels.astype(np.float32)
        differs = np.abs(values - ndimage.median_filter(values, (1, 15, 15))).max(axis=0)
        regions = ndimage.find_objects(ndimage.label(differs > 40, np.ones((3, 3)))[0])
        places = [(x.start, y.start, x.stop, y.stop) for y, x in regions if y.stop - y.start >= 10]
        places = sorted(places, key=lambda p: -(p[2] - p[0]) * (p[3] - p[1]))[:most]
        if places:
            shares = model.predict_proba(np.stack([_crop(pixels, place) for place in places]))
            scores[row, : len(places)], found[row, : len(places)] = shares.max(axis=1), shares.argmax(axis=1)
            true = numbers[numbers >= 0]
            right[row, : len(places)] = matched(
                scores[row, : len(places)],
                found[row, : len(places)],
                np.array(places, np.float64),
                true,
                _corners(boxes[numbers >= 0], side),
            )
    classes = len(dataset.info.classes)
    truths = np.stack([np.bincount(row[row >= 0], minlength=classes) for row in test["labels"]])
    precisions = average_precisions(scores, found, right, truths)
    return {"regions + logistic": float(np.nanmean(precisions)), "the same at .5": float(np.nanmean(precisions[:, 0]))}


def _corners(boxes: np.ndarray, side: int) -> np.ndarray:
    return np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], axis=1) * side


def _crop(pixels: np.ndarray, box: Any) -> np.ndarray:
    """What is in a box as 16 x 16 numbers with mean 0 and deviation 1."""
    from PIL import Image

    x0, y0, x1, y1 = (round(float(value)) for value in box)
    grey = Image.fromarray(pixels.mean(axis=0).astype(np.uint8)).crop((x0, y0, max(x1, x0 + 1), max(y1, y0 + 1)))
    values = np.asarray(grey.resize((16, 16)), np.float32).reshape(-1)
    values = (values - values.mean()) / (values.std() + 1e-3)
    return values if values[0] < 0.5 else -values  # dark digits on bright ground as bright ones on dark


def pixel_classes(dataset: Dataset, metrics: dict[str, float]) -> Baselines:
    """All of it the most frequent class; logistic regression on the colours of 5 x 5 pixels."""
    from sklearn.linear_model import LogisticRegression

    train, test = _all_rows(dataset, "train"), _all_rows(dataset, "test")
    draw = np.random.default_rng(0)
    rows = draw.permutation(len(train["mask"]))[:300]
    around, classes = _around(train["pixels"][rows]), train["mask"][rows].reshape(-1)
    kept = np.concatenate([draw.permutation(np.flatnonzero(classes == c))[:1500] for c in np.unique(classes)])
    weights = np.bincount(classes)[classes[kept]] / np.bincount(classes[kept])[classes[kept]]
    model = LogisticRegression(max_iter=100).fit(around[kept], classes[kept], sample_weight=weights)
    true, size = test["mask"].reshape(-1), len(dataset.info.classes)
    majority = np.full_like(true, np.bincount(train["mask"].reshape(-1)).argmax())
    found = model.predict(_around(test["pixels"]))
    return {"majority": _mean_iou(true, majority, size), "5 x 5 pixels + logistic": _mean_iou(true, found, size)}


def _around(pixels: np.ndarray) -> np.ndarray:
    padded = np.pad(pixels, ((0, 0), (0, 0), (2, 2), (2, 2)), mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (5, 5), axis=(2, 3))
    return windows.transpose(0, 2, 3, 1, 4, 5).reshape(-1, pixels.shape[1] * 25).astype(np.float32) / 255 - 0.5


def _mean_iou(true: np.ndarray, found: np.ndarray, classes: int) -> float:
    table = np.bincount(true.astype(np.int64) * classes + found, minlength=classes**2).reshape(classes, classes)
    hit, either = np.diag(table), table.sum(axis=0) + table.sum(axis=1) - np.diag(table)
    return float((hit[either > 0] / either[either > 0]).mean())


def nearest_recording(dataset: Dataset, metrics: dict[str, float]) -> Baselines:
    """The most frequent text; the text of the most alike recording, by its energies in 48 pieces of time."""
    from collections import Counter

    import torch

    from modelyard.tasks.sound import log_mel
    from modelyard.tasks.speech_recognition import distance

    assert dataset.info.sample_rate is not None
    texts, pieces = {}, {}
    for split in ("train", "test"):
        rows = _all_rows(dataset, split)
        texts[split] = ["".join(dataset.info.classes[n] for n in row if n >= 0) for row in rows["text"]]
        shapes = []
        for start in range(0, len(rows["text"]), 64):
            samples = torch.from_numpy(rows["samples"][start : start + 64]).float() / 32768
            lengths = torch.from_numpy(rows["length"][start : start + 64]).long()
            heard = log_mel(samples, lengths, dataset.info.sample_rate, 20)
            for values, mask in zip(heard.values, heard.mask, strict=True):
                places = torch.linspace(0, int(mask.sum()) - 1, 48).round().long()
                shapes.append(values[places].flatten())
        pieces[split] = torch.stack(shapes)
    nearest = torch.cdist(pieces["test"], pieces["train"]).argmin(dim=1).tolist()
    frequent = Counter(texts["train"]).most_common(1)[0][0]
    words = sum(len(text.split()) for text in texts["test"])

    def errors(said: list[str]) -> float:
        wrong = (distance(one.split(), true.split()) for one, true in zip(said, texts["test"], strict=True))
        return sum(wrong) / words

    return {
        "most frequent text": errors([frequent] * len(nearest)),
        "nearest recording": errors([texts["train"][place] for place in nearest]),
    }


# --- looks at the model itself ----------------------------------------------------------------------------------


def weights(folder: Path) -> dict[str, float]:
    """Slope and intercept of a line."""
    from modelyard.tasks import load_model

    model: Any = load_model(folder)[1]
    return {"w": model[0].weight.item(), "b": model[0].bias.item()}


def ended_turns(folder: Path) -> dict[str, float]:
    """Of answers to 8 messages: the share that ends with the template's own mark within 40 tokens."""
    from modelyard.tasks import load_model
    from modelyard.tasks.generation import load_tokenizer

    model, tokenizer = load_model(folder)[1], load_tokenizer(folder)
    asked = ("Hello.", "What is your name?", "I love you.", "Where are we going?", "Stop it!", "Who are you?")
    asked += ("You are late.", "Do you remember me?")
    ended = 0
    for text in asked:
        chat = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=False)
        net: Any = model
        out = net.generate(input_ids=ids, attention_mask=ids.ne(-1), max_new_tokens=40, do_sample=False, pad_token_id=0)
        answer = out[0, ids.shape[1] :].tolist()
        ended += tokenizer.convert_tokens_to_ids("<|im_end|>") in answer
        print(f"    {text!r} -> {tokenizer.decode(answer, skip_special_tokens=True)!r}", flush=True)
    return {"ended_turns": ended / len(asked)}


# --- the table --------------------------------------------------------------------------------------------------


def _at_least(limit: float) -> Callable[[float, Baselines], bool]:
    return lambda value, _: value >= limit


def _beats(margin: float = 0.0) -> Callable[[float, Baselines], bool]:
    return lambda value, baselines: value >= max(baselines.values()) + margin


def _below_naive(value: float, baselines: Baselines) -> bool:
    return value < 1 and value < baselines["seasonal naive"]


def _images(name: str, architecture: str, target: float | None, *changes: str) -> Workload:
    return Workload(
        name=name,
        config="mnist",
        metric="accuracy",
        target=_beats(0.03) if target is None else _at_least(target),
        target_text="logistic + 0.03" if target is None else f">= {target}",
        baselines=logistic_pixels,
        corpora=("mnist",),
        changes=(f"name=mnist-{architecture}", f"task.architecture={architecture}", *changes),
    )


def _texts_of(name: str, config: str) -> Workload:
    beats = "beats both"
    return Workload(name, config, "macro_f1", _beats(), beats, text_baselines, (config, "minilm"))


def _series(name: str, config: str, architecture: str, *changes: str) -> Workload:
    return Workload(
        name=name,
        config=config,
        metric="mase",
        target=_below_naive,
        target_text="< 1, and < naive",
        baselines=seasonal_naive,
        corpora=(config,),
        changes=(f"name={config}-{architecture}", f"task.architecture={architecture}", *changes),
    )


def _recommender(architecture: str, *changes: str) -> Workload:
    return Workload(
        name=f"films next, {architecture}",
        config="movielens",
        metric="ndcg_at_10",
        target=_beats(),
        target_text="beats popularity",
        baselines=popularity,
        corpora=("movielens",),
        changes=(f"name=movielens-{architecture}", f"task.architecture={architecture}", *changes),
    )


WORKLOADS = (
    Workload(
        "linear regression", "points", "rmse", lambda value, _: value < 1e-3, "w=2, b=0 to 1e-3", none, look=weights
    ),
    Workload("digits 8x8, CNN", "digits", "accuracy", _at_least(0.97), ">= 0.97", logistic_pixels),
    _images("MNIST, MLP", "mlp", 0.94),
    _images("MNIST, CNN", "cnn", 0.97),
    _images("MNIST, ResNet-18", "resnet18", None, "training.max_steps=250", "optimizer.learning_rate=0.001"),
    _images(
        "MNIST, ViT-tiny of 6 layers",
        "vit_tiny",
        None,
        "task.patch=7",
        "task.layers=6",
        "task.dropout=0.0",
        "task.jitter=0.08",
        "training.max_steps=4000",
        "optimizer.learning_rate=0.001",
        "schedule.warmup_steps=200",
        "validation.every_steps=500",
    ),
    Workload(
        "entities in tweets", "entities", "entity_f1", _beats(), "beats lookup", tag_lookup, ("entities", "minilm")
    ),
    _texts_of("intent of questions", "questions"),
    _texts_of("topic of news", "bbc"),
    _texts_of("sentiment of reviews", "films"),
    _series("electricity, LSTM", "demand", "lstm"),
    _series("electricity, PatchTST", "demand", "patchtst"),
    _series("flights, LSTM", "flights", "lstm"),
    _series("flights, PatchTST", "flights", "patchtst"),
    _recommender("sequence"),
    _recommender("two_tower"),
    Workload(
        name="digits in pictures, Deformable DETR",
        config="scenes_boxes",
        metric="map",
        target=_beats(0.1),
        target_text="regions + 0.1",
        baselines=components,
        corpora=("scenes",),
    ),
    Workload(
        name="digits in pictures, SegFormer",
        config="scenes_masks",
        metric="mean_iou",
        target=_beats(0.1),
        target_text="logistic + 0.1",
        baselines=pixel_classes,
        corpora=("scenes",),
    ),
    Workload(
        name="spoken digits, conformer",
        config="spoken",
        metric="wer",
        target=lambda value, baselines: value <= min(baselines.values()) / 2,
        target_text="half of nearest",
        baselines=nearest_recording,
        corpora=("spoken",),
    ),
    Workload(
        name="chat, SmolLM2 with LoRA",
        config="dialogue",
        metric="perplexity",
        target=lambda value, baselines: value < baselines["before"],
        target_text="down",
        baselines=untrained,
        corpora=("dialogue", "smollm2"),
        look=ended_turns,
    ),
)


def run(workload: Workload) -> Row:
    """Prepare (once), train and measure one workload."""
    import corpora

    import modelyard
    from modelyard.artifacts import Registry
    from modelyard.data.dataset import Dataset
    from modelyard.training.evaluation import evaluate

    for name in workload.corpora:
        corpora.fetch(name)
    registry = Registry.from_settings()
    dataset_ref = _prepared(registry, workload.config)
    started = time.perf_counter()
    trained = modelyard.train(CONFIGS / f"{workload.config}.yaml", *workload.changes)
    seconds = time.perf_counter() - started
    assert trained.model is not None
    dataset = Dataset.open(registry.open(dataset_ref, kind="dataset")[1])
    split = "test" if "test" in dataset.info.splits else "train"
    result = evaluate(trained.model, dataset_ref, split=split, batch_size=32)
    metrics = {name: interval.value for name, interval in result.metrics.items()}
    baselines = workload.baselines(dataset, metrics)
    if workload.look is not None:
        metrics |= workload.look(registry.open(trained.model, kind="model")[1])
    interval = result.metrics[workload.metric]
    return Row(
        name=workload.name,
        metric=workload.metric,
        value=interval.value,
        low=interval.low,
        high=interval.high,
        target=workload.target_text,
        reached=workload.target(interval.value, baselines),
        baselines=baselines,
        test_rows=result.num_rows,
        train_seconds=seconds,
        metrics=metrics,
        classes=_classes(result),
    )


def _prepared(registry: Registry, config: str) -> str:
    """The reference of the dataset, prepared now unless there is one."""
    from modelyard.config import load
    from modelyard.data.config import PrepareConfig
    from modelyard.data.prepare import prepare
    from modelyard.errors import NotFoundError

    wanted = load(PrepareConfig, CONFIGS / f"{config}_data.yaml")
    try:
        return registry.open(f"datasets:/{wanted.name}", kind="dataset")[0].reference
    except NotFoundError:
        return prepare(wanted).reference


def _classes(result: EvaluationResult) -> list[dict[str, Any]]:
    return [{"class": row.name, **row.score._asdict()} for row in result.classes]


def line(row: Row) -> str:
    """One line of the table."""
    simple = ", ".join(f"{name} {value:.3f}" for name, value in row.baselines.items()) or "-"
    value = f"{row.value:.4f}" if row.value >= 1e-3 else f"{row.value:.1e}"
    spread = "" if math.isnan(row.low) else f" ({row.low:.3f} .. {row.high:.3f})"
    reached = "yes" if row.reached else "NO"
    fields = (row.name, row.metric, value + spread, row.target, reached, simple, f"{row.train_seconds:.0f}")
    return f"| {' | '.join(fields)} |"


HEAD = "| workload | metric | value (95% interval) | target | reached | baseline | train s |\n" + "|---" * 7 + "|"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="parts of names of workloads; all by default")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    given = parser.parse_args()
    from modelyard import cluster

    chosen = [w for w in WORKLOADS if not given.names or any(name in w.name for name in given.names)]
    os.chdir(ROOT)
    cluster.connect()  # once for all of them
    rows = []
    print(HEAD, flush=True)
    for workload in chosen:
        rows.append(run(workload))
        print(line(rows[-1]), flush=True)
        if given.json:
            given.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    for row in rows:
        if row.classes and row.metric in TABLES:
            names = list(row.classes[0])
            print(f"\n{row.name}\n\n| {' | '.join(names)} |\n{'|---' * len(names)}|")
            for each in row.classes:
                shown = (f"{value:.3f}" if isinstance(value, float) else str(value) for value in each.values())
                print(f"| {' | '.join(shown)} |")


TABLES = ("entity_f1", "map", "mean_iou")
"""Metrics of which each class is shown, too."""


if __name__ == "__main__":
    main()
