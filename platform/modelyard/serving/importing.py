"""Foreign models into the registry: a Hugging Face folder or a GGUF file becomes a `causal_lm` model artifact."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from modelyard.artifacts import Registry, VersionInfo
from modelyard.data.dataset import Column, DatasetInfo
from modelyard.errors import InputError
from modelyard.serving.export import read_gguf
from modelyard.tasks import CausalLM, load_model
from modelyard.tasks.generation import has_tokenizer, load_tokenizer
from modelyard.tasks.language_models import PretrainedModel, read_config
from modelyard.tasks.saving import require_safe_weights, write_task

_SUFFIXES = frozenset({".safetensors", ".json", ".txt", ".model", ".jinja"})
_DEFAULT_CONTEXT = 2048


def import_model(path: Path, name: str, registry: Registry) -> VersionInfo:
    """Register the model at `path`; it can then be served, asked, evaluated and fine-tuned like a trained one.

    Args:
        path: a folder that `save_pretrained` wrote, or a GGUF file. Code and pickles in a folder are left behind.
        name: the name to register it under.

    Raises:
        InputError: it is no causal language model that transformers knows, or has no tokenizer.
        IntegrityError: its weights are damaged, or are not those of its config.
        UnsafeFileError: its only weights are pickles.
        StorageError: the store or the registry cannot be used.
    """
    with tempfile.TemporaryDirectory(prefix="modelyard-import-") as temporary:
        folder = Path(temporary)
        if path.is_file():
            read_gguf(path, folder)
        else:
            require_safe_weights(path)
            for file in sorted(path.iterdir()):
                if file.is_file() and file.suffix in _SUFFIXES and file.name != "task.json":
                    shutil.copyfile(file, folder / file.name)
        if not has_tokenizer(folder):
            raise InputError(f"{str(path)!r} holds no tokenizer", "add its tokenizer.json and tokenizer_config.json")
        write_task(folder, CausalLM(model=PretrainedModel(pretrained=path.name)), _describe(folder))
        load_model(folder)  # refuses what could not be loaded later
        manifest = registry.store.put(folder, kind="model", name=name, config={"imported_from": path.name})
        return registry.register(manifest)


def _describe(folder: Path) -> DatasetInfo:
    """What is to be known of a dataset that nobody has: rows as long as the model can read."""
    config = read_config(folder)
    text = config.get("text_config", config)
    tokenizer = load_tokenizer(folder)
    context = int(text.get("max_position_embeddings") or text.get("n_positions") or _DEFAULT_CONTEXT)
    size = max(tokenizer.get_vocab().values()) + 1
    return DatasetInfo(
        format="tokens",
        columns=(Column(name="input_ids", dtype="uint16" if size <= 1 << 16 else "uint32", shape=(context,)),),
        splits={},
        vocab_size=size,
        block_tokens=context,
        end_of_text_id=tokenizer.eos_token_id,
        tokenizer="tokenizer",
    )
