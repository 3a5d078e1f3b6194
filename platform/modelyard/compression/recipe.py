"""What a compression can be told: steps, target, limits. Defaults live here and nowhere else."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from modelyard.config import Config
from modelyard.tasks.distillation import Distillation
from modelyard.training.config import AdamW, Optimizer, Schedule, Workers

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(gt=0, lt=1)]
_GROUP_SIZE = 32
"""Weights that share a scale in GGUF files, and in every group here unless told otherwise."""


class Recovery(Config):
    """Training that follows a step, on the training core: a run with checkpoints, on as many workers as there are."""

    steps: Positive = 100
    """Optimizer steps."""
    global_batch_size: Positive = 8
    micro_batch_size: Positive = 8
    zero_stage: int = Field(default=1, ge=0, le=2)
    """DeepSpeed ZeRO."""
    precision: Literal["fp32", "bf16"] = "fp32"
    optimizer: Optimizer = AdamW(learning_rate=3e-4, weight_decay=0.0)
    schedule: Schedule = Schedule()
    workers: Workers = Workers()
    distillation: Distillation | None = None
    """Learn from a teacher beside the data; by default the model that the recipe was given."""


class Quantize(Config):
    """Round weights (and inputs) of the matrix products to few bits."""

    kind: Literal["quantize"] = "quantize"
    codes: Literal["int8", "int4", "fp8"] = "int8"
    """`int4` is for linear layers, convolutions and embeddings keep 8 bits. `fp8` (e4m3) needs a GPU of compute
    capability 8.9 to gain speed."""
    method: Literal["nearest", "gptq", "hqq"] = "nearest"
    """Round each weight to the nearest code, or let those after it make its error good on calibration rows (`gptq`,
    Frantar et al. 2023; linear layers), or choose scales by all weights rather than the largest (`hqq`, Badri and Shaji
    2023; no data, symmetric)."""
    symmetric: bool = True
    """Whether 0 is the middle of the codes; otherwise a zero point per scale."""
    granularity: Literal["tensor", "channel", "group"] = "channel"
    """What shares a scale: a weight, an output channel, or `group_size` weights of one."""
    group_size: Positive | None = None
    """Weights that share a scale, with `granularity: group` only; 32 by default."""
    activations: Literal["none", "dynamic", "static"] = "none"
    """Round the inputs too: per token as they come, or on scales found on calibration rows."""
    embeddings: bool = True
    """Quantize the embedding table as well (with tied weights it is the output matrix too). vLLM and transformers read
    the folder themselves only when this is false."""
    skip: tuple[str, ...] = ()
    """Layers to leave as they are, by glob, e.g. `["*.down_proj", "lm_head"]`."""
    calibration_rows: Positive = 64
    """Rows of the calibration split for static scales and for gptq."""
    percentile: float = Field(default=100.0, gt=90, le=100)
    """Share of the inputs, in percent, that a static scale must hold; the rest is clipped."""
    training: Recovery | None = None
    """Quantization-aware training before the rounding."""

    @model_validator(mode="before")
    @classmethod
    def _groups_have_a_size(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("granularity") == "group" and given.get("group_size") is None:
            return {**given, "group_size": _GROUP_SIZE}
        return given

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        if self.granularity != "group" and self.group_size is not None:
            raise ValueError(
                f"group_size={self.group_size} is for granularity group (got granularity={self.granularity}): "
                "set granularity to group, or leave group_size out"
            )
        if self.percentile < 100 and self.activations != "static":
            raise ValueError(
                f"percentile={self.percentile:g} is for static scales (got activations={self.activations}): "
                "set activations to static, or leave percentile out"
            )
        if self.codes == "fp8" and (not self.symmetric or self.granularity == "group"):
            raise ValueError("codes fp8 are symmetric, per tensor or channel")
        if self.codes == "int4" and self.activations != "none":
            raise ValueError("codes int4 are for weights only: set activations to none")
        if self.codes == "fp8" and self.method != "nearest":
            raise ValueError(f"method {self.method} is for int8 and int4")
        if self.codes == "fp8" and self.training is not None:
            raise ValueError("quantization-aware training is for int8 and int4")
        if self.method != "nearest" and self.training is not None:
            raise ValueError(
                f"method {self.method} would move weights that training has put on the nearest codes: "
                "leave method or training out"
            )
        if self.method == "hqq" and not self.symmetric:
            raise ValueError(
                "method hqq puts zero points between two codes; stored as whole ones, as they are, it is nothing but "
                "rounding to the nearest: set symmetric to true, or method to gptq"
            )
        return self


class Prune(Config):
    """Set single weights to zero; the tensors keep their shapes."""

    kind: Literal["prune"] = "prune"
    criterion: Literal["l1", "movement", "wanda"] = "l1"
    """`l1`: the smallest weights (the same order as by squares). `wanda`: smallest |weight| x norm of its input (Sun et
    al. 2023). `movement`: those that training moves most towards zero, learned within one `training` in which the share
    of zeros rises on a cubic curve (Sanh et al. 2020)."""
    sparsity: Share = 0.5
    """Share of zeros in each pruned layer."""
    pattern: Literal["unstructured", "2:4"] = "unstructured"
    """`2:4`: two of each four neighbours, which GPUs since Ampere multiply faster."""
    skip: tuple[str, ...] = ()
    """Layers to leave as they are, by glob."""
    calibration_rows: Positive = 64
    rounds: Positive = 1
    """Reach the sparsity in so many rounds on a cubic curve (Zhu and Gupta 2017), each followed by `training`."""
    training: Recovery | None = None
    """Training after each round; zeros stay zero."""

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        if self.pattern == "2:4" and (self.sparsity != 0.5 or self.rounds != 1):
            raise ValueError("pattern 2:4 is a sparsity of 0.5 in one round")
        if self.criterion == "movement":
            if self.training is None:
                raise ValueError("criterion movement looks at what training does: give `training`")
            if self.rounds > 1:
                raise ValueError("criterion movement prunes within one training: leave rounds out")
            if self.training.optimizer.kind == "muon" or self.training.precision != "fp32":
                raise ValueError("criterion movement adds up small steps: use adamw, adam or sgd, and precision fp32")
        if self.rounds > 1 and self.training is None:
            raise ValueError(f"rounds={self.rounds} without `training` is the same as one round")
        return self


class Shrink(Config):
    """Take whole channels, heads or layers out: smaller tensors, on any hardware."""

    kind: Literal["shrink"] = "shrink"
    mlp: float = Field(default=0.0, ge=0, lt=1)
    """Share of the hidden channels of each feed-forward part (or convolution) to remove."""
    heads: float = Field(default=0.0, ge=0, lt=1)
    """Share of the attention heads to remove, in whole key/value groups."""
    layers: int = Field(default=0, ge=0)
    """Decoder layers to remove."""
    criterion: Literal["l1", "l2", "activation"] = "activation"
    """How channels and heads are ranked: norm of their weights, or of what they put out on calibration rows. Layers are
    ranked by how little they turn the residual stream (Men et al. 2024)."""
    calibration_rows: Positive = 64
    rounds: Positive = 1
    """Remove in so many rounds, each followed by `training`."""
    training: Recovery | None = None

    @model_validator(mode="after")
    def _does_something(self) -> Self:
        if not (self.mlp or self.heads or self.layers):
            raise ValueError("nothing to remove: give mlp, heads or layers")
        if self.rounds > 1 and self.training is None:
            raise ValueError(f"rounds={self.rounds} without `training` is the same as one round")
        return self


class Distill(Config):
    """Train the model as it is now on a teacher's answers."""

    kind: Literal["distill"] = "distill"
    training: Recovery = Recovery(distillation=Distillation())

    @model_validator(mode="after")
    def _has_teacher(self) -> Self:
        if self.training.distillation is None:
            raise ValueError("a step distill needs training.distillation")
        return self


class Train(Config):
    """Train the model as it is now on the dataset."""

    kind: Literal["train"] = "train"
    training: Recovery = Recovery()


class Factorize(Config):
    """Replace linear layers by two thinner ones: the best approximation of that rank (singular values)."""

    kind: Literal["factorize"] = "factorize"
    size: Share = 0.5
    """Share of a layer's weights that its two factors have together."""
    layers: tuple[str, ...] = ("*_proj",)
    """Which linear layers, by glob."""
    scaled: bool = True
    """Keep the outputs on calibration rows, not the weights (Wang et al. 2025, SVD-LLM)."""
    calibration_rows: Positive = 64


class MergeLora(Config):
    """Add an adapter's weights to those of its base."""

    kind: Literal["merge_lora"] = "merge_lora"


class Export(Config):
    """Write the model for another runtime, beside its weights, and compare the two on real inputs."""

    kind: Literal["export"] = "export"
    format: Literal["onnx", "openvino", "gguf", "torch_export"]
    """ONNX Runtime, OpenVINO IR, GGUF of llama.cpp, or a `torch.export` program."""
    quantize: Literal["none", "int8_dynamic", "int8_static", "int4", "int4_awq"] = "none"
    """The runtime's own quantization. `onnx`: int8_dynamic, int8_static. `openvino`: int8_static (classifiers of images
    and texts), and for language models int4, or int4_awq by calibration rows (Lin et al. 2024). A GGUF file follows the
    weights: 8 bits, or 4 where they have 4."""
    calibration_rows: Positive = 128
    verify_rows: Positive = 4
    """Rows of the held-out split on which the two are compared."""
    min_agreement: float = Field(default=0.9, ge=0, le=1)
    """Share of those rows' likeliest answers that must be the same."""
    max_difference: float | None = Field(default=None, gt=0)
    """Largest difference of two scores, as a share of the source's largest score."""

    @model_validator(mode="after")
    def _known_combination(self) -> Self:
        allowed = {
            "onnx": ("none", "int8_dynamic", "int8_static"),
            "openvino": ("none", "int8_static", "int4", "int4_awq"),
            "gguf": ("none",),
            "torch_export": ("none",),
        }[self.format]
        if self.quantize not in allowed:
            raise ValueError(f"format {self.format} takes quantize {' or '.join(allowed)} (got {self.quantize})")
        return self


Step = Annotated[
    Quantize | Prune | Shrink | Distill | Train | Factorize | MergeLora | Export, Field(discriminator="kind")
]


class Target(Config):
    """Where the result is to run."""

    engine: Literal["torch", "openvino", "onnx", "llamacpp"] = "torch"
    threads: Positive = 1


class Measuring(Config):
    """How the figures of the report are taken; each model in a process of its own."""

    rows: Positive | None = None
    """Use only the first rows of the split; None uses all."""
    prompt_tokens: Positive = 64
    """Language models: length of the prompts, from the held-out rows."""
    new_tokens: int = Field(default=32, ge=2)
    """Language models: tokens generated after each."""
    repeats: Positive = 3
    """Prompts, or rounds of single images or texts."""
    timeout_s: float = Field(default=1800.0, gt=0)
    """Longest wait for the figures of one model."""


class Limits(Config):
    """What the result must hold; otherwise it is not registered. Shares are of the source's figure."""

    max_perplexity_increase: float | None = Field(default=None, ge=0)
    """E.g. 0.02: at most 2 % above the source's."""
    max_accuracy_drop: float | None = Field(default=None, ge=0, le=1)
    """Of accuracy, or of the F1 score that texts are judged by; in points of 1, e.g. 0.005."""
    min_size_ratio: float | None = Field(default=None, gt=0)
    """How many times smaller it must be."""
    min_speedup: float | None = Field(default=None, gt=0)
    """Tokens (or images, or texts) per CPU-second over the source's."""
    max_p99_ms: float | None = Field(default=None, gt=0)
    """Latency of a token (or an image, or a text)."""
    max_peak_memory_mib: float | None = Field(default=None, gt=0)


class Recipe(Config):
    """One compression: the file behind `modelyard compress MODEL --recipe`."""

    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the result in the registry; by default the source's with `-compressed`."""
    dataset: str
    """`datasets:/name`, prepared with the model's tokenizer: held-out rows, calibration and recovery."""
    split: str = "test"
    """Split that quality is measured on."""
    calibration_split: str = "train"
    """Split that calibration reads."""
    steps: tuple[Step, ...] = Field(min_length=1)
    target: Target = Target()
    limits: Limits = Limits()
    measuring: Measuring = Measuring()
    seed: int = Field(default=0, ge=0)
