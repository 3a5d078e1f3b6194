"""Which engine a model gets, as a table."""

from __future__ import annotations

import pytest

from modelyard.errors import ConfigError, MissingExtraError
from modelyard.serving.engines.choice import Candidate, Machine, choose

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
}
PLAIN = Candidate("causal_lm", LLAMA)
BARE = Machine(frozenset())
CPU = Machine(frozenset({"openvino_genai", "gguf"}))
GPU = Machine(frozenset({"openvino_genai", "gguf", "vllm"}), gpus=2)


def test_the_fastest_installed_engine_that_fits_is_taken_and_says_why() -> None:
    assert choose(PLAIN, GPU).engine == "vllm"
    assert "2 GPUs" in choose(PLAIN, GPU).reason
    assert choose(PLAIN, CPU).engine == "openvino"
    assert "not vllm: there is no GPU" in choose(PLAIN, CPU).reason
    assert choose(PLAIN, BARE).engine == "transformers"
    assert "not openvino: openvino-genai is not installed" in choose(PLAIN, BARE).reason
    assert choose(Candidate("image_classification", {}), GPU).engine == "batch"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "yarn"),
        ({"attention_bias": True}, "biases"),
        ({"sliding_window": 512}, "512"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"intermediate_size": 100}, "100"),
    ],
)
def test_a_model_that_cannot_become_gguf_goes_to_transformers(changes: dict[str, object], reason: str) -> None:
    model = Candidate("causal_lm", {**LLAMA, **changes})
    assert choose(model, CPU).engine == "transformers"
    assert f"not openvino: {reason}" in choose(model, CPU).reason or reason in choose(model, CPU).reason
    with pytest.raises(ConfigError, match=reason):
        choose(model, CPU, "openvino")


def test_an_unmerged_adapter_keeps_vllm_away_but_not_the_engines_that_merge_it() -> None:
    model = Candidate("causal_lm", LLAMA, has_adapter=True)
    assert choose(model, GPU).engine == "openvino"
    with pytest.raises(ConfigError, match="adapter"):
        choose(model, GPU, "vllm")


def test_another_tokenizer_keeps_openvino_away() -> None:
    assert choose(Candidate("causal_lm", LLAMA, byte_level=False), CPU).engine == "transformers"


def test_an_engine_that_is_asked_for_is_taken_or_refused_clearly() -> None:
    assert choose(PLAIN, GPU, "transformers").reason == "the config asks for it"
    assert choose(PLAIN, Machine(frozenset({"vllm"})), "vllm").engine == "vllm"  # vLLM has a build for CPUs
    with pytest.raises(ConfigError, match="there is no engine 'vlm'"):
        choose(PLAIN, GPU, "vlm")
    with pytest.raises(ConfigError, match="batch does not run the task causal_lm"):
        choose(PLAIN, GPU, "batch")
    with pytest.raises(ConfigError, match="vllm does not run the task image_classification"):
        choose(Candidate("image_classification", {}), GPU, "vllm")
    for engine, package in (("vllm", "vllm"), ("openvino", "openvino-genai")):
        with pytest.raises(MissingExtraError) as caught:
            choose(PLAIN, BARE, engine)
        assert package in str(caught.value)
        assert f"modelyard[{engine}]" in str(caught.value)
