"""`modelyard models import`: foreign models become artifacts that everything else can use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from tests.serving.models import greedy, smollm2_gguf, tiny_llama

from modelyard.artifacts import Registry
from modelyard.cli.models import models
from modelyard.cli.predict import predict_command
from modelyard.errors import InputError, IntegrityError, UnsafeFileError
from modelyard.serving.export import write_gguf
from modelyard.tasks import CausalLM, load_model
from modelyard.tasks.generation import load_tokenizer


@pytest.fixture(autouse=True)
def registry(fresh_database: bytes, tmp_path: Path) -> Registry:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "mlflow.db").write_bytes(fresh_database)
    return Registry.from_settings()


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A Hugging Face folder as others write it: no `task.json`, and code that nobody should run."""
    folder = tiny_llama(tmp_path / "foreign")
    (folder / "task.json").unlink()
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    return folder


def run(path: Path, name: str = "imported") -> Result:
    return CliRunner().invoke(models, ["import", str(path), "--name", name])


def test_a_hugging_face_folder_becomes_a_model_that_can_be_asked(foreign: Path, registry: Registry) -> None:
    result = run(foreign)
    assert result.exit_code == 0, result.exception
    assert result.output.startswith("models:/imported/1 (sha256:")
    _, folder = registry.open("models:/imported")
    assert not (folder / "modeling_evil.py").exists()
    task, model = load_model(folder)
    assert isinstance(task, CausalLM)
    before: Any = load_model_of(foreign)
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), model.parameters(), strict=True))
    assert load_tokenizer(folder).chat_template == load_tokenizer(foreign).chat_template
    asked = CliRunner().invoke(predict_command, ["models:/imported", "The quick", "--max-new-tokens", "4"])
    assert asked.exit_code == 0, asked.exception
    assert asked.output.startswith("The quick")


def load_model_of(folder: Path) -> Any:
    from modelyard.tasks.language_models import load_folder

    return load_folder(folder)


def test_an_imported_model_can_be_fine_tuned(foreign: Path, registry: Registry, tmp_path: Path) -> None:
    from modelyard.data.dataset import DatasetInfo

    run(foreign)
    task = CausalLM.model_validate({"model": {"pretrained": "models:/imported"}})
    info = DatasetInfo(format="tokens", columns=(), splits={}, vocab_size=300, block_tokens=16)
    model: Any = task.build(info, None)
    loss = task.loss(model, {"input_ids": torch.arange(32).reshape(2, 16)}).mean()
    loss.backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_gguf_file_keeps_the_greedy_answers_of_its_dequantized_weights(tmp_path: Path, registry: Registry) -> None:
    """The reference is computed from the file by the `gguf` package alone, not by the code under test."""
    pytest.importorskip("gguf")
    import gguf
    from transformers import AutoModelForCausalLM

    source = tiny_llama(tmp_path / "source")
    write_gguf(load_model(source)[1], source, tmp_path / "tiny.gguf")
    assert run(tmp_path / "tiny.gguf").exit_code == 0
    _, folder = registry.open("models:/imported")
    reader = gguf.GGUFReader(tmp_path / "tiny.gguf")
    stored = {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    reference: Any = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        for layer, block in enumerate(reference.model.layers):
            for name, module in {
                "attn_v": block.self_attn.v_proj,
                "attn_output": block.self_attn.o_proj,
                "ffn_gate": block.mlp.gate_proj,
                "ffn_up": block.mlp.up_proj,
                "ffn_down": block.mlp.down_proj,
            }.items():
                module.weight.copy_(torch.tensor(stored[f"blk.{layer}.{name}.weight"]))
            for name, module, heads in (("attn_q", block.self_attn.q_proj, 4), ("attn_k", block.self_attn.k_proj, 2)):
                rows = torch.tensor(stored[f"blk.{layer}.{name}.weight"])  # neighbours of a head are its two halves
                halves = [rows.view(heads, -1, rows.shape[1])[:, start::2] for start in (0, 1)]
                module.weight.copy_(torch.cat(halves, dim=1).reshape(rows.shape))
        reference.model.embed_tokens.weight.copy_(torch.tensor(stored["token_embd.weight"]))
        reference.lm_head.weight.copy_(torch.tensor(stored["output.weight"]))
    reference.save_pretrained(tmp_path / "reference")
    for name in ("task.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "reference" / name).write_bytes((source / name).read_bytes())
    assert load_tokenizer(folder).chat_template == load_tokenizer(source).chat_template
    for text in ("The quick", "東京 😀"):
        ids = load_tokenizer(folder)(text).input_ids
        assert ids == load_tokenizer(source)(text).input_ids
        answer = greedy(folder, ids, 20)
        assert answer == greedy(tmp_path / "reference", ids, 20)
        assert len(answer) > 3


def test_a_pickle_is_refused_unread(tmp_path: Path, foreign: Path) -> None:
    (foreign / "model.safetensors").rename(foreign / "pytorch_model.bin")
    result = run(foreign)
    assert isinstance(result.exception, UnsafeFileError)
    assert Registry.from_settings().versions("model") == []


@pytest.mark.parametrize(
    ("damage", "kind", "problem"),
    [
        ("tokenizer", InputError, "no tokenizer"),
        ("weights", IntegrityError, "lacks"),
        ("config", InputError, "config.json"),
        ("text", InputError, "no GGUF file"),
    ],
)
def test_what_could_not_be_loaded_later_is_refused_now(
    foreign: Path, damage: str, kind: type[Exception], problem: str
) -> None:
    path = foreign
    if damage == "tokenizer":
        for file in foreign.glob("tokenizer*"):
            file.unlink()
    elif damage == "weights":
        config = json.loads((foreign / "config.json").read_text())
        (foreign / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    elif damage == "config":
        (foreign / "config.json").unlink()
    else:
        path = foreign / "model.gguf"
        path.write_text("nothing")
    result = run(path)
    assert isinstance(result.exception, kind)
    assert problem in str(result.exception)
    assert Registry.from_settings().versions("model") == []


@pytest.mark.slow
def test_smollm2_is_imported_and_answers_in_english(registry: Registry) -> None:
    assert run(smollm2_gguf(), "smollm2").exit_code == 0
    _, folder = registry.open("models:/smollm2")
    ids = load_tokenizer(folder).apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, return_dict=False
    )
    assert "Paris" in load_tokenizer(folder).decode(greedy(folder, ids, 16))
