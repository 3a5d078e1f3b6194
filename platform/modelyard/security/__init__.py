"""Who calls, what they may do, and how that is proved."""

from modelyard.security.callers import Caller
from modelyard.security.keys import KeyStore, TokenQuota
from modelyard.security.tokens import TokenIssuer, TokenVerifier

__all__ = ["Caller", "KeyStore", "TokenIssuer", "TokenQuota", "TokenVerifier"]
