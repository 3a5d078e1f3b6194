"""What each job's config asks of a cluster, and what it could get on the pools of a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modelyard import config_file
from modelyard.cluster import Node
from modelyard.clusters.files import POOL, NodeType
from modelyard.config import Config, parse
from modelyard.errors import ConfigError


@dataclass(frozen=True)
class Demand:
    """What one config asks for."""

    name: str
    kind: str
    """`train`, `prepare`, `evaluate` or the like; `invalid` when no job would take the file."""
    min_workers: int = 1
    max_workers: int = 1
    per_worker: Mapping[str, float] = field(default_factory=dict)
    selector: Mapping[str, str] = field(default_factory=dict)
    pools: tuple[str, ...] = ()
    """Pools its lease allows; empty means any."""
    note: str = ""


@dataclass(frozen=True)
class Offer:
    """What a cluster can give one demand when nothing else runs on it."""

    demand: Demand
    workers: Mapping[str, int]
    """Pool to the most workers of this job there, with all its nodes up."""

    @property
    def fits(self) -> bool:
        """Whether the smallest gang finds room; a gang stays within one pool."""
        return any(count >= self.demand.min_workers for count in self.workers.values())


_TASKLESS = {"source": "prepare", "steps": "compress", "space": "tune"}
"""The key that only one kind of job's config has, and must have."""


def demands(folder: Path) -> list[Demand]:
    """The demand of every config in a folder.

    Raises:
        ConfigError: there is no such folder.
    """
    if not folder.is_dir():
        raise ConfigError(f"no folder {str(folder)!r} of job configs", "name it with --configs")
    return [_demand(path) for path in sorted(folder.glob("*.yaml"))]


def offer(demand: Demand, types: Sequence[NodeType]) -> Offer:
    """Count the workers each pool could hold. Pure."""
    found: dict[str, int] = {}
    for each in types if demand.kind != "invalid" else ():
        node = Node(each.name, each.resources, each.resources, each.labels)
        allowed = not demand.pools or each.labels.get(POOL) in demand.pools
        if allowed and node.matches(demand.selector):
            copies = min(node.fits(demand.per_worker), demand.max_workers) * max(each.max_count, int(each.is_head))
            found[each.pool] = min(found.get(each.pool, 0) + copies, demand.max_workers)
    return Offer(demand, {pool: count for pool, count in found.items() if count})


def _demand(path: Path) -> Demand:
    try:
        data = config_file.read(path)
        if "task" not in data:
            return Demand(path.stem, _taskless(data, path.name), per_worker={"CPU": 1.0}, selector={})
        from modelyard.training.config import TrainConfig

        config = parse(TrainConfig, data, source=path.name)
    except ConfigError as error:
        return Demand(path.stem, "invalid", note=str(error).splitlines()[0])
    workers, lease = config.workers, config.lease
    pools = () if lease is None else lease.pools
    return Demand(path.stem, "train", workers.min, workers.max, workers.per_worker, workers.selector, pools)


def _taskless(data: Mapping[str, Any], source: str) -> str:
    """The kind of a config that trains nothing, or raise ConfigError for what no schema takes."""
    from modelyard.compression.recipe import Recipe
    from modelyard.data.config import PrepareConfig
    from modelyard.training.evaluation import EvaluateConfig

    kind = next((kind for key, kind in _TASKLESS.items() if key in data), "evaluate")
    schemas: dict[str, type[Config]] = {"prepare": PrepareConfig, "compress": Recipe, "evaluate": EvaluateConfig}
    if kind == "evaluate" and not {"model", "dataset"} & set(data):
        keys = ", ".join(map(repr, data)) or "nothing"
        raise ConfigError(f"{source} holds {keys}, so no job takes it", "see jobs/configs for one of each kind")
    if kind in schemas:
        parse(schemas[kind], dict(data), source=source)
    elif not isinstance(data["space"], Mapping):
        raise ConfigError(f"{source}: space is no section", "give each parameter its values or its range")
    return kind
