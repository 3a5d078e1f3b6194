"""How the workers of a gang share what each has learnt: the choices of `training.strategy`. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from modelyard.config import Config


class AllReduce(Config):
    """All workers average every gradient at every step; DeepSpeed, whole or sharded (`zero_stage`)."""

    kind: Literal["all_reduce"] = "all_reduce"


class ParameterServer(Config):
    """Servers hold weights and optimizer state; workers push gradients to them and pull weights of bounded age.

    Stale synchronous parallel (Ho et al., 2013). The servers are threads of the workers, each with an equal share of
    the weights (Li et al., 2014). Every row of every global batch counts once, in one optimizer step.
    """

    kind: Literal["parameter_server"] = "parameter_server"
    staleness: int = Field(default=1, ge=0, le=64)
    """Optimizer steps that the weights of a gradient may lack; 0 waits for all, and then learns as `all_reduce`."""
    work_claiming: bool = True
    """Workers take parts of the global batch when they are free, so that a slow worker does less of it; else each
    has its fixed part. A part has at most `micro_batch_size` rows."""
    timeout_s: float = Field(default=1800.0, gt=0)
    """Longest wait for another worker."""


class Gossip(Config):
    """Each worker steps its own optimizer, then averages its weights with its neighbours' alone; there is no centre.

    D-PSGD (Lian et al., 2017). The model that is validated and published is the average over the workers.
    """

    kind: Literal["gossip"] = "gossip"
    topology: Literal["exponential", "ring"] = "exponential"
    """`exponential`: one peer a step, 1, 2, 4, ... places on in turn (Assran et al., 2019; Ying et al., 2021);
    `ring`: both neighbours at every step."""
    timeout_s: float = Field(default=1800.0, gt=0)
    """Longest wait for a neighbour."""


def _named(value: Any) -> Any:
    """A plain string means the strategy of that name with its defaults."""
    return {"kind": value} if isinstance(value, str) else value


Strategy = Annotated[AllReduce | ParameterServer | Gossip, Field(discriminator="kind"), BeforeValidator(_named)]
