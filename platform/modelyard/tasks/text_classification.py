"""Text classification: one label per text (sentiment, topic, intent)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from modelyard.errors import InputError
from modelyard.tasks.base import Objective
from modelyard.tasks.classification_metrics import accuracy, macro_f1
from modelyard.tasks.encoders import TOKENS, EncoderTask, attention_mask, encode, rows_of
from modelyard.tasks.own_network import answering, plain, refuse_options

if TYPE_CHECKING:
    from torch import Tensor, device, nn

LABEL = "label"


class TextClassification(EncoderTask):
    """An encoder with one score per class on texts of at most T tokens."""

    kind: Literal["text_classification"] = "text_classification"

    format: ClassVar[str] = "labelled_text"
    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"

    metric_names: ClassVar[tuple[str, ...]] = ("accuracy", "macro_f1", "loss")

    @property
    def objective(self) -> Objective:
        return ("macro_f1", "max")

    def collate(self, rows: Mapping[str, np.ndarray], device: device | str) -> dict[str, Tensor]:
        import torch

        labels = torch.from_numpy(rows[LABEL].astype(np.int64)).to(device)
        return {**self._inputs(rows, device), LABEL: labels}

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        from torch.nn import functional

        return functional.cross_entropy(_scores(model, batch), batch[LABEL], reduction="none")

    def statistics(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`loss`: fp32 nats; `label` and `prediction`: int64 class numbers."""
        from torch.nn import functional

        scores = _scores(model, batch)
        losses = functional.cross_entropy(scores, batch[LABEL], reduction="none")
        return {"loss": losses, "label": batch[LABEL], "prediction": scores.argmax(dim=1)}

    def metrics(self, stats: Mapping[str, np.ndarray]) -> dict[str, float]:
        """`accuracy`, `macro_f1` and `loss` (nats per text)."""
        labels, predictions = stats["label"], stats["prediction"]
        return {
            "accuracy": accuracy(labels, predictions),
            "macro_f1": macro_f1(labels, predictions),
            "loss": float(stats["loss"].mean(dtype=np.float64)) if labels.size else 0.0,
        }

    def predict(self, model: nn.Module, inputs: Sequence[Any], **options: Any) -> list[Any]:
        """`{"label", "probability"}` for each text: the likeliest class by name.

        Option `tokenizer`: a `tokenizer.json`; by default the one the model was loaded with.

        Raises:
            InputError: an input is no text.
        """
        tokenizer: Path | None = options.pop("tokenizer", None)
        refuse_options(self.kind, options)
        texts = [plain(value) for value in inputs]
        for text in texts:
            if not isinstance(text, str) or not text.strip():
                raise InputError(f"an input is no text: {str(text)[:80]!r}", "give a string")
        if not texts:
            return []
        rows = rows_of(encode(model, texts, pretokenized=False, tokenizer=tokenizer))
        net: Any = model
        with answering(model) as where:
            best = _scores(model, self._inputs(rows, where)).softmax(dim=1).max(dim=1)
        names = net.config.id2label
        return [{"label": names[int(i)], "probability": float(p)} for p, i in zip(*best, strict=True)]

    def parse_input(self, text: str) -> Any:
        return text


def _scores(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    scores: Tensor = model(input_ids=batch[TOKENS], attention_mask=attention_mask(batch)).logits
    return scores.float()  # (B, C)
