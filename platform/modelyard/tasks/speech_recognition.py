"""Speech recognition: a recording to the text that is spoken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, Tag, model_validator

from modelyard.config import Config
from modelyard.errors import ConfigError, DataError
from modelyard.tasks.base import Objective, Uploads
from modelyard.tasks.folders import FolderTask
from modelyard.tasks.language_models import PretrainedModel, folder_or, read_config
from modelyard.tasks.own_network import answering, matrix_weights, plain_module, refuse_options

if TYPE_CHECKING:
    from torch import Tensor, device, nn

    from modelyard.data.dataset import DatasetInfo
    from modelyard.tasks.sound import Heard

SAMPLES, LENGTH, TEXT = "samples", "length", "text"
"""Columns of a dataset of speech: (n, N) int16, (n,) samples that count, and (n, L), -1 behind the last character."""
_MEL, _RAW = ("wav2vec2-bert",), ("wav2vec2", "hubert", "wavlm", "unispeech", "unispeech-sat", "data2vec-audio")
_PLAIN = {"apply_spec_augment": False, "mask_time_prob": 0.0, "mask_feature_prob": 0.0, "layerdrop": 0.0}
"""Their own blanking draws from numpy, which no run seeds; a layer that only some workers skip would stop ZeRO-3."""
_STEP_S = 0.02
"""Seconds of sound in one step of the network."""


class ConformerModel(Config):
    """A conformer (Gulati et al. 2020) on log-mel energies, from scratch; by transformers' Wav2Vec2-BERT."""

    architecture: Literal["conformer"] = "conformer"
    layers: int = Field(default=4, gt=0)
    hidden_size: int = Field(default=128, gt=0)
    heads: int = Field(default=4, gt=0)
    kernel: int = Field(default=15, gt=0)
    """Steps of 20 ms that a convolution sees."""
    bands: int = Field(default=40, ge=8, le=128)
    """Mel bands."""
    dropout: float = Field(default=0.1, ge=0.0, lt=1.0)

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden_size % self.heads:
            raise ValueError(f"heads={self.heads} does not divide hidden_size={self.hidden_size}")
        return self


RecogniserSource = Annotated[
    Annotated[ConformerModel, Tag("conformer")] | Annotated[PretrainedModel, Tag("pretrained")],
    folder_or("conformer"),
]


class SpeechRecognition(FolderTask):
    """The characters that are spoken, by connectionist temporal classification (Graves et al. 2006)."""

    kind: Literal["speech_recognition"] = "speech_recognition"
    model: RecogniserSource = ConformerModel()
    """A conformer from scratch (sizes), or a folder to go on from (`pretrained: FOLDER`): wav2vec2-bert, wav2vec2,
    hubert or wavlm."""
    blanked: int = Field(default=2, ge=0, le=16)
    """Stretches of time, and of frequency, that are blanked in each row in training (conformers only)."""

    uploads: ClassVar[Uploads] = "files"
    metric_names: ClassVar[tuple[str, ...]] = ("wer", "cer", "right_texts", "loss")
    auto_class: ClassVar[str] = "AutoModelForCTC"

    @property
    def objective(self) -> Objective:
        return ("wer", "min")

    def check(self, info: DatasetInfo) -> None:
        if info.format != "speech" or info.sample_rate is None:
            raise DataError(
                f"task speech_recognition needs a dataset of speech, this one holds {info.format}",
                "prepare one with source.kind `speech`",
            )
        if isinstance(self.model, PretrainedModel):
            kind = read_config(self.model.folder()).get("model_type")
            if kind not in (*_MEL, *_RAW):
                raise ConfigError(
                    f"task.model.pretrained holds a {kind} model", f"choose one of {', '.join((*_MEL, *_RAW))}"
                )
            if info.sample_rate != 16000:
                raise ConfigError(
                    f"task.model.pretrained: the dataset has {info.sample_rate} samples per second, such models 16000",
                    "prepare the dataset with speech.sample_rate=16000",
                )

    def build(self, info: DatasetInfo, dataset_folder: Path | None) -> nn.Module:
        self.check(info)
        blank = len(info.classes)
        options = {"vocab_size": blank + 1, "pad_token_id": blank, **_PLAIN}
        if isinstance(self.model, PretrainedModel):
            model: Any = self._from_folder(self.model.folder(), ignore_mismatched_sizes=True, **options)
        else:
            model = _conformer(self.model, options)
        self._remember(model, info)
        built: nn.Module = model
        return built

    def _remember(self, model: nn.Module, info: DatasetInfo) -> None:
        remembering: Any = model
        remembering.characters = info.classes
        remembering.sample_rate = info.sample_rate
        remembering.row_samples = next(column.shape[0] for column in info.columns if column.name == SAMPLES)

    def check_saved(self, folder: Path, trained: DatasetInfo, info: DatasetInfo, dataset_folder: Path) -> None:
        super().check_saved(folder, trained, info, dataset_folder)
        if trained.classes != info.classes:
            raise DataError(
                f"the model writes the characters {''.join(trained.classes)!r}, the dataset {''.join(info.classes)!r}",
                "measure it on a dataset with the same characters",
            )
        if trained.sample_rate != info.sample_rate:
            raise DataError(
                f"the dataset has {info.sample_rate} samples per second, the model hears {trained.sample_rate}",
                "prepare the dataset with the same speech.sample_rate",
            )

    def collate(self, rows: Mapping[str, np.ndarray], device: device | str) -> dict[str, Tensor]:
        import torch

        samples = torch.from_numpy(np.ascontiguousarray(rows[SAMPLES])).to(device, non_blocking=True)
        lengths = torch.from_numpy(rows[LENGTH].astype(np.int64)).to(device)
        return {SAMPLES: samples, LENGTH: lengths, TEXT: torch.from_numpy(rows[TEXT].astype(np.int64)).to(device)}

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Negative log probability of each text, in nats per character, (B,)."""
        scores, steps = self._scores(model, batch)
        return _losses(scores, steps, batch[TEXT]) / (batch[TEXT] >= 0).sum(dim=1).clamp_min(1)

    def statistics(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`word_errors`, `words`, `character_errors`, `characters`: int64; `nll`: fp32 nats of the whole text."""
        import torch

        scores, steps = self._scores(model, batch)
        names = plain_module(model).characters
        written = ["".join(names[n] for n in row if n >= 0) for row in batch[TEXT].tolist()]
        counts = [
            (distance(said.split(), true.split()), len(true.split()), distance(said, true), len(true))
            for said, true in zip(_texts(scores, steps, names), written, strict=True)
        ]
        table = torch.tensor(counts, dtype=torch.int64, device=scores.device).reshape(-1, 4)
        columns = ("word_errors", "words", "character_errors", "characters")
        found = {name: table[:, place] for place, name in enumerate(columns)}
        return {**found, "nll": _losses(scores, steps, batch[TEXT])}

    def metrics(self, stats: Mapping[str, np.ndarray]) -> dict[str, float]:
        """`wer`, `cer`: words and characters that are wrong, missing or too many, as a share of the true ones.

        `right_texts`: share of rows without an error. `loss`: nats per character.
        """
        total = {name: float(values.sum(dtype=np.float64)) for name, values in stats.items()}
        return {
            "wer": total["word_errors"] / max(1.0, total["words"]),
            "cer": total["character_errors"] / max(1.0, total["characters"]),
            "right_texts": float((stats["character_errors"] == 0).mean()),
            "loss": total["nll"] / max(1.0, total["characters"]),
        }

    def flops_per_row(self, model: nn.Module) -> float:
        """6 per weight of a matrix and step of 20 ms of the longest recording, and `12 * layers * width * steps`."""
        net: Any = plain_module(model)
        steps = net.row_samples / net.sample_rate / _STEP_S
        config = net.config
        return float(steps * (6 * matrix_weights(model) + 12 * config.num_hidden_layers * config.hidden_size * steps))

    def predict(self, model: nn.Module, inputs: Sequence[Any], **options: Any) -> list[Any]:
        """The text of each recording, as `{"text"}`.

        A recording is a WAV file (bytes, or these in base64) of any sample rate, a list of numbers between -1 and 1 at
        the model's own rate, or `{"samples": [...], "sample_rate": n}`.

        Raises:
            InputError: an input is none of these, or longer than those the model was trained on.
        """
        import torch

        from modelyard.data.audio import to_int16
        from modelyard.tasks.sound import sound

        refuse_options(self.kind, options)
        net: Any = model
        given = [sound(value, net.sample_rate, net.row_samples) for value in inputs]
        if not given:
            return []
        rows = torch.zeros(len(given), net.row_samples, dtype=torch.int16)
        for row, samples in zip(rows, given, strict=True):
            row[: len(samples)] = torch.from_numpy(to_int16(samples))
        lengths = torch.tensor([len(samples) for samples in given])
        with answering(model) as where:
            scores, steps = self._scores(model, {SAMPLES: rows.to(where), LENGTH: lengths.to(where)})
        return [{"text": text} for text in _texts(scores, steps, net.characters)]

    def parse_input(self, text: str) -> Any:
        """The bytes of a WAV file.

        Raises:
            ConfigError: it cannot be read.
        """
        try:
            return Path(text).read_bytes()
        except OSError as error:
            raise ConfigError(f"{text!r} cannot be read: {error}", "name a WAV file") from None

    def _scores(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Log probabilities (B, steps, characters and blank), and how many steps count, (B,)."""
        net = plain_module(model)
        heard = self._heard(model, batch)
        given = {"input_features" if net.config.model_type in _MEL else "input_values": heard.values}
        logits = model(**given, attention_mask=heard.mask).logits
        counts = heard.mask.sum(dim=1)
        if net.config.model_type in _RAW:
            counts = net._get_feat_extract_output_lengths(counts).clamp_max(logits.shape[1])
        return logits.float().log_softmax(dim=-1), counts

    def _heard(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Heard:
        from modelyard.tasks import sound

        net, lengths = plain_module(model), batch[LENGTH]
        dtype = next(net.parameters()).dtype
        if net.config.model_type in _RAW:  # some of them normalise over time, padding too: rows keep their full length
            heard = sound.plain_samples(batch[SAMPLES].float() / 32768, lengths)
            return sound.Heard(heard.values.to(dtype), heard.mask)
        longest = max(1, int(lengths.max()))
        bands = net.config.feature_projection_input_dim // sound.STACKED
        heard = sound.log_mel(batch[SAMPLES][:, :longest].float() / 32768, lengths, net.sample_rate, bands)
        if model.training and self.blanked:
            heard = sound.masked(heard, bands, self.blanked)
        return sound.Heard(heard.values.to(dtype), heard.mask)


def distance(said: Sequence[Any], true: Sequence[Any]) -> int:
    """Fewest insertions, deletions and changes that make one sequence of the other (Levenshtein 1966)."""
    row = np.arange(len(true) + 1)
    for count, one in enumerate(said, 1):
        changed = row[:-1] + np.array([one != other for other in true], dtype=np.int64)
        best = np.concatenate([[count], np.minimum(changed, row[1:] + 1)])
        places = np.arange(len(best))
        row = np.minimum.accumulate(best - places) + places  # an insertion costs 1 from the place before
    return int(row[-1])


def collapsed(steps: Sequence[int], blank: int) -> list[int]:
    """What a path of labels spells: repeated ones count once, blanks part equal neighbours."""
    return [one for one, before in zip(steps, [blank, *steps], strict=False) if one not in (blank, before)]


def _texts(scores: Tensor, steps: Tensor, characters: Sequence[str]) -> list[str]:
    paths = scores.argmax(dim=-1).tolist()
    return [
        "".join(characters[n] for n in collapsed(path[:count], len(characters)))
        for path, count in zip(paths, steps.tolist(), strict=True)
    ]


def _losses(scores: Tensor, steps: Tensor, text: Tensor) -> Tensor:
    from torch.nn import functional

    lengths = (text >= 0).sum(dim=1)
    return functional.ctc_loss(
        scores.transpose(0, 1),
        text.clamp_min(0),
        steps,
        lengths,
        blank=scores.shape[-1] - 1,
        reduction="none",
        zero_infinity=True,
    )


def _conformer(sizes: ConformerModel, options: Mapping[str, Any]) -> nn.Module:
    from transformers import Wav2Vec2BertConfig, Wav2Vec2BertForCTC

    from modelyard.tasks.sound import STACKED

    config = Wav2Vec2BertConfig(
        hidden_size=sizes.hidden_size,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        intermediate_size=4 * sizes.hidden_size,
        feature_projection_input_dim=STACKED * sizes.bands,
        conv_depthwise_kernel_size=sizes.kernel,
        hidden_dropout=sizes.dropout,
        activation_dropout=sizes.dropout,
        attention_dropout=sizes.dropout,
        conformer_conv_dropout=sizes.dropout,
        feat_proj_dropout=0.0,
        position_embeddings_type="rotary",
        final_dropout=sizes.dropout,
        **options,
    )
    built: nn.Module = Wav2Vec2BertForCTC(config)
    return built
