"""Whatever the parallel layout: the same global batch, the same losses, the same model.

Whole runs of one gang go in the same processes, one after another (`parallel_gang.py`), because starting those takes
longer than training.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.training.gangs import perform

from modelyard.artifacts.store import Store
from modelyard.cluster import Node
from modelyard.config import parse
from modelyard.data.dataset import Dataset
from modelyard.errors import ConfigError
from modelyard.tasks.slices import TOKENS, cut
from modelyard.training import TrainConfig
from modelyard.training.checkpoints import CheckpointManifest, TrainState
from modelyard.training.config import Workers
from modelyard.training.elastic import room
from modelyard.training.gang import Gang
from modelyard.training.parallel import Parallel, check_model, from_groups, needs_conversion
from modelyard.training.pipeline import in_stages
from modelyard.training.sequence import require_causal_attention
from modelyard.training.tensor import require_plan

STEPS, HALF = 6, 3
FP32 = 2e-5
"""Nats: sums in another order."""


# --- which layouts are refused, and how ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"workers": 3, "training": {"parallel": {"tensor": 2}}}, r"workers\.min=3 is no multiple of .*multiple of 2"),
        ({"workers": {"min": 1, "max": 4}, "training": {"parallel": {"tensor": 2}}}, r"workers\.min=1 is no multiple"),
        ({"training": {"parallel": {"tensor": 2, "sequence": 2}}}, "tensor=2, sequence=2 cannot be combined"),
        ({"training": {"parallel": {"pipeline": 2}, "zero_stage": 2}}, r"goes with training\.zero_stage=1 \(got 2\)"),
        (
            {"training": {"parallel": {"pipeline": 2}, "precision": "bf16"}},
            r"does not go with training\.precision=bf16",
        ),
        (
            {"workers": {"min": 2, "max": 4}, "training": {"parallel": {"pipeline": 2}}},
            "needs a fixed number of workers",
        ),
        ({"training": {"parallel": {"tensor": 2}, "compile": True}}, r"training\.compile=true: set it to false"),
        (
            {"training": {"parallel": {"tensor": 2}, "strategy": "gossip"}},
            r"tensor=2 does not go with training\.strategy=gossip.*use all_reduce",
        ),
        (
            {"training": {"parallel": {"sequence": 2}, "noise_every_steps": 5}},
            r"noise_every_steps=5.*set it to 0",
        ),
        (
            {"training": {"parallel": {"tensor": 2}, "gradient_clipping": 0}, "optimizer": {"kind": "muon"}},
            "optimizer muon, which has to see whole matrices",
        ),
        (
            {"workers": {"min": 2, "max": 4}, "training": {"parallel": {"tensor": 2}, "zero_stage": 3}},
            r"zero_stage=3 needs a fixed number of workers \(got min=2, max=4\)",
        ),
        (
            {"workers": {"min": 2, "max": 4}, "training": {"parallel": {"tensor": 2}}, "lease": {}},
            "under a lease needs a fixed number of workers",
        ),
        ({"training": {"parallel": {"tensor": 2}, "deepspeed": {"tensor_parallel": {"autotp_size": 4}}}}, ""),
    ],
)
def test_what_does_not_go_together_is_refused_with_what_to_do(
    token_config: Callable[..., TrainConfig], changes: dict[str, Any], said: str
) -> None:
    from modelyard.training.deepspeed_config import check_passthrough

    if said:
        with pytest.raises(ConfigError, match=said):
            token_config(**changes)
    else:
        with pytest.raises(ConfigError, match=r"training\.parallel\.tensor"):
            check_passthrough(token_config(**changes).training.deepspeed)


def test_adapters_go_with_slices_but_not_with_cut_weights(token_config: Callable[..., TrainConfig]) -> None:
    lora = {"kind": "causal_lm", "model": {"layers": 1, "hidden_size": 8, "heads": 2}, "lora": {"rank": 2}}
    token_config(task=lora, training={"parallel": {"sequence": 2}})
    with pytest.raises(ConfigError, match=r"tensor=2 does not go with task\.lora.*sequence with adapters"):
        token_config(task=lora, training={"parallel": {"tensor": 2}})
    with pytest.raises(ConfigError, match=r"pipeline=2 does not go with task\.lora"):
        token_config(task=lora, training={"parallel": {"pipeline": 2}})


def test_layouts_are_for_language_models(token_config: Callable[..., TrainConfig]) -> None:
    plain = token_config().model_dump(mode="json") | {"task": {"kind": "image_classification"}}
    plain["training"] |= {"parallel": {"tensor": 2}}
    with pytest.raises(ConfigError, match="tensor=2 is for the task causal_lm"):
        parse(TrainConfig, plain)


def test_gradient_noise_is_measured_where_a_micro_batchs_gradient_is_known(
    token_config: Callable[..., TrainConfig],
) -> None:
    for kind in ("sequence", "pipeline"):
        assert token_config(training={"parallel": {kind: 2}}).training.noise_every_steps == 0
    assert token_config(training={"parallel": {"tensor": 2}}).training.noise_every_steps == 10


@pytest.mark.parametrize(
    ("model", "layout", "said"),
    [
        ({"heads": 2, "hidden_size": 32}, {"tensor": 4}, r"tensor=4: it does not divide the 2 attention heads.*of 2$"),
        ({"heads": 4, "kv_heads": 2, "hidden_size": 32}, {"tensor": 4}, "the 2 key/value heads"),
        ({"heads": 3, "hidden_size": 36}, {"sequence": 3}, "the 16 tokens in each row.*leave it out"),
        ({"heads": 2, "hidden_size": 32, "intermediate_size": 63}, {"tensor": 2}, "the 63 feed-forward features"),
        (
            {"heads": 2, "hidden_size": 32, "vocab_size": 65, "tied_embeddings": False},
            {"tensor": 2},
            "the 65 tokens in the vocabulary",
        ),
        ({"heads": 2, "hidden_size": 32}, {"pipeline": 2}, "the model has 1 layers"),
        ({"heads": 4, "kv_heads": 2, "hidden_size": 32, "vocab_size": 65}, {"tensor": 2}, ""),
    ],
)
def test_a_model_that_cannot_be_cut_evenly_is_refused_before_any_worker_starts(
    token_config: Callable[..., TrainConfig],
    token_folder: Path,
    model: dict[str, Any],
    layout: dict[str, int],
    said: str,
) -> None:
    size = max(layout.values())
    config = token_config(
        workers=size, task={"model": {"layers": 1, "max_positions": 16, **model}}, training={"parallel": layout}
    )
    info = Dataset.open(token_folder).info
    if not said:
        check_model(config, info)
        return
    with pytest.raises(ConfigError, match=f"(?s){said}"):
        check_model(config, info)


def written(layout: dict[str, int], workers: int) -> TrainState:
    return TrainState(step=1, seed=0, epoch=0, position=8, num_workers=workers, zero_stage=1, parallel=layout)


@pytest.mark.parametrize(
    ("then", "now", "stage", "outcome"),
    [
        (({"tensor": 2}, 2), ({"tensor": 2}, 2), 3, False),
        (({"tensor": 2}, 2), ({}, 2), 1, True),
        (({"tensor": 2}, 2), ({}, 2), 3, True),
        (({}, 2), ({"tensor": 2}, 2), 2, True),
        (({"tensor": 2}, 2), ({"tensor": 2}, 4), 1, True),
        (({"tensor": 2}, 2), ({"tensor": 2}, 4), 0, False),
        (({"sequence": 2}, 2), ({}, 2), 1, False),
        (({"sequence": 2}, 2), ({"tensor": 2}, 2), 1, True),
        (({"pipeline": 2}, 2), ({"pipeline": 2}, 2), 1, False),
        (({"pipeline": 2}, 2), ({}, 2), 1, "what a pipeline writes is not converted"),
        (({"pipeline": 2}, 2), ({"pipeline": 2}, 4), 1, "what a pipeline writes is not converted"),
        (({}, 2), ({"tensor": 2}, 2), 3, "cannot cut converted weights"),
        (({"tensor": 2}, 2), ({}, 1), 0, "nothing to convert it from"),
    ],
)
def test_a_checkpoint_is_converted_for_another_layout_or_refused(
    token_config: Callable[..., TrainConfig], then: Any, now: Any, stage: int, outcome: Any
) -> None:
    config = token_config(workers=now[1], training={"parallel": now[0], "zero_stage": stage})
    if isinstance(outcome, bool):
        assert needs_conversion(config, written(*then), num_workers=now[1]) is outcome
        return
    with pytest.raises(ConfigError, match=outcome) as error:
        needs_conversion(config, written(*then), num_workers=now[1])
    assert f"set workers to {then[1]}" in str(error.value)


def tiny(family: str, **changes: Any) -> Any:
    """A model of another family than Llama, for rows of 8 tokens."""
    import transformers

    sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "head_dim": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "attn_implementation": "sdpa"}
    config = getattr(transformers, f"{family}Config")(**sizes, **heads, **changes)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    model.row_tokens = 8
    return model


@pytest.mark.slow  # imports four families of models
def test_models_that_would_come_out_otherwise_are_refused() -> None:
    import transformers

    with pytest.raises(ConfigError, match="MistralForCausalLM sees a window of 4 tokens, rows have 8"):
        require_causal_attention(tiny("Mistral", sliding_window=4), "training.parallel.sequence=2")
    require_causal_attention(tiny("Mistral", sliding_window=8), "training.parallel.sequence=2")
    with pytest.raises(ConfigError, match="GraniteForCausalLM is more than its layers"):
        in_stages(tiny("Granite", logits_scaling=4.0), 2)
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=2))
    with pytest.raises(ConfigError, match=r"no tensor-parallel plan for GPT2LMHeadModel[\s\S]*zero_stage=3"):
        require_plan(gpt2, 2)
    require_plan(tiny("Qwen3"), 2)


def test_checkpoints_from_before_there_were_layouts_are_believed() -> None:
    plain = {**written({}, 2).model_dump(mode="json")}
    assert "parallel" not in plain, "else the seal of older manifests would not fit"
    manifest = CheckpointManifest(state=parse(TrainState, plain), files={}).sealed()
    assert manifest.state.parallel == Parallel()


# --- who has which rows -------------------------------------------------------------------------------------------


def test_workers_of_a_group_share_rows_and_count_once() -> None:
    layout = Parallel(tensor=2)
    gangs = [Gang(rank, 4, torch.device("cpu"), parallel=layout) for rank in range(4)]
    assert [(g.data_rank, g.data_size, g.part) for g in gangs] == [(0, 2, 0), (0, 2, 1), (1, 2, 0), (1, 2, 1)]
    assert sum(g.share for g in gangs) == 2, "a figure of each group counts once"
    assert [g.dropout_rank for g in gangs] == [0, 0, 1, 1]
    assert from_groups([["a"], ["a"], ["b"], ["b"]], layout) == ["a", "b"]
    assert from_groups([[], ["a"], [], ["b"]], Parallel(pipeline=2)) == ["a", "b"], "the last one has the loss"
    slices = Parallel(sequence=2)
    assert from_groups([[1], [2], [3], [4]], slices, lambda one, other: one + other) == [3, 7]
    assert [Gang(r, 4, torch.device("cpu"), parallel=slices).dropout_rank for r in range(4)] == [0, 1, 2, 3]


def test_only_whole_groups_are_started() -> None:
    node = Node("n", {"CPU": 7.0}, {"CPU": 7.0}, {})
    assert room([node], Workers(min=2, max=8), {}, group=4) == 4
    assert room([node], Workers(min=2, max=8), {"n": 1}, group=4) == 8


def test_losses_of_slices_add_up_to_those_of_rows(token_config: Callable[..., TrainConfig], token_folder: Path) -> None:
    task, split = token_config().task, Dataset.open(token_folder).split("train")
    batch = task.collate(split.read(np.arange(5)), "cpu")

    def model(input_ids: torch.Tensor, position_ids: torch.Tensor | None = None, **options: Any) -> Any:
        places = torch.arange(input_ids.shape[1]) if position_ids is None else position_ids
        table = torch.sin(torch.arange(64 * 64).reshape(64, 64).float())
        return type("Output", (), {"logits": table[input_ids] + 0.1 * places[..., None]})

    whole, stats = task.loss(model, batch), task.statistics(model, batch)
    parts = [cut(batch, part, 4) for part in range(4)]
    assert torch.equal(torch.cat([part[TOKENS] for part in parts], dim=1), batch[TOKENS])
    torch.testing.assert_close(sum(task.loss(model, part) for part in parts), whole)
    for name, value in stats.items():
        torch.testing.assert_close(sum(task.statistics(model, part)[name] for part in parts), value)


# --- real gangs ---------------------------------------------------------------------------------------------------


def gang(workers: int, runs: list[dict[str, Any]], folder: Path, out: Path) -> dict[str, Any]:
    """Perform `runs` on a gang of `workers`; results by name."""
    store = Store(str(out / "store"), out / "cache")
    digest = store.put(folder, kind="dataset", name="tokens").digest()
    return perform(
        "parallel_gang", {"workers": workers, "store": store.uri, "dataset": digest, "runs": runs}, out, 400.0
    )


def run(name: str, workers: int, stage: int, *, of: str = "", stop: int | None = None, **training: Any) -> Any:
    model = {"architecture": "llama", "layers": 2, "hidden_size": 32, "heads": 4, "kv_heads": 2, "max_positions": 16}
    config = {
        "name": "counter",
        "dataset": "tokens",
        "task": {"kind": "causal_lm", "model": model},
        "workers": workers,
        "training": {
            "max_steps": STEPS,
            "global_batch_size": 7,
            "micro_batch_size": 3,
            "zero_stage": stage,
            "record_samples": True,
            "noise_every_steps": 0 if {"sequence", "pipeline"} & set(training.get("parallel", ())) else 2,
            **training,
        },
        "optimizer": {"kind": "adamw", "learning_rate": 0.01},
        "schedule": {"warmup_steps": 2},
        "checkpoint": {"every_s": None},
    }
    return {"name": name, "run": of or name, "config": config, "stop_after": stop}


TENSOR, SEQUENCE, PIPELINE = {"tensor": 2}, {"sequence": 2}, {"pipeline": 2}
LAYOUTS = [*(f"{kind}-{stage}" for kind in ("tensor", "sequence") for stage in (0, 1, 3)), "pipeline-1"]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parallel")


@pytest.fixture(scope="module")
def on_two(token_folder: Path, out: Path) -> dict[str, Any]:
    """Every layout on two workers; some of the runs are interrupted in the middle."""
    runs = [run(f"tensor-{stage}", 2, stage, parallel=TENSOR) for stage in (0, 3)]
    runs += [run("tensor-1-begun", 2, 1, of="tensor-1", stop=HALF, parallel=TENSOR, activation_checkpointing=True)]
    runs += [run("tensor-1", 2, 1, parallel=TENSOR, activation_checkpointing=True)]
    runs += [run(f"sequence-{stage}", 2, stage, parallel=SEQUENCE) for stage in (0, 3)]
    runs += [run("sequence-1-begun", 2, 1, of="sequence-1", stop=HALF, parallel=SEQUENCE)]
    runs += [run("sequence-1", 2, 1, parallel=SEQUENCE)]
    runs += [
        run("pipeline-1-begun", 2, 1, of="pipeline-1", stop=HALF, parallel=PIPELINE, activation_checkpointing=True)
    ]
    runs += [run("pipeline-1", 2, 1, parallel=PIPELINE)]
    runs += [run("wandering-begun", 2, 1, of="wandering", stop=2, parallel=SEQUENCE)]
    runs += [run("wandering-on", 2, 1, of="wandering", stop=4, parallel=TENSOR)]
    return gang(2, runs, token_folder, out)


@pytest.fixture(scope="module")
def alone(token_folder: Path, out: Path, on_two: dict[str, Any]) -> dict[str, Any]:
    """What one worker makes, and how it ends a run that wandered over other layouts."""
    return gang(1, [run("plain", 1, 1), run("wandering", 1, 1)], token_folder, out)


def good(found: dict[str, Any]) -> dict[str, Any]:
    assert "error" not in found, found["error"]
    return found


def series(found: dict[str, Any], field: str) -> list[Any]:
    return [record[field] for record in good(found)["history"] if record.get(field) is not None]


def weights(out: Path, found: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The published model's tensors and its config.json."""
    folder = Store(str(out / "store"), out / "cache").open("model", good(found)["model_digest"])
    return load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_changes_no_loss_and_reads_no_row_twice(
    on_two: dict[str, Any], alone: dict[str, Any], name: str
) -> None:
    found, plain = on_two[name], alone["plain"]
    assert series(plain, "loss")[-1] < series(plain, "loss")[0] - 0.3, "it must learn, else equal losses show nothing"
    assert series(found, "loss") == pytest.approx(series(plain, "loss"), abs=FP32)
    assert series(found, "grad_norm") == pytest.approx(series(plain, "grad_norm"), rel=1e-3)
    assert series(found, "samples") == series(plain, "samples")
    for metrics in ("initial_metrics", "final_metrics"):
        assert found[metrics] == pytest.approx(plain[metrics], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tensor-0", "tensor-3"])
def test_cut_weights_have_the_gradient_noise_of_whole_ones(
    on_two: dict[str, Any], alone: dict[str, Any], name: str
) -> None:
    assert series(on_two[name], "gradient_variance") == pytest.approx(
        series(alone["plain"], "gradient_variance"), rel=1e-3
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_published_model_is_the_whole_one_that_one_worker_makes(
    on_two: dict[str, Any], alone: dict[str, Any], out: Path, name: str
) -> None:
    (found, config), (expected, plain_config) = weights(out, on_two[name]), weights(out, alone["plain"])
    assert config == plain_config
    assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in expected.items()}
    for tensor, value in expected.items():
        torch.testing.assert_close(found[tensor], value, rtol=1e-3, atol=2e-4)


@pytest.mark.slow
def test_speed_counts_the_whole_model_once(on_two: dict[str, Any], alone: dict[str, Any]) -> None:
    plain = alone["plain"]
    for name, found in on_two.items():
        assert good(found)["records"][0]["parameters"] == plain["records"][0]["parameters"], name
        assert found["flops_per_row"] == plain["flops_per_row"], name


@pytest.mark.slow
def test_each_worker_of_a_tensor_group_saves_its_part(on_two: dict[str, Any]) -> None:
    files = {Path(name).name for name in good(on_two["tensor-1"])["files"]}
    assert {f"zero_pp_rank_0_mp_rank_0{part}_optim_states.pt" for part in (0, 1)} <= files
    assert {f"mp_rank_0{part}_model_states.pt" for part in (0, 1)} <= files


@pytest.mark.slow
def test_each_layer_of_a_pipeline_is_saved_once(on_two: dict[str, Any]) -> None:
    layers = [Path(name).name for name in good(on_two["pipeline-1"])["files"] if "layer_" in name]
    assert layers == [f"layer_{index:02d}-model_states.pt" for index in range(4)], "embedding, two blocks, norm"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tensor-1", "sequence-1", "pipeline-1"])
def test_an_interrupted_run_goes_on_in_its_layout(on_two: dict[str, Any], name: str) -> None:
    assert f"step {HALF}" in good(on_two[f"{name}-begun"])["interrupted"]
    start = next(record for record in on_two[name]["records"] if record["kind"] == "start")
    assert (start["step"], start["universal"]) == (HALF, False)


@pytest.mark.slow
def test_a_run_may_wander_from_slices_over_cut_weights_to_one_worker(
    on_two: dict[str, Any], alone: dict[str, Any]
) -> None:
    starts = [good(found)["records"][0] for found in (on_two["wandering-on"], alone["wandering"])]
    assert [(start["step"], start["universal"]) for start in starts] == [(2, True), (4, True)]
    assert series(alone["wandering"], "loss") == pytest.approx(series(alone["plain"], "loss"), abs=FP32)
