"""What is deployed: one file section per application."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, PositiveFloat, field_validator, model_validator

from modelyard.config import Config
from modelyard.scheduling.model import POOL_LABEL
from modelyard.serving.autoscaling.model import Capacity, Objective
from modelyard.serving.cascade.config import CascadeConfig
from modelyard.serving.deployment.rollout import RolloutLimits
from modelyard.serving.gateway.settings import GatewaySettings
from modelyard.serving.server_config import ModelConfig

SITE_LABEL, TIER_LABEL = "modelyard/site", "modelyard/tier"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")


class Placement(Config):
    """Where replicas run, and what each one gets."""

    cpus: float = Field(default=1.0, gt=0)
    """CPUs per replica; also its threads."""
    gpus: float = Field(default=0.0, ge=0)
    resources: dict[str, PositiveFloat] = {}
    """Custom Ray resources."""
    pool: str | None = None
    """Value of the node label `modelyard/pool`; None takes any node."""
    site: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")
    """An edge site: only nodes with `modelyard/tier=edge` and this `modelyard/site`."""
    label_selector: dict[str, str] = {}
    """More label conditions, in Ray's syntax (`v`, `!v`, `in(a,b)`, `!in(a,b)`)."""

    @property
    def selector(self) -> dict[str, str]:
        """Ray label selector of a replica. The cloud keeps off the edge's nodes."""
        pool = {POOL_LABEL: self.pool} if self.pool else {}
        tier = {TIER_LABEL: "edge", SITE_LABEL: self.site} if self.site else {TIER_LABEL: "!edge"}
        return {**tier, **pool, **self.label_selector}

    @property
    def per_replica(self) -> dict[str, float]:
        """Ray resources of a replica."""
        wanted = {"CPU": self.cpus, "GPU": self.gpus, **self.resources}
        return {name: amount for name, amount in wanted.items() if amount > 0}


class ModelApp(Config):
    """One model as one Serve application."""

    model: ModelConfig
    placement: Placement = Placement()
    min_replicas: int = Field(default=1, ge=0)
    """0 lets it go when nobody asks; the first call then waits for a replica."""
    max_replicas: int = Field(default=1, gt=0)
    objective: Objective = Objective()
    capacity: Capacity = Capacity()
    cold_start_s: float = Field(default=30.0, ge=0)
    """From the decision to start a replica to its first answer."""
    zero_after_s: float = Field(default=300.0, ge=0)
    """Seconds without a call after which the last replica goes, where `min_replicas` is 0."""
    drain_timeout_s: float = Field(default=120.0, gt=0)
    """Longest time a replica that is to go may finish its calls."""
    start_timeout_s: float = Field(default=600.0, gt=0)
    """Longest wait for the first replica when it is deployed."""
    is_canary: bool = False
    """Beside a stable application of the same model; gets only the share that it is given."""

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas={self.min_replicas} is above max_replicas={self.max_replicas}")
        return self

    @property
    def name(self) -> str:
        """What callers write into `model`: the given name, or that of the artifact."""
        found = self.model.name or self.model.reference.removeprefix("models:/").partition("@")[0].partition("/")[0]
        if not _NAME.fullmatch(found):
            raise ValueError(f"{found!r} is no name for a served model; use letters, digits, `.`, `_` and `-`")
        return found

    @property
    def application(self) -> str:
        """The Serve application's name."""
        where = f"@{self.placement.site}" if self.placement.site else ""
        return f"{self.name}{where}{'--canary' if self.is_canary else ''}"


class GatewayApp(Config):
    """The gateway as a Serve application."""

    settings: GatewaySettings = GatewaySettings()
    replicas: int = Field(default=1, gt=0)
    cpus: float = Field(default=0.5, ge=0)
    """CPUs per replica. Keys in SQLite are on the head's disk: more than one node needs a database by URL."""
    label_selector: dict[str, str] = {TIER_LABEL: "!edge"}
    """Nodes for its replicas, in Ray's syntax; by default none at a site, whose link may be cut."""
    refresh_s: float = Field(default=1.0, gt=0)
    """Seconds between looks at what is deployed."""
    recovery_timeout_s: float = Field(default=60.0, ge=0)
    """How long other replicas are tried after one was lost, before a call fails; one that has sent text to its caller
    fails at once."""
    piece_timeout_s: float = Field(default=120.0, gt=0)
    """A replica in the cloud that is silent for so long within a call counts as lost."""
    site_timeout_s: float = Field(default=5.0, gt=0)
    """The same for one at a site, which a cut link makes silent; a call then goes to the cloud."""
    site_pause_s: float = Field(default=10.0, ge=0)
    """After that the site is asked again no sooner than this."""
    rollout: RolloutLimits = RolloutLimits()
    """When a canary is withdrawn."""
    cascades: tuple[CascadeConfig, ...] = ()
    """Small models that ask a larger one when they are unsure."""


class ServingConfig(Config):
    """A gateway and the models behind it: what `modelyard serve up FILE` deploys."""

    gateway: GatewayApp | None = GatewayApp()
    """None where only models are deployed: a site of a gateway elsewhere."""
    host: str = "127.0.0.1"
    """Address the HTTP proxies bind."""
    port: int = Field(default=8000, ge=1, le=65535)
    certificate: str | None = None
    """Path, on every node with a proxy, of a certificate: turns HTTPS on. E.g. `~/.modelyard/cluster/node.crt`."""
    certificate_key: str | None = None
    """Path of its key."""
    proxies: Literal["head", "every_node"] = "head"
    """Where calls are taken in: on the head, or on every node with a replica, behind a load balancer."""
    models: tuple[ModelApp, ...]

    @field_validator("models", mode="after")
    @classmethod
    def _one_application_each(cls, models: tuple[ModelApp, ...]) -> tuple[ModelApp, ...]:
        names = [each.application for each in models]
        if not names:
            raise ValueError("name at least one model")
        if "gateway" in names:
            raise ValueError(
                "'gateway' is the name of the gateway's own application; give the model another `model.name`"
            )
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two models are named {twice[0]!r}; give one of them another `model.name`")
        return models

    @model_validator(mode="after")
    def _both_or_none(self) -> Self:
        if (self.certificate is None) != (self.certificate_key is None):
            raise ValueError("certificate and certificate_key go together; give both, or none for plain HTTP")
        return self

    @property
    def http_options(self) -> dict[str, str | int]:
        """What Ray Serve is told of its HTTP server."""
        options: dict[str, str | int] = {"host": self.host, "port": self.port}
        if self.certificate and self.certificate_key:
            files = {"ssl_certfile": self.certificate, "ssl_keyfile": self.certificate_key}
            options |= {name: str(Path(path).expanduser()) for name, path in files.items()}
        return options

    @model_validator(mode="after")
    def _open_only_here(self) -> Self:
        if self.gateway and self.gateway.settings.open_access and self.host not in ("127.0.0.1", "localhost", "::1"):
            raise ValueError(f"open_access would let everyone on {self.host} in; make keys, or listen on 127.0.0.1")
        return self

    @model_validator(mode="after")
    def _cascades_hide_nobody(self) -> Self:
        served = {each.name for each in self.models}
        for cascade in self.gateway.cascades if self.gateway else ():
            if cascade.name in served:
                raise ValueError(f"a cascade and a model are both named {cascade.name!r}; rename the cascade")
        return self
