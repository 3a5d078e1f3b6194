"""A model folder on one of the runtimes: the same few calls on each, so that they can be compared.

Importing this module, and generating on any engine but torch, imports no torch: the memory that is measured is the
engine's own.
"""

from __future__ import annotations

import inspect
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from modelyard.errors import InputError
from modelyard.extras import optional

EXTRA = "compression"
"""Of `pyproject.toml`: brings every package that is used here."""
EngineName = Literal["torch", "openvino", "onnx", "llamacpp", "torch_export"]
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Generated:
    """A greedy continuation."""

    ids: list[int]
    """Empty from llama.cpp."""
    prefill_s: float
    """Until the first token."""
    token_s: list[float]
    """Of each further token."""


class Engine(ABC):
    """A loaded model. A language model scores and continues tokens, a classifier scores images or texts."""

    weight_bytes: int
    """Size of the files that it read."""

    @abstractmethod
    def scores(self, inputs: npt.NDArray[Any], mask: Ints | None = None) -> Floats:
        """Tokens (B, T) int64 -> (B, T, V), or pixels (B, C, H, W) uint8 -> (B, classes).

        Encoders of texts take a mask (B, T) too, 1 for tokens that count, and give (B, classes) or (B, T, tags).
        """

    def generate(self, prompt: Sequence[int], tokens: int) -> Generated:
        """The greedy continuation of a prompt by exactly `tokens` tokens, one sequence at a time.

        Without a cache of keys and values, each token reads the whole text again.
        """
        ids, seconds = list(prompt), []
        for _ in range(tokens):
            began = time.perf_counter()
            ids.append(int(self.scores(np.array([ids], dtype=np.int64))[0, -1].argmax()))
            seconds.append(time.perf_counter() - began)
        return Generated(ids[len(prompt) :], seconds[0], seconds[1:])


def prepare(name: EngineName, folder: Path, scratch: Path) -> Path | None:
    """Make the file that an engine needs and `folder` lacks, as serving does; None when nothing is to be made.

    Making it takes torch and much memory, so it is not done where memory is measured.
    """
    if name == "llamacpp":
        return gguf_of(folder, scratch)
    if name == "openvino" and not (folder / "openvino").is_dir():
        return gguf_to_ir(gguf_of(folder, scratch), scratch)
    return None


def open_engine(name: EngineName, folder: Path, threads: int, prepared: Path | None = None) -> Engine:
    """Load the model in `folder`; what an engine needs and the folder lacks is `prepared`, or made first.

    Raises:
        InputError: the engine cannot run this model.
        MissingExtraError: it is not installed.
    """
    kinds: dict[str, type[Any]] = {
        "torch": TorchEngine,
        "openvino": OpenVINOEngine,
        "onnx": OnnxEngine,
        "llamacpp": LlamaCppEngine,
        "torch_export": ExportedEngine,
    }
    if name not in ("openvino", "llamacpp"):
        plain: Engine = kinds[name](folder, threads)
        return plain
    with tempfile.TemporaryDirectory(prefix="modelyard-engine-") as temporary:
        engine: Engine = kinds[name](folder, threads, prepared or prepare(name, folder, Path(temporary)))
    return engine


class TorchEngine(Engine):
    """Eager PyTorch in fp32."""

    def __init__(self, folder: Path, threads: int) -> None:
        import torch

        from modelyard.tasks import load_model

        torch.set_num_threads(threads)
        self._task, model = load_model(folder)
        self._model: Any = model.float()
        self.weight_bytes = folder_bytes(folder.glob("*.safetensors"))

    def scores(self, inputs: npt.NDArray[Any], mask: Ints | None = None) -> Floats:
        import torch

        with torch.inference_mode():
            given = torch.from_numpy(np.ascontiguousarray(inputs))
            if mask is not None:
                output = self._model(input_ids=given, attention_mask=torch.from_numpy(mask)).logits
            elif self._task.kind == "causal_lm":
                output = self._model(input_ids=given, use_cache=False).logits
            else:
                output = self._model(given)
            result: Floats = output.float().numpy()
        return result

    def generate(self, prompt: Sequence[int], tokens: int) -> Generated:
        import torch

        # transformers has renamed it
        memory = "cache" if "cache" in inspect.signature(self._model.forward).parameters else "past_key_values"
        ids, seconds, cache = torch.tensor([list(prompt)]), [], None
        out: list[int] = []
        with torch.inference_mode():
            for _ in range(tokens):
                began = time.perf_counter()
                result = self._model(input_ids=ids, use_cache=True, logits_to_keep=1, **{memory: cache})
                cache, ids = result[memory], result.logits[:, -1:].argmax(dim=-1)
                out.append(int(ids))
                seconds.append(time.perf_counter() - began)
        return Generated(out, seconds[0], seconds[1:])


class OpenVINOEngine(Engine):
    """OpenVINO's CPU plugin on an IR: the folder's own, or one made from a GGUF file."""

    def __init__(self, folder: Path, threads: int, prepared: Path | None) -> None:
        openvino = optional("openvino", "openvino-genai", EXTRA)
        core = openvino.Core()
        properties = {"INFERENCE_NUM_THREADS": str(threads), "INFERENCE_PRECISION_HINT": "f32"}
        path = prepared or folder / "openvino" / "openvino_model.xml"
        kept = "bin" if prepared is not None else "*"  # the graph beside prepared weights is nowhere stored
        self.weight_bytes = folder_bytes(path.parent.glob(f"{path.stem}.{kept}"))
        model = core.read_model(path)
        self._names = {name for one in model.inputs for name in one.get_names()}
        self._request = core.compile_model(model, "CPU", properties).create_infer_request()
        self._output = self._request.model_outputs[0]

    def scores(self, inputs: npt.NDArray[Any], mask: Ints | None = None) -> Floats:
        if "beam_idx" not in self._names:
            given = [inputs] if mask is None else [inputs, mask]
            return np.array(self._request.infer(given)[self._output], dtype=np.float32)
        self._request.reset_state()
        return np.array(self._step(inputs, inputs.shape[1]), dtype=np.float32)

    def generate(self, prompt: Sequence[int], tokens: int) -> Generated:
        if "beam_idx" not in self._names:
            return super().generate(prompt, tokens)
        self._request.reset_state()
        ids, length, out, seconds = np.array([list(prompt)], dtype=np.int64), len(prompt), [], []
        for _ in range(tokens):
            began = time.perf_counter()
            ids = self._step(ids, length)[:, -1:].argmax(axis=2).astype(np.int64)
            out.append(int(ids[0, 0]))
            seconds.append(time.perf_counter() - began)
            length += 1
        return Generated(out, seconds[0], seconds[1:])

    def _step(self, ids: npt.NDArray[Any], length: int) -> Floats:
        """Scores of `ids`, the last of a text of `length` tokens whose others are in the cache."""
        rows, new = ids.shape
        positions = np.broadcast_to(np.arange(length - new, length, dtype=np.int64), (rows, new))
        given = {
            "input_ids": ids,
            "attention_mask": np.ones((rows, length), dtype=np.int64),
            "position_ids": np.ascontiguousarray(positions),
            "beam_idx": np.arange(rows, dtype=np.int32),
        }
        result: Floats = self._request.infer({n: v for n, v in given.items() if n in self._names})[self._output]
        return result


class OnnxEngine(Engine):
    """ONNX Runtime's CPU kernels."""

    def __init__(self, folder: Path, threads: int) -> None:
        runtime = optional("onnxruntime", "onnxruntime", EXTRA)
        path = folder / "onnx" / "model.onnx"
        if not path.is_file():
            raise InputError("the model has no ONNX export", "add the step `kind: export, format: onnx`")
        options = runtime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        self._session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._inputs = [each.name for each in self._session.get_inputs()]
        self.weight_bytes = folder_bytes(path.parent.iterdir())

    def scores(self, inputs: npt.NDArray[Any], mask: Ints | None = None) -> Floats:
        given = [inputs] if mask is None else [inputs, mask]
        return np.asarray(self._session.run(None, dict(zip(self._inputs, given, strict=True)))[0], dtype=np.float32)


class ExportedEngine(Engine):
    """A `torch.export` program, run by eager PyTorch."""

    def __init__(self, folder: Path, threads: int) -> None:
        import torch

        from modelyard.compression.program import load_program

        torch.set_num_threads(threads)
        self._model = load_program(folder / "torch_export").module()
        self.weight_bytes = folder_bytes((folder / "torch_export").iterdir())

    def scores(self, inputs: npt.NDArray[Any], mask: Ints | None = None) -> Floats:
        import torch

        with torch.inference_mode():
            given = [torch.from_numpy(np.ascontiguousarray(x)) for x in (inputs, mask) if x is not None]
            result: Floats = self._model(*given).float().numpy()
        return result


class LlamaCppEngine(Engine):
    """llama.cpp on a GGUF file. It gives text and the time of each token, not their ids, and not all scores."""

    def __init__(self, folder: Path, threads: int, prepared: Path | None) -> None:
        llama = optional("xllamacpp", "xllamacpp", EXTRA)
        path = prepared or folder / "gguf" / "model.gguf"
        self.weight_bytes = path.stat().st_size
        params = llama.CommonParams()
        params.model.path = str(path)
        params.n_parallel, params.n_ctx, params.warmup = 1, 2048, True
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.verbosity = -1
        self._server = llama.Server(params)

    def scores(self, inputs: npt.NDArray[Any], mask: Ints | None = None) -> Floats:
        raise InputError("llama.cpp does not give the scores of all tokens", "measure quality on torch or openvino")

    def generate(self, prompt: Sequence[int], tokens: int) -> Generated:
        chunks: list[dict[str, Any]] = []
        request = {
            "prompt": list(prompt),
            "max_tokens": tokens,
            "n_predict": tokens,
            "temperature": 0.0,
            "cache_prompt": False,
            "ignore_eos": True,
            "stream": True,
            "timings_per_token": True,
        }
        self._server.handle_completions(request, chunks.append)
        timings = [chunk["timings"] for chunk in chunks]
        return Generated([], timings[0]["prompt_ms"] / 1000, token_seconds(timings))


def token_seconds(timings: Sequence[Mapping[str, float]]) -> list[float]:
    """Of each token after the first, from llama.cpp's counts and times so far.

    Tokens that are parts of one character come at once: they share their time.
    """
    seconds: list[float] = []
    done, at = 1, 0.0
    for each in timings:
        if (new := int(each["predicted_n"]) - done) > 0:
            seconds += [(each["predicted_ms"] - at) / 1000 / new] * new
            done, at = int(each["predicted_n"]), each["predicted_ms"]
    return seconds


def gguf_of(folder: Path, temporary: Path) -> Path:
    """The folder's own GGUF file, or one made from its weights."""
    path = folder / "gguf" / "model.gguf"
    if path.is_file():
        return path
    from modelyard.serving.export import write_gguf
    from modelyard.tasks import load_model

    path = temporary / "model.gguf"
    write_gguf(load_model(folder)[1].float(), folder, path)
    return path


def gguf_to_ir(gguf: Path, folder: Path) -> Path:
    """OpenVINO's stateful IR of a Llama-style GGUF file, with its codes as they are; returns the `.xml`."""
    import shutil

    genai = optional("openvino_genai", "openvino-genai", EXTRA)
    copy = folder / "ir" / gguf.name
    copy.parent.mkdir(parents=True)
    shutil.copyfile(gguf, copy)
    genai.LLMPipeline(str(copy), "CPU", enable_save_ov_model=True)
    copy.unlink()
    return copy.with_name("openvino_model.xml")


def folder_bytes(paths: Any) -> int:
    """Sum of the sizes of files."""
    return sum(path.stat().st_size for path in paths if path.is_file())
