"""Everything a preparation can be told. Imports neither ray nor torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from modelyard.config import Config

Paths = Annotated[tuple[str, ...], Field(min_length=1)]


class PyDocs(Config):
    """The documentation inside this Python: the language reference's topics and the library's docstrings."""

    kind: Literal["pydocs"] = "pydocs"
    docstrings: bool = True
    """Also take every docstring of the standard library (read from its source; nothing is imported)."""


class TextFiles(Config):
    """Files of UTF-8 text."""

    kind: Literal["text"] = "text"
    paths: Paths
    """Files, folders (searched with `pattern`, and below) or globs; local or `s3://`."""
    pattern: str = "*.txt"
    """Which file names are read from a folder, e.g. `*.md`; `*` takes all."""
    separator: str | None = Field(default=None, min_length=1)
    """Text between two documents of one file, e.g. a blank line `"\\n\\n"`; None: a file is one document."""


class JsonLines(Config):
    """Files with one JSON object per line (`.gz` too)."""

    kind: Literal["jsonl"] = "jsonl"
    paths: Paths
    """Files, folders (`*.jsonl`, `*.jsonl.gz`) or globs; local or `s3://`."""
    text_column: str = "text"
    """Key that holds the text."""


class Parquet(Config):
    """Parquet files with a column of text."""

    kind: Literal["parquet"] = "parquet"
    paths: Paths
    """Files, folders (`*.parquet`) or globs; local or `s3://`."""
    text_column: str = "text"
    """Column that holds the text."""


class Chats(Config):
    """JSON Lines files of conversations, written out by the chat template of the tokenizer folder."""

    kind: Literal["chats"] = "chats"
    paths: Paths
    """Files, folders (`*.jsonl`, `*.jsonl.gz`) or globs; local or `s3://`."""
    messages_column: str = "messages"
    """Key that holds the messages of one conversation: a list of `{role, content}`."""
    tokenizer: str
    """Local folder of the tokenizer whose template is used: that of the model to fine-tune."""


class SklearnDigits(Config):
    """scikit-learn's 1,797 real handwritten digits, 8 x 8 pixels."""

    kind: Literal["sklearn_digits"] = "sklearn_digits"


class ImageFolder(Config):
    """A folder with one sub-folder of images per class."""

    kind: Literal["image_folder"] = "image_folder"
    path: str
    """The folder; local or `s3://`. Its sub-folders name the classes."""


class ImageParquet(Config):
    """Parquet files with a column of images: encoded bytes (PNG, JPEG), or arrays of pixels."""

    kind: Literal["image_parquet"] = "image_parquet"
    paths: Paths
    """Files, folders (`*.parquet`) or globs; local or `s3://`."""
    image_column: str = "image"
    """Column of bytes, of `{bytes: ...}` structs, or of lists of pixels (rows of a picture may be nested)."""
    label_column: str = "label"
    """Column of class names or numbers."""
    pixel_max: float = Field(default=255.0, gt=0)
    """The value of a white pixel, when the column holds arrays of pixels."""


class Points(Config):
    """A few rows of numbers, written in the config itself."""

    kind: Literal["points"] = "points"
    rows: Annotated[tuple[tuple[float, ...], ...], Field(min_length=1)]
    """The rows; all of one length."""
    targets: int = Field(default=1, ge=1)
    """How many numbers at the end of each row are to be predicted from those before them."""

    @model_validator(mode="after")
    def _rectangular(self) -> Self:
        lengths = {len(row) for row in self.rows}
        if len(lengths) > 1 or min(lengths) <= self.targets:
            raise ValueError(
                f"rows hold {', '.join(map(str, sorted(lengths)))} numbers; all need the same count, "
                f"and more than targets={self.targets}"
            )
        return self


class NumberTable(Config):
    """CSV, TSV, JSON Lines or Parquet files with columns of numbers."""

    kind: Literal["table"] = "table"
    paths: Paths
    """Files, folders or globs; local or `s3://`. The suffix tells the format."""
    features: Annotated[tuple[str, ...], Field(min_length=1)]
    """Columns to predict from."""
    targets: Annotated[tuple[str, ...], Field(min_length=1)]
    """Columns to predict."""


class LabelledText(Config):
    """CSV, TSV, JSON Lines or Parquet files with a column of text and one of class names."""

    kind: Literal["labelled_text"] = "labelled_text"
    paths: Paths
    """Files, folders or globs; local or `s3://`. The suffix tells the format."""
    text_column: str = "text"
    """Column that holds the text."""
    label_column: str = "label"
    """Column of class names or numbers."""


class TaggedText(Config):
    """Files of one word and its tag per line, with an empty line after each sentence (CoNLL)."""

    kind: Literal["tagged_text"] = "tagged_text"
    paths: Paths
    """Files, folders (`*.txt`, `*.conll`, `*.bio`) or globs; local or `s3://`."""
    word_field: int = 0
    """Which field of a line is the word; from the end when negative."""
    tag_field: int = -1
    """Which field of a line is the tag: `O`, `B-NAME` or `I-NAME`."""


class Series(Config):
    """CSV, TSV, JSON Lines or Parquet files with one row per point in time, evenly spaced."""

    kind: Literal["series"] = "series"
    paths: Paths
    """Files, folders or globs; local or `s3://`, one after the other. The suffix tells the format."""
    columns: Annotated[tuple[str, ...], Field(min_length=1)]
    """Columns of numbers: each is one series."""
    time_column: str | None = None
    """Column to sort by; None: the rows are in order."""


class Interactions(Config):
    """CSV, TSV, JSON Lines or Parquet files with one row per thing that a user did with an item."""

    kind: Literal["interactions"] = "interactions"
    paths: Paths
    """Files, folders or globs; local or `s3://`. The suffix tells the format."""
    user_column: str = "user"
    item_column: str = "item"
    time_column: str = "time"
    """Column to sort a user's interactions by; ties stay in the order of the file."""


class BoxedImages(Config):
    """JSON Lines files that name images and the boxes in them: `{"image": "a.png", "boxes": [[x0, y0, x1, y1], ...],
    "labels": ["cat", ...]}`, in pixels, x1 and y1 excluded.
    """

    kind: Literal["boxes"] = "boxes"
    paths: Paths
    """Files, folders (`*.jsonl`) or globs; local or `s3://`. Images are named from the folder of the file."""
    image_column: str = "image"
    boxes_column: str = "boxes"
    labels_column: str = "labels"
    """Class of each box."""
    split_column: str | None = None
    """Key that says which split a row belongs to; None: by a hash of its content."""


class CocoImages(Config):
    """Images with boxes in the format of COCO (Lin et al. 2014); crowds are left out."""

    kind: Literal["coco"] = "coco"
    path: str
    """The JSON file with `images`, `annotations` and `categories`; local or `s3://`."""
    images: str
    """Folder of the images."""


class MaskedImages(Config):
    """A folder of images, and one of masks of the same names (PNG): each pixel of a mask is a class number."""

    kind: Literal["masks"] = "masks"
    images: str
    """Folder of the images; local or `s3://`."""
    masks: str
    """Folder of the masks: grey or palette images without loss."""
    classes: Annotated[tuple[str, ...], Field(min_length=2, max_length=255)]
    """Name of each class number, from 0."""
    ignored: int | None = Field(default=255, ge=0, le=255)
    """Number of the pixels that do not count; None: all count."""
    split_folders: bool = False
    """Whether the first folder below `images` (and `masks`) names the split."""


class Recordings(Config):
    """JSON Lines files that name WAV files and say what is spoken: `{"audio": "a.wav", "text": "four two"}`."""

    kind: Literal["speech"] = "speech"
    paths: Paths
    """Files, folders (`*.jsonl`) or globs; local or `s3://`. WAV files are named from the folder of the file."""
    audio_column: str = "audio"
    text_column: str = "text"
    split_column: str | None = None
    """Key that says which split a row belongs to; None: by a hash of its content."""


TextSource = PyDocs | TextFiles | JsonLines | Parquet | Chats
ImageSource = SklearnDigits | ImageFolder | ImageParquet
SourceConfig = Annotated[
    PyDocs
    | TextFiles
    | JsonLines
    | Parquet
    | Chats
    | SklearnDigits
    | ImageFolder
    | ImageParquet
    | Points
    | NumberTable
    | LabelledText
    | TaggedText
    | Series
    | Interactions
    | BoxedImages
    | CocoImages
    | MaskedImages
    | Recordings,
    Field(discriminator="kind"),
]
_SECTIONS = {
    "sklearn_digits": "images",
    "image_folder": "images",
    "image_parquet": "images",
    "points": "numbers",
    "table": "numbers",
    "labelled_text": "sentences",
    "tagged_text": "sentences",
    "series": "windows",
    "interactions": "histories",
    "boxes": "boxes",
    "coco": "boxes",
    "masks": "masks",
    "speech": "speech",
}
"""Which section of a preparation goes with a source's kind; `text` with all the others."""


class Splits(Config):
    """Shares of the documents, decided by a hash of the content: a document never changes its split."""

    train: float = Field(default=0.9, gt=0, le=1)
    """Share to train on."""
    validation: float = Field(default=0.1, ge=0, lt=1)
    """Share to watch during training; 0 leaves the split out."""
    test: float = Field(default=0.0, ge=0, lt=1)
    """Share to keep for the end; 0 leaves the split out."""

    @model_validator(mode="after")
    def _sum_to_one(self) -> Self:
        total = self.train + self.validation + self.test
        if abs(total - 1.0) > 1e-6:
            raise ValueError(f"train + validation + test must be 1, but is {total:g}")
        return self

    def shares(self) -> dict[str, float]:
        """The splits that are wanted, in order, with their shares."""
        return {name: share for name, share in self if share > 0}


class Cleaning(Config):
    """Which documents are fit to keep, after Unicode NFC, control characters and spaces were put right."""

    min_characters: int = Field(default=64, ge=1)
    """Shorter documents are dropped."""
    max_characters: int = Field(default=10_000_000, ge=1)
    """Longer documents are dropped."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_characters > self.max_characters:
            raise ValueError(f"min_characters={self.min_characters} is above max_characters={self.max_characters}")
        return self


class Deduplication(Config):
    """Near-duplicate removal by MinHash; exact duplicates always go."""

    near: bool = True
    """Remove near duplicates too."""
    similarity: float = Field(default=0.8, ge=0.5, le=1.0)
    """Documents that share this part of their 9-byte pieces (Jaccard, estimated) are near duplicates."""


class TrainTokenizer(Config):
    """A byte-level BPE tokenizer trained on the train split."""

    kind: Literal["train"] = "train"
    vocab_size: int = Field(default=4096, ge=257, le=1 << 20)
    """Ids at most: 256 bytes, end of text, and merges; a small corpus may give fewer."""
    max_training_mib: int = Field(default=512, ge=1)
    """Text to train on, in MiB; of a larger corpus an even sample is taken."""


class TokenizerFolder(Config):
    """A tokenizer that exists: a folder that `transformers.AutoTokenizer` reads."""

    kind: Literal["folder"] = "folder"
    path: str
    """The local folder."""


class TextConfig(Config):
    """How text becomes blocks of tokens."""

    clean: Cleaning = Cleaning()
    deduplicate: Deduplication = Deduplication()
    tokenizer: Annotated[TrainTokenizer | TokenizerFolder, Field(discriminator="kind")] = TrainTokenizer()
    """Train one (`kind: train`), or use one (`kind: folder`)."""
    block_tokens: int = Field(default=256, ge=2, le=1 << 20)
    """Tokens per row: the context length a model is trained on."""


class ImageConfig(Config):
    """How images become rows."""

    height: int | None = Field(default=None, ge=1, le=4096)
    """Pixels; other images are resized. None: as they are, and all must be alike."""
    width: int | None = Field(default=None, ge=1, le=4096)
    """Pixels; set both or none."""
    channels: Literal[1, 3] = 1
    """1 grey, 3 colour (red, green, blue)."""

    @model_validator(mode="after")
    def _both_or_none(self) -> Self:
        if (self.height is None) != (self.width is None):
            raise ValueError("set both height and width, or none")
        return self


class BoxConfig(ImageConfig):
    """How images with boxes become rows. A resized image takes its boxes along."""

    channels: Literal[1, 3] = 3
    max_boxes: int = Field(default=50, ge=1, le=1000)
    """Boxes in one image at most; an image with more is refused."""


class MaskConfig(ImageConfig):
    """How images with masks become rows. A mask is resized without mixing classes."""

    channels: Literal[1, 3] = 3


class SpeechConfig(Config):
    """How recordings become rows."""

    sample_rate: int = Field(default=16000, ge=4000, le=48000)
    """Samples per second; recordings with another rate are resampled."""
    max_seconds: float = Field(default=10.0, gt=0, le=60)
    """Longer recordings are refused."""
    max_characters: int = Field(default=200, ge=1, le=4096)
    """Longer texts are refused."""
    lower_case: bool = True
    """Whether capitals become small letters."""


class NumberConfig(Config):
    """How rows of numbers are kept: as they are."""


class SentenceConfig(Config):
    """How labelled or tagged text becomes rows of tokens; the tokenizer's own begin and end marks are kept."""

    tokenizer: Annotated[TrainTokenizer | TokenizerFolder, Field(discriminator="kind")] = TrainTokenizer()
    """That of the encoder to go on from (`kind: folder`), or one trained on the train split (`kind: train`)."""
    max_tokens: int = Field(default=128, ge=4, le=1 << 16)
    """Tokens per row; longer texts are cut, shorter ones padded."""


class WindowConfig(Config):
    """How series become rows: a past to look at, and the future to foretell. Splits follow time: train comes first."""

    past: int = Field(ge=1)
    """Points of time that the model sees."""
    future: int = Field(ge=1)
    """Points of time that it foretells."""
    season: int = Field(ge=1)
    """Points of time until the pattern repeats; the seasonal-naive forecast, and the scale of MASE, come from it."""
    stride: int = Field(default=1, ge=1)
    """Points of time between two windows of the train split."""
    held_out_stride: int | None = Field(default=None, ge=1)
    """The same in the other splits; None: `future`, so that every point is foretold once."""

    @model_validator(mode="after")
    def _one_season(self) -> Self:
        if self.past < self.season:
            raise ValueError(f"past={self.past} is shorter than season={self.season}, which the naive forecast needs")
        return self


class HistoryConfig(Config):
    """How interactions become rows: what a user did, and what came next.

    The last interaction of each user is the test split, the one before it the validation split, and the rest the
    train split; the shares in `splits` only say which splits are wanted.
    """

    length: int = Field(default=50, ge=2)
    """Interactions that the model sees; older ones are cut off."""
    stride: int = Field(default=25, ge=1)
    """Interactions between the ends of two train rows of one user."""
    min_interactions: int = Field(default=5, ge=4)
    """Users with fewer are dropped."""


class PrepareConfig(Config):
    """One preparation: from a corpus to the dataset `datasets:/<name>`."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")
    """Name of the dataset in the registry."""
    source: SourceConfig
    """Where the documents or images come from, by `kind`."""
    splits: Splits = Splits()
    rows_per_shard: int = Field(default=1 << 16, ge=1)
    """Rows per shard file."""
    text: TextConfig | None = None
    """For a source of text; the defaults when left out."""
    images: ImageConfig | None = None
    """For a source of images; the defaults when left out."""
    numbers: NumberConfig | None = None
    """For `points` and `table`; has no fields."""
    sentences: SentenceConfig | None = None
    """For `labelled_text` and `tagged_text`; the defaults when left out."""
    windows: WindowConfig | None = None
    """For `series`; needed there."""
    histories: HistoryConfig | None = None
    """For `interactions`; the defaults when left out."""
    boxes: BoxConfig | None = None
    """For `boxes` and `coco`; the defaults when left out."""
    masks: MaskConfig | None = None
    """For `masks`; the defaults when left out."""
    speech: SpeechConfig | None = None
    """For `speech`; the defaults when left out."""

    @model_validator(mode="before")
    @classmethod
    def _fitting_section(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        source = data.get("source")
        kind = source.get("kind") if isinstance(source, Mapping) else getattr(source, "kind", None)
        used = _SECTIONS.get(str(kind), "text")
        for unused in {"text", *_SECTIONS.values()} - {used}:
            if kind is not None and data.get(unused) is not None:
                raise ValueError(f"the section {unused!r} has no meaning for source.kind={kind!r}; use {used!r}")
        return {**data, used: data.get(used) or {}}

    @model_validator(mode="after")
    def _template_of_the_tokenizer(self) -> Self:
        if isinstance(self.source, Chats) and self.text is not None:
            given = self.text.tokenizer.path if isinstance(self.text.tokenizer, TokenizerFolder) else None
            if given != self.source.tokenizer:
                raise ValueError(
                    f"text.tokenizer is {given or 'trained'!r}, but the chat template is of {self.source.tokenizer!r}: "
                    "set text.tokenizer to {kind: folder, path: ...} with the same folder"
                )
        return self
