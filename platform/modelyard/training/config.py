"""Everything a training run can be told. Defaults live here and nowhere else."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from modelyard.config import Config
from modelyard.tasks import TaskConfig
from modelyard.training.parallel import Parallel, check
from modelyard.training.strategies import AllReduce, ParameterServer, Strategy

Positive = Annotated[int, Field(gt=0)]


class AdamW(Config):
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019); torch's fused kernel."""

    kind: Literal["adamw"] = "adamw"
    learning_rate: float = Field(default=3e-4, gt=0)
    """Peak learning rate; the schedule scales it."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the two moment estimates, each in 0..1."""
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    """Applied to matrices only: not to biases, norms and other vectors."""

    @field_validator("betas")
    @classmethod
    def _betas_are_rates(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"each beta must be in 0..1 (1 excluded), got {betas}")
        return betas


class Adam(AdamW):
    """Adam with L2 regularisation inside the gradient (Kingma and Ba, 2015)."""

    kind: Literal["adam"] = "adam"  # type: ignore[assignment]
    weight_decay: float = Field(default=0.0, ge=0)


class SGD(Config):
    """Stochastic gradient descent with momentum."""

    kind: Literal["sgd"] = "sgd"
    learning_rate: float = Field(default=0.1, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    nesterov: bool = False
    weight_decay: float = Field(default=0.0, ge=0)


class Muon(Config):
    """Orthogonalised momentum for hidden matrices, Adam for the rest (Jordan et al., 2024); DeepSpeed's own."""

    kind: Literal["muon"] = "muon"
    learning_rate: float = Field(default=0.02, gt=0)
    """For the orthogonalised matrices."""
    adam_learning_rate: float = Field(default=3e-4, gt=0)
    """For embeddings, heads and vectors."""
    momentum: float = Field(default=0.95, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)


Optimizer = Annotated[AdamW | Adam | SGD | Muon, Field(discriminator="kind")]


class Schedule(Config):
    """How the learning rate moves: linear warm-up, then a decay to `final_share` of the peak."""

    kind: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """`wsd`: warm-up, stable, then a linear decay over the last `decay_share` of the run."""
    warmup_steps: int = Field(default=0, ge=0)
    final_share: float = Field(default=0.1, ge=0, le=1)
    """Share of the peak learning rate at the last step."""
    decay_share: float = Field(default=0.2, gt=0, le=1)
    """`wsd` only: share of the run that decays."""


class Training(Config):
    """One optimizer step, and how many of them."""

    max_steps: Positive = 100
    """Optimizer steps of the whole run."""
    global_batch_size: Positive = 8
    """Rows per optimizer step over all workers; the same whatever the number of workers."""
    micro_batch_size: Positive = 8
    """Most rows in one forward pass of one worker; smaller needs less memory and accumulates gradients."""
    strategy: Strategy = AllReduce()
    """How workers share what they learn: `all_reduce`, `parameter_server` or `gossip`, or one of them with settings."""
    parallel: Parallel = Parallel()
    """How many workers share one copy of the model: `{tensor: 2}`, `{sequence: 2}` or `{pipeline: 2}`."""
    zero_stage: int = Field(default=1, ge=0, le=3)
    """DeepSpeed ZeRO: 0 replicates, 1 shards optimizer states, 2 also gradients, 3 also parameters. Under another
    `strategy` than `all_reduce`, which keep whole replicas, the default is 0."""
    precision: Literal["fp32", "bf16"] = "fp32"
    gradient_clipping: float = Field(default=1.0, ge=0)
    """Largest global gradient norm; 0 clips nothing."""
    offload_optimizer: bool = False
    """Keep optimizer states in host memory (ZeRO 1-3)."""
    offload_parameters: bool = False
    """Keep parameters in host memory (ZeRO 3)."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more compute."""
    compile: bool = False
    """Compile the model with `torch.compile`."""
    log_every_steps: Positive = 1
    """Steps between logged losses."""
    noise_every_steps: int = Field(default=10, ge=0)
    """Steps between measurements of the gradient noise scale; 0 measures none, the default where no gradient of a
    whole batch is formed of equal weights (strategy `gossip`, `parameter_server` with a `staleness`) or no
    worker sees the whole gradient of a micro-batch (`parallel.sequence`, `parallel.pipeline`)."""
    record_samples: bool = False
    """Record the ids of the rows of every step in the run's history (for audits of the data order)."""
    stop_after_s: float | None = Field(default=None, gt=0)
    """Seconds after which the run checkpoints and ends early."""
    deepspeed: dict[str, Any] = {}
    """Raw DeepSpeed settings, merged into the generated config; keys that Modelyard owns are refused."""

    @model_validator(mode="before")
    @classmethod
    def _defaults_follow_the_strategy(cls, data: Any) -> Any:
        if not isinstance(data, Mapping) or "strategy" not in data:
            return data
        given = data["strategy"]
        kind = given if isinstance(given, str) else _read(given, "kind", "all_reduce")
        if kind == "all_reduce":
            return data
        stale = kind == "gossip" or _read(given, "staleness", ParameterServer().staleness) != 0
        return {"zero_stage": 0, **({"noise_every_steps": 0} if stale else {}), **data}

    @model_validator(mode="before")
    @classmethod
    def _parts_of_gradients_have_no_noise_scale(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and any(
            _read(data.get("parallel", {}), kind, 1) != 1 for kind in ("sequence", "pipeline")
        ):
            return {"noise_every_steps": 0, **data}
        return data

    @model_validator(mode="after")
    def _strategy_fits(self) -> Self:
        kind = self.strategy.kind
        if kind == "all_reduce":
            return self
        if self.zero_stage > 0:
            raise ValueError(
                f"strategy {kind} keeps whole replicas: set zero_stage to 0 or leave it out (got {self.zero_stage})"
            )
        if self.offload_optimizer or self.offload_parameters:
            raise ValueError(
                f"strategy {kind} has nothing to offload: set offload_optimizer and offload_parameters to false"
            )
        if self.deepspeed:
            raise ValueError(f"strategy {kind} does not run on DeepSpeed: take out training.deepspeed")
        if self.noise_every_steps and (kind == "gossip" or _read(self.strategy, "staleness", 0) > 0):
            raise ValueError(
                "the gradient noise scale needs the gradient of a whole batch at equal weights, which "
                f"strategy {kind} does not form: set noise_every_steps to 0 (got {self.noise_every_steps}), or take "
                "strategy all_reduce, or parameter_server with staleness 0"
            )
        return self

    @model_validator(mode="after")
    def _offload_needs_sharding(self) -> Self:
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer needs zero_stage 1, 2 or 3 (got 0)")
        if self.offload_parameters and self.zero_stage != 3:
            raise ValueError(f"offload_parameters needs zero_stage 3 (got {self.zero_stage})")
        return self


def _read(section: Any, name: str, default: Any) -> Any:
    """A field of a section that may still be plain data."""
    return section.get(name, default) if isinstance(section, Mapping) else getattr(section, name, default)


class Validation(Config):
    """Measuring on held-out rows while training."""

    every_steps: int = Field(default=0, ge=0)
    """Steps between validations; 0 validates only before the first and after the last step."""
    split: str = "validation"
    """Split that decides about early stopping and the best checkpoint."""
    final_split: str = "test"
    """Split measured before and after training; a dataset without it is measured on `split`."""
    max_rows: int | None = Field(default=None, gt=0)
    """Use only the first rows of a split; None uses all."""
    patience: int | None = Field(default=None, gt=0)
    """Stop after so many validations without improvement; None never stops early."""

    def final_of(self, splits: Collection[str]) -> str | None:
        """The split to measure before and after; None when the dataset has neither."""
        return next((name for name in (self.final_split, self.split) if name in splits), None)


class Checkpoints(Config):
    """When training state is saved, and what is kept."""

    every_steps: int = Field(default=0, ge=0)
    """Steps between checkpoints; 0 saves by time only."""
    every_s: float | None = Field(default=300.0, gt=0)
    """Seconds between checkpoints; None saves by steps only."""
    keep_last: Positive = 2
    """Newest checkpoints to keep."""
    keep_best: bool = True
    """Keep the checkpoint with the best validation metric as well, and make the model from it."""
    commit_timeout_s: float = Field(default=600.0, gt=0)
    """Longest wait for all workers to upload their part."""


class Workers(Config):
    """The gang: how many workers, what each one gets, and where."""

    min: Positive = 1
    """Fewest workers the run may go on with."""
    max: Positive = 1
    """Most workers; the run grows up to this when nodes appear."""
    cpus: float = Field(default=1.0, ge=0)
    """CPUs per worker; also its threads."""
    gpus: float = Field(default=0.0, ge=0)
    """GPUs per worker."""
    resources: dict[str, float] = {}
    """Custom Ray resources per worker."""
    pool: str | None = None
    """Value of the node label `modelyard/pool`; None takes any node."""
    label_selector: dict[str, str] = {}
    """More label conditions, in Ray's syntax (`v`, `!v`, `in(a,b)`, `!in(a,b)`)."""
    resize_interval_s: float = Field(default=30.0, gt=0)
    """Seconds between looks for room to grow."""
    start_timeout_s: float = Field(default=300.0, gt=0)
    """Longest wait for room for `min` workers."""

    @model_validator(mode="before")
    @classmethod
    def _number_means_exactly(cls, value: Any) -> Any:
        return {"min": value, "max": value} if isinstance(value, int) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _min_within_max(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min={self.min} is above max={self.max}")
        return self

    @property
    def per_worker(self) -> dict[str, float]:
        """Ray resources of one worker."""
        wanted = {"CPU": self.cpus, "GPU": self.gpus, **self.resources}
        return {name: amount for name, amount in wanted.items() if amount > 0}

    @property
    def selector(self) -> dict[str, str]:
        """Ray label selector of one worker."""
        pool = {"modelyard/pool": self.pool} if self.pool else {}
        return {**pool, **self.label_selector}


class Failures(Config):
    """What a run survives."""

    max_failures: int = Field(default=3, ge=-1)
    """Restarts after a worker failed by itself; -1 never gives up. Preemptions and resizes do not count."""
    health_check_interval_s: float = Field(default=0.25, gt=0)
    """Seconds between looks at the workers."""


class Lease(Config):
    """What the run asks of the cluster's scheduler, if one runs; without one it starts at once."""

    tenant: str = "default"
    """Who pays: the tenant whose quota counts."""
    priority: int = Field(default=0, ge=-1000, le=1000)
    """Higher goes first."""
    pools: tuple[str, ...] = ()
    """Pools it may use, most wanted first; empty (or `any`) means any."""
    span_pools: bool = False
    """Whether the workers of one gang may be in several pools."""
    deadline_s: float | None = Field(default=None, gt=0)
    """Seconds from submission by which it should be done."""
    timeout_s: float | None = Field(default=None, gt=0)
    """Longest wait in line; None waits as long as it takes."""

    @field_validator("pools", mode="before")
    @classmethod
    def _any_means_all(cls, value: Any) -> Any:
        return () if value == "any" else (value,) if isinstance(value, str) else value


class TrainConfig(Config):
    """One training run: the file behind `jobs/train.py --config`."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the model in the registry."""
    dataset: str
    """`datasets:/name`, `datasets:/name/3`, `datasets:/name@alias`, or the folder of a prepared dataset."""
    task: TaskConfig
    seed: int = Field(default=0, ge=0)
    """Seeds weights, data order and dropout."""
    run: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run. The same name continues an unfinished run; by default it is derived from the config."""
    workers: Workers = Workers()
    training: Training = Training()
    optimizer: Optimizer = AdamW()
    schedule: Schedule = Schedule()
    validation: Validation = Validation()
    checkpoint: Checkpoints = Checkpoints()
    failures: Failures = Failures()
    lease: Lease | None = None
    """What to ask of the scheduler; None trains beside it, on whatever room there is."""

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.schedule.warmup_steps >= self.training.max_steps > 1:
            raise ValueError(
                f"schedule.warmup_steps={self.schedule.warmup_steps} must be below "
                f"training.max_steps={self.training.max_steps}"
            )
        check(self)
        if self.workers.max // self.training.parallel.size > self.training.global_batch_size:
            raise ValueError(
                f"workers.max={self.workers.max} is above training.global_batch_size="
                f"{self.training.global_batch_size}: some workers would have no rows"
            )
        if self.optimizer.kind == "muon" and self.training.strategy.kind != "all_reduce":
            raise ValueError(
                f"optimizer muon needs whole matrices and DeepSpeed, which strategy {self.training.strategy.kind} does "
                "not use: set training.strategy=all_reduce, or take optimizer adamw, adam or sgd"
            )
        if self.optimizer.kind == "muon" and self.training.zero_stage == 0:
            raise ValueError("optimizer muon needs training.zero_stage 1, 2 or 3 (got 0)")
        if self.optimizer.kind == "muon" and self.training.gradient_clipping:
            raise ValueError(
                "optimizer muon sets the size of its updates itself, and DeepSpeed would clip those: set "
                f"training.gradient_clipping=0 (got {self.training.gradient_clipping:g})"
            )
        if self.optimizer.kind in ("sgd", "muon") and self.training.zero_stage and self.workers.min < self.workers.max:
            raise ValueError(
                f"optimizer {self.optimizer.kind} with training.zero_stage={self.training.zero_stage} needs a fixed "
                f"number of workers (got min={self.workers.min}, max={self.workers.max}): DeepSpeed converts the "
                "state of Adam only"
            )
        return self
