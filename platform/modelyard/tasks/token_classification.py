"""Token classification: a tag per word, and the named entities that the tags spell out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np

from modelyard.errors import DataError, InputError
from modelyard.tasks.base import Objective
from modelyard.tasks.classification_metrics import ClassScore, Score
from modelyard.tasks.encoders import TOKENS, EncoderTask, attention_mask, encode, rows_of
from modelyard.tasks.own_network import answering, plain, plain_module, refuse_options

if TYPE_CHECKING:
    from torch import Tensor, device, nn

    from modelyard.data.dataset import DatasetInfo

TAGS = "tags"
"""Column of tagged text, (n, T) int16: the tag of each word at its first token, `IGNORED` elsewhere."""
IGNORED = -100
_HIT, _FOUND, _TRUE = "hit", "found", "true"
_WORD = re.compile(r"[@#]?\w+(?:[-.]\w+)*|'\w+|[^\w\s]")


class Entity(NamedTuple):
    """Words `start` to `stop` (exclusive) are one entity of the type `name`."""

    name: str
    start: int
    stop: int


class TokenClassification(EncoderTask):
    """An encoder with one score per tag on each token; tags are `O`, `B-NAME` (begins) and `I-NAME` (goes on)."""

    kind: Literal["token_classification"] = "token_classification"

    format: ClassVar[str] = "tagged_text"
    auto_class: ClassVar[str] = "AutoModelForTokenClassification"

    metric_names: ClassVar[tuple[str, ...]] = (
        "entity_f1",
        "entity_precision",
        "entity_recall",
        "macro_entity_f1",
        "word_accuracy",
        "loss",
    )

    @property
    def objective(self) -> Objective:
        return ("entity_f1", "max")

    def check(self, info: DatasetInfo) -> None:
        super().check(info)
        if not entity_names(info.classes):
            raise DataError(f"the tags {', '.join(info.classes[:8])} name no entity", "tags are O, B-NAME and I-NAME")

    def collate(self, rows: Mapping[str, np.ndarray], device: device | str) -> dict[str, Tensor]:
        import torch

        inputs = self._inputs(rows, device)
        tags = rows[TAGS][:, : inputs[TOKENS].shape[1]].astype(np.int64)
        return {**inputs, TAGS: torch.from_numpy(tags).to(device)}

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Mean cross-entropy of each row's words, (B,)."""
        losses_BT = _losses(_scores(model, batch), batch)
        return losses_BT.sum(dim=1) / (batch[TAGS] != IGNORED).sum(dim=1).clamp(min=1)

    def statistics(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of each row, int64: for each entity type `hit.NAME`, `found.NAME`, `true.NAME`; `words` and `right_words`.

        And fp32 `nll`, the sum of the words' losses. An entity is a hit when its words and its type are right.
        """
        import torch

        net = plain_module(model)
        scores_BTC = _scores(model, batch)
        predicted_BT, tags_BT = scores_BTC.argmax(dim=2), batch[TAGS]
        is_word = tags_BT != IGNORED
        classes = [net.config.id2label[number] for number in range(len(net.config.id2label))]
        counts = entity_counts(tags_BT.cpu().numpy(), predicted_BT.cpu().numpy(), classes)
        return {
            "nll": _losses(scores_BTC, batch).sum(dim=1),
            "words": is_word.sum(dim=1),
            "right_words": ((predicted_BT == tags_BT) & is_word).sum(dim=1),
            **{name: torch.from_numpy(values).to(tags_BT.device) for name, values in counts.items()},
        }

    def metrics(self, stats: Mapping[str, np.ndarray]) -> dict[str, float]:
        """`entity_f1`, `entity_precision`, `entity_recall` over all types (as conlleval counts), and more.

        `macro_entity_f1`: the mean over the types that occur. `word_accuracy`: share of words with the right tag.
        `loss`: nats per word.
        """
        totals = {name: int(values.sum()) for name, values in stats.items() if "." in name}
        names = sorted({name.partition(".")[2] for name in totals})
        every = [_score(*(totals[f"{part}.{name}"] for part in (_HIT, _FOUND, _TRUE))) for name in names]
        seen = [score.f1 for name, score in zip(names, every, strict=True) if score.support or totals[f"found.{name}"]]
        whole = _score(*(sum(totals[f"{part}.{name}"] for name in names) for part in (_HIT, _FOUND, _TRUE)))
        words = max(1, int(stats["words"].sum()))
        return {
            "entity_f1": whole.f1,
            "entity_precision": whole.precision,
            "entity_recall": whole.recall,
            "macro_entity_f1": float(np.mean(seen)) if seen else 0.0,
            "word_accuracy": int(stats["right_words"].sum()) / words,
            "loss": float(stats["nll"].sum(dtype=np.float64)) / words,
        }

    def class_table(self, stats: Mapping[str, np.ndarray], info: DatasetInfo) -> list[tuple[str, Score]]:
        """The score of each entity type, counted in whole entities."""
        return [
            (name, _score(*(int(stats[f"{part}.{name}"].sum()) for part in (_HIT, _FOUND, _TRUE))))
            for name in entity_names(info.classes)
        ]

    def predict(self, model: nn.Module, inputs: Sequence[Any], **options: Any) -> list[Any]:
        """The entities of each input, a text or a list of words.

        Each entity is `{"type", "text", "start", "stop"}`: places of characters in a text, of words in a list. Words
        beyond the T tokens that the model reads are not looked at.
        Option `tokenizer`: a `tokenizer.json`; by default the one the model was loaded with.

        Raises:
            InputError: an input is neither.
        """
        tokenizer: Path | None = options.pop("tokenizer", None)
        refuse_options(self.kind, options)
        given = [plain(value) for value in inputs]
        if not given:
            return []
        spans = [_words(value) for value in given]
        words = [[word for word, _, _ in found] for found in spans]
        encodings = encode(model, words, pretokenized=True, tokenizer=tokenizer)
        net: Any = model
        with answering(model) as where:
            best = _scores(model, self._inputs(rows_of(encodings), where)).argmax(dim=2).cpu().tolist()
        names = net.config.id2label
        answers = []
        for value, places, one, tags in zip(given, spans, encodings, best, strict=True):
            firsts = _first_tokens(one.word_ids)
            found = entities([names[tags[token]] for token in firsts])
            answers.append([_described(value, places, entity) for entity in found])
        return answers

    def parse_input(self, text: str) -> Any:
        return text


def entity_names(classes: Sequence[str]) -> tuple[str, ...]:
    """The entity types among tags, sorted."""
    return tuple(sorted({tag[2:] for tag in classes if tag[:2] in ("B-", "I-")}))


def entities(tags: Sequence[str]) -> list[Entity]:
    """The entities that tags spell out, as conlleval reads them: `I-X` after anything but X begins one, too."""
    found: list[Entity] = []
    name, start = "", 0
    for place, tag in enumerate([*tags, "O"]):
        mark, _, kind = tag.partition("-")
        if name and (mark != "I" or kind != name):
            found.append(Entity(name, start, place))
            name = ""
        if mark in ("B", "I") and not name:
            name, start = kind, place
    return found


def entity_counts(tags: np.ndarray, predicted: np.ndarray, classes: Sequence[str]) -> dict[str, np.ndarray]:
    """Entities of each type that are right, found and true, int64 (B,), from tag numbers (B, T)."""
    names = entity_names(classes)
    counts = {f"{part}.{name}": np.zeros(len(tags), np.int64) for part in (_HIT, _FOUND, _TRUE) for name in names}
    for row, (wanted, given) in enumerate(zip(tags, predicted, strict=True)):
        words = np.flatnonzero(wanted != IGNORED)
        true, found = (set(entities([classes[tag] for tag in numbers[words]])) for numbers in (wanted, given))
        for part, several in ((_HIT, true & found), (_FOUND, found), (_TRUE, true)):
            for entity in several:
                counts[f"{part}.{entity.name}"][row] += 1
    return counts


def _score(hit: int, found: int, true: int) -> ClassScore:
    return ClassScore(hit / max(found, 1), hit / max(true, 1), 2 * hit / max(found + true, 1), true)


def _words(value: Any) -> list[tuple[str, int, int]]:
    """The words of an input with their places."""
    if isinstance(value, str) and value.strip():
        return [(match[0], match.start(), match.end()) for match in _WORD.finditer(value)]
    if isinstance(value, list) and value and all(isinstance(word, str) and word for word in value):
        return [(word, place, place + 1) for place, word in enumerate(value)]
    raise InputError(f"an input is no text: {str(value)[:80]!r}", "give a string, or a list of words")


def _first_tokens(word_ids: Sequence[int | None]) -> list[int]:
    """The first token of each word, in order; words that were cut off are left out."""
    before: int | None = None
    firsts = []
    for token, word in enumerate(word_ids):
        if word is not None and word != before:
            firsts.append(token)
        before = word
    return firsts


def _described(value: Any, places: Sequence[tuple[str, int, int]], entity: Entity) -> dict[str, Any]:
    start, stop = places[entity.start][1], places[entity.stop - 1][2]
    text = value[start:stop] if isinstance(value, str) else " ".join(value[start:stop])
    return {"type": entity.name, "text": text, "start": start, "stop": stop}


def _losses(scores: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    from torch.nn import functional

    losses = functional.cross_entropy(
        scores.flatten(0, 1), batch[TAGS].flatten(), ignore_index=IGNORED, reduction="none"
    )
    return losses.view_as(batch[TAGS])  # (B, T), 0 where ignored


def _scores(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    scores: Tensor = model(input_ids=batch[TOKENS], attention_mask=attention_mask(batch)).logits
    return scores.float()  # (B, T, C)
