"""How many tokens a memory budget holds, and whether that is enough for a context."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from modelyard.errors import CapacityError

MIB = 1 << 20
log = logging.getLogger(__name__)


def cache_token_bytes(config: Mapping[str, Any], item_bytes: int) -> int:
    """Bytes of keys and values of one token in all layers, by a Hugging Face `config.json`."""
    heads = int(config["num_attention_heads"])
    width = int(config.get("head_dim") or config["hidden_size"] // heads)
    return 2 * int(config["num_hidden_layers"]) * int(config.get("num_key_value_heads") or heads) * width * item_bytes


def fit_context(asked: int | None, positions: int | None, fitting: int, token_bytes: int, cache_mib: int) -> int:
    """Most tokens of a sequence.

    Args:
        asked: what the config asks for; None for what the model can, or fewer where the budget ends.
        positions: what the model can; None for no limit.
        fitting: tokens that the budget of `cache_mib` holds, at `token_bytes` each.

    Raises:
        CapacityError: a sequence of `asked` tokens fits neither the model nor the budget, or the budget holds none.
    """
    wanted = asked or positions or fitting
    if positions is not None and wanted > positions:
        raise CapacityError(f"context_tokens={wanted}, but the model sees {positions} tokens at most", "lower it")
    if wanted <= fitting and fitting:
        return wanted
    needed = -(-wanted * token_bytes // MIB)
    if asked is not None or not fitting:
        raise CapacityError(
            f"a sequence of {wanted} tokens needs {needed} MiB of cache, cache_mib={cache_mib} holds {fitting} tokens",
            "raise cache_mib or lower context_tokens",
        )
    log.info("context cut from %d to %d tokens; a full one needs cache_mib=%d", wanted, fitting, needed)
    return fitting
