"""What a gateway can be told; each bound is named in the error that it causes."""

from __future__ import annotations

from pydantic import Field

from modelyard.config import Config
from modelyard.security import TokenIssuer


class GatewaySettings(Config):
    """One gateway; all replicas of it get the same."""

    database: str | None = None
    """SQLAlchemy URL of keys, quotas and usage, shared by all replicas; None: `MODELYARD_GATEWAY_DB`, else
    `sqlite:///<home>/gateway.db`, which serves the processes of one machine."""
    open_access: bool = False
    """Answer everyone, without a key and without limits: for a laptop or a closed test network."""
    issuers: tuple[TokenIssuer, ...] = ()
    """Identity providers whose tokens count beside API keys."""
    key_cache_s: float = Field(default=2.0, gt=0, le=60)
    """A key is believed for so long before it is looked up again: a revoked key stops within this time."""
    site: str | None = None
    """Where this gateway stands; sent as `X-Modelyard-Site` unless a backend says where it answered."""

    default_max_tokens: int = Field(default=512, gt=0)
    """Length of a chat's answer when the caller sets none, at most the model's context."""
    max_choices: int = Field(default=8, gt=0)
    """Largest `n`."""
    max_prompts: int = Field(default=32, gt=0)
    """Prompts of one completion call."""
    max_inputs: int = Field(default=256, gt=0)
    """Texts of one embedding call, inputs of one prediction."""
    max_body_bytes: int = Field(default=8 * 2**20, gt=0)
    """Size of a request."""
    max_json_depth: int = Field(default=32, gt=0, le=150)
    """Nesting of a JSON body."""
    max_image_pixels: int = Field(default=16_000_000, gt=0)
    """Pixels of one call's images together, read from their headers before anything is unpacked."""
    max_in_flight: int = Field(default=1_024, gt=0)
    """Calls at once in this replica; more are refused with 503."""

    body_timeout_s: float = Field(default=30.0, gt=0)
    """A request's body must be here by then."""
    request_timeout_s: float = Field(default=600.0, gt=0)
    """A call must be answered to its last token by then."""
    backend_timeout_s: float = Field(default=5.0, gt=0)
    """The backend must name its models by then."""
    models_cache_s: float = Field(default=2.0, gt=0)
    """The list of models may be so old."""

    cors_origins: tuple[str, ...] = ()
    """Web origins whose pages may call this gateway; none by default."""
    expose_metrics: bool = True
    """Serve `/metrics`: without a key, without names of callers."""
