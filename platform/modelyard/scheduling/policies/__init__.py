"""The policies by name.

>>> policy("fifo").name
'fifo'
"""

from __future__ import annotations

import importlib
from typing import Any

from modelyard.errors import ConfigError, nearest
from modelyard.scheduling.model import Policy

_HOMES = {
    "deadline": ("deadline", "DeadlinePolicy"),
    "fair_share": ("fair_share", "FairSharePolicy"),
    "fifo": ("fifo", "FifoPolicy"),
    "genetic": ("genetic", "GeneticPolicy"),
    "goodput": ("goodput", "GoodputPolicy"),
    "particle_swarm": ("particle_swarm", "ParticleSwarmPolicy"),
    "priority": ("priority", "PriorityPolicy"),
    "random": ("baselines", "RandomPolicy"),
    "round_robin": ("baselines", "RoundRobinPolicy"),
}

KNOWN = tuple(_HOMES)
"""Names that `policy` takes."""

__all__ = ["KNOWN", "policy"]


def policy(name: str, **options: Any) -> Policy:
    """The policy of a name; its module is imported now, so that the light ones need nothing heavy.

    Args:
        options: fields of the policy, e.g. `policy("random", seed=7)`.
    """
    if name not in _HOMES:
        raise ConfigError(f"policy={name!r} is no policy; known: {', '.join(KNOWN)}", nearest(name, KNOWN))
    module, kind = _HOMES[name]
    cls = getattr(importlib.import_module(f"{__name__}.{module}"), kind)
    try:
        made: Policy = cls(**options)
    except TypeError as error:
        fields = sorted(field for field in getattr(cls, "__dataclass_fields__", {}) if field != "name")
        raise ConfigError(
            f"policy {name!r} does not take {', '.join(f'{key}={value!r}' for key, value in options.items())}",
            f"its options: {', '.join(fields) or 'none'}",
        ) from error
    return made
