"""The DeepSpeed engine of one worker, without Ray: it computes what plain torch computes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from modelyard.training import TrainConfig
from modelyard.training.batching import plan
from modelyard.training.config import SGD, Adam, AdamW
from modelyard.training.engine import Engine, _optimizer, _tagged_for_muon, import_deepspeed

ROWS = 7


@pytest.fixture(scope="module")
def gang_of_one() -> Iterator[None]:
    """A process group of this process alone, with the variables that Ray Train sets on a worker."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
            patch.setenv(name, value)
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        import_deepspeed().init_distributed(dist_init_required=False)
        yield
        dist.destroy_process_group()


class Net(torch.nn.Module):
    """A matrix, a norm and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(7, 4)
        self.hidden = torch.nn.Linear(4, 4)
        self.norm = torch.nn.LayerNorm(4)
        self.head = torch.nn.Linear(4, 7, bias=False)
        self.register_buffer("scale", torch.tensor(2.0))
        self.register_buffer("scratch", torch.zeros(1), persistent=False)

    def forward(self, ids_b: torch.Tensor) -> torch.Tensor:
        """Logits (B, 7) for token ids (B,)."""
        return self.head(self.norm(self.hidden(self.embedding(ids_b)))) * self.scale

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.head


def net() -> Net:
    torch.manual_seed(3)
    return Net()


def losses(model: torch.nn.Module, start: int = 0, stop: int = ROWS) -> torch.Tensor:
    ids_b = torch.arange(ROWS)[start:stop]
    return torch.nn.functional.cross_entropy(model(ids_b), (ids_b + 1) % 7, reduction="none")


def engine(config: TrainConfig, model: torch.nn.Module | None = None) -> Engine:
    cut = plan(ROWS, config.training.micro_batch_size, 1, 0)
    return Engine(model or net(), config, cut, num_workers=1)


def one_step(made: Engine, config: TrainConfig, step: int) -> tuple[float, float]:
    pairs = plan(ROWS, config.training.micro_batch_size, 1, 0).micro_batches
    for index, (start, stop) in enumerate(pairs):
        made.backward(losses(made.model, start, stop), is_last=index + 1 == len(pairs))
    return made.step(step)


@pytest.fixture
def configured(token_config: Callable[..., TrainConfig]) -> Callable[..., TrainConfig]:
    def build(stage: int, micro: int = ROWS, clip: float = 0.1, **sections: Any) -> TrainConfig:
        training = {
            "zero_stage": stage,
            "micro_batch_size": micro,
            "global_batch_size": ROWS,
            "gradient_clipping": clip,
        }
        return token_config(workers=1, training=training, **sections)

    return build


@pytest.mark.usefixtures("gang_of_one")
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_three_steps_of_uneven_micro_batches_move_the_weights_as_plain_torch_does(
    configured: Callable[..., TrainConfig], stage: int
) -> None:
    config = configured(stage, micro=5)
    made, plain = engine(config), net()
    kernel = _optimizer(plain, AdamW(learning_rate=0.01))
    for step in range(3):
        rate, norm = one_step(made, config, step)
        losses(plain).mean().backward()
        expected_norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        for group in kernel.param_groups:
            group["lr"] = rate
        kernel.step()
        kernel.zero_grad()
        assert norm == pytest.approx(float(expected_norm), rel=1e-4), "the norm before clipping"
    state = made.full_state()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("gang_of_one")
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_norms_of_micro_batches_are_those_of_their_mean_gradients(
    configured: Callable[..., TrainConfig], stage: int
) -> None:
    config = configured(stage, micro=3)
    made, pairs = engine(config), plan(ROWS, 3, 1, 0).micro_batches
    expected = []
    for index, (start, stop) in enumerate(pairs):
        made.backward(losses(made.model, start, stop), is_last=index + 1 == len(pairs), measure_rows=stop - start)
        plain = net()
        losses(plain, start, stop).mean().backward()
        expected.append(float(torch.nn.utils.get_total_norm([p.grad for p in plain.parameters()])) ** 2)
    made.step(0)
    taken = made.take_norms()
    assert (taken.count, taken.inverse_rows) == (3, pytest.approx(1 / 3 + 1 / 2 + 1 / 2))
    assert taken.squares == pytest.approx(sum(expected), rel=1e-4)


@pytest.mark.usefixtures("gang_of_one")
def test_the_learning_rate_follows_the_schedule(configured: Callable[..., TrainConfig]) -> None:
    config = configured(1, schedule={"warmup_steps": 4, "kind": "constant"})
    made = engine(config)
    assert [one_step(made, config, step)[0] for step in range(5)] == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01])


@pytest.mark.usefixtures("gang_of_one")
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_loaded_engine_goes_on_as_the_saved_one(
    configured: Callable[..., TrainConfig], tmp_path: Path, stage: int
) -> None:
    config = configured(stage)
    first = engine(config)
    one_step(first, config, 0)
    first.save(tmp_path, "state")
    second = engine(config, Net())
    second.load(tmp_path, "state")
    for step in (1, 2):
        one_step(first, config, step)
        one_step(second, config, step)
    ours, theirs = first.full_state(), second.full_state()
    for name in ours:
        torch.testing.assert_close(theirs[name], ours[name], rtol=0, atol=0)


@pytest.mark.usefixtures("gang_of_one")
@pytest.mark.parametrize("stage", [1, 3])
def test_the_full_state_has_what_a_models_own_state_has(configured: Callable[..., TrainConfig], stage: int) -> None:
    state = engine(configured(stage)).full_state()
    expected = net().state_dict()
    assert state.keys() == expected.keys(), "no buffer that is not to be saved"
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value)


def test_only_matrices_decay() -> None:
    model = net()
    decaying, others = _optimizer(model, AdamW(weight_decay=0.3)).param_groups
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    assert {id(p) for p in others["params"]} == {id(model.hidden.bias), id(model.norm.weight), id(model.norm.bias)}
    assert len(decaying["params"]) == 3


@pytest.mark.parametrize(
    ("config", "kernel"),
    [(AdamW(), torch.optim.AdamW), (Adam(), torch.optim.Adam), (SGD(momentum=0.5), torch.optim.SGD)],
)
def test_each_optimizer_is_torchs_own_with_its_settings(config: Any, kernel: type) -> None:
    made = _optimizer(net(), config)
    assert type(made) is kernel
    assert made.param_groups[0]["lr"] == config.learning_rate
    if isinstance(config, SGD):
        assert made.param_groups[0]["momentum"] == 0.5
    else:
        assert made.param_groups[0]["betas"] == config.betas


def test_frozen_weights_are_not_optimised() -> None:
    model = net()
    model.hidden.requires_grad_(False)
    held = [id(p) for group in _optimizer(model, AdamW()).param_groups for p in group["params"]]
    assert id(model.hidden.weight) not in held
    assert len(held) == 4


def test_muon_gets_hidden_matrices_and_adam_the_rest() -> None:
    model = net()
    assert len(_tagged_for_muon(model)) == 6
    tagged = {name for name, parameter in model.named_parameters() if parameter.use_muon}
    assert tagged == {"hidden.weight"}


@pytest.mark.usefixtures("gang_of_one")
@pytest.mark.slow  # compiles its kernels first
def test_muon_trains(configured: Callable[..., TrainConfig]) -> None:
    config = configured(1, clip=0.0, optimizer={"kind": "muon", "learning_rate": 0.05, "adam_learning_rate": 0.01})
    made = engine(config)
    before = float(losses(made.model).mean())
    start = copy.deepcopy(made.module.state_dict())
    for step in range(10):
        one_step(made, config, step)
    assert float(losses(made.model).mean()) < before
    assert all(not torch.equal(start[n], p) for n, p in made.module.named_parameters())
