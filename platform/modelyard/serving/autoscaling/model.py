"""What the autoscaling policy sees and answers, as plain data, and its config. No Ray, no clock."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

from pydantic import Field, model_validator

from modelyard.config import Config


class Objective(Config):
    """What callers may expect, for `percentile` of the requests.

    The time to the first token may grow with the prompt, as the time of an idle replica does: objectives are often
    written as a multiple of that (Patel et al., Splitwise, ISCA 2024, table VI).
    """

    ttft_s: float = Field(default=2.0, gt=0)
    """Seconds to the first token of an empty prompt."""
    ttft_per_1k_tokens_s: float = Field(default=0.5, ge=0)
    """Seconds more for each 1,000 tokens of the prompt."""
    token_s: float = Field(default=0.2, gt=0)
    """Mean seconds for each further token; 0.2 is a reader's pace."""
    percentile: float = Field(default=0.99, gt=0, lt=1)
    """The one dial between more replicas and more late answers."""

    def ttft_limit_s(self, prompt_tokens: float) -> float:
        """The limit for a prompt of this length."""
        return self.ttft_s + self.ttft_per_1k_tokens_s * prompt_tokens / 1000


class Capacity(Config):
    """What a replica can do, in the terms of one step of continuous batching (Yu et al., Orca, OSDI 2022).

    A step that reads p prompt tokens and gives one token to each of b sequences takes
    p * `prompt_token_s` + `step_s` + b * `sequence_s`. Give what a measurement showed; the policy corrects it by what
    the replicas report.
    """

    prompt_token_s: float = Field(default=0.0005, ge=0)
    """Seconds to read one token of a prompt."""
    step_s: float = Field(default=0.03, gt=0)
    """Seconds of a step that do not depend on the batch."""
    sequence_s: float = Field(default=0.001, ge=0)
    """Seconds a step takes longer for each sequence in it."""


class PoolConfig(Config):
    """Replicas that are alike: one deployment."""

    name: str = "default"
    """The Serve deployment."""
    min_replicas: int = Field(default=1, ge=0)
    """0 lets the pool go to nothing when nobody asks."""
    max_replicas: int = Field(default=1, gt=0)
    slots: int = Field(default=16, gt=0)
    """Sequences a replica runs at a time (`max_ongoing_requests`)."""
    cold_start_s: float = Field(default=30.0, ge=0)
    """From the decision to the first request answered."""
    price_per_hour: float = Field(default=1.0, ge=0)
    """Of one replica; cheap pools are used first."""
    capacity: Capacity = Capacity()

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas={self.min_replicas} is above max_replicas={self.max_replicas}; raise the latter"
            )
        return self


class ScalingConfig(Config):
    """How a model is scaled."""

    pools: tuple[PoolConfig, ...] = (PoolConfig(),)
    objective: Objective = Objective()
    max_price_per_hour: float | None = Field(default=None, gt=0)
    """The fleet never costs more; None for no ceiling."""
    hold_s: float | None = Field(default=None, ge=0)
    """A replica goes only when the fleet could have done without it for this long; None: four cold starts, the best of
    one to fourteen on the traces of the benchmark."""
    margin: float = Field(default=0.05, ge=0)
    """And only when the rest would hold this share more demand."""
    zero_after_s: float = Field(default=300.0, ge=0)
    """Seconds without a request until a pool with `min_replicas: 0` gives up its last replica."""
    season_s: float | None = Field(default=86400.0, gt=0)
    """Length of the cycle of demand; None for none. Used once two cycles were seen."""

    @property
    def hold_window_s(self) -> float:
        """`hold_s` or its default."""
        return 4 * max(pool.cold_start_s for pool in self.pools) if self.hold_s is None else self.hold_s

    @model_validator(mode="after")
    def _sound(self) -> Self:
        if not self.pools:
            raise ValueError("pools is empty; give at least one")
        names = [pool.name for pool in self.pools]
        if len(set(names)) != len(names):
            raise ValueError(f"pools share a name: {', '.join(names)}; give each its own")
        least = sum(pool.price_per_hour * pool.min_replicas for pool in self.pools)
        if self.max_price_per_hour is not None and least > self.max_price_per_hour:
            raise ValueError(
                f"max_price_per_hour={self.max_price_per_hour:g} is below what min_replicas cost ({least:g}); "
                "raise it or lower min_replicas"
            )
        return self


@dataclass(frozen=True)
class ReplicaReport:
    """What one replica says of itself; counters only grow, and begin anew with a new replica."""

    replica_id: str
    at_s: float
    running: float
    """Sequences that get tokens."""
    waiting: float
    """Taken in, without their first token."""
    prompt_tokens: float
    """Read since the replica started."""
    generated_tokens: float
    """Generated since the replica started."""
    finished: float
    """Answers completed since the replica started."""
    cache_usage: float = 0.0
    """Share of the key-value cache in use, 0 to 1."""


@dataclass(frozen=True)
class PoolState:
    """A pool now."""

    name: str
    running: int
    """Replicas that answer."""
    target: int
    """Replicas last asked for; those above `running` are starting."""
    reports: tuple[ReplicaReport, ...] = ()

    @property
    def starting(self) -> int:
        """Asked for and not answering yet."""
        return max(0, self.target - self.running)


@dataclass(frozen=True)
class Snapshot:
    """A moment of a model's fleet. Replicas, requests and tokens are counts; `now_s` is any clock that only grows."""

    now_s: float
    pools: tuple[PoolState, ...]
    arrived_requests: float = 0.0
    """Since the last snapshot."""
    arrived_prompt_tokens: float | None = None
    """Of those; None when nobody counted, then they are taken for average ones."""
    queued_requests: float = 0.0
    """In front of the replicas, with none of them yet."""
    queued_prompt_tokens: float | None = None
    """Of the queued, and of those that wait inside the replicas; None: taken for average."""
    running_requests: float | None = None
    """In the replicas; None: the sum of what they report."""
    ttft_over_limit: float | None = None
    """How the recent first tokens at the objective's percentile compare to their limit: 1.2 is 20 % too late."""
    token_over_limit: float | None = None
    """The same for the time between tokens."""


@dataclass(frozen=True)
class Decision:
    """How many replicas each pool should have."""

    replicas: dict[str, int]
    reason: str
    """In words and numbers, for people."""
    figures: dict[str, float] = field(default_factory=dict)
    """What it was decided on; replica-equivalents, seconds."""

    @property
    def total(self) -> int:
        """Replicas of all pools."""
        return sum(self.replicas.values())
