"""The gateway: who calls, what they may do and how much, and the OpenAI API."""

from modelyard.serving.gateway.app import create_app
from modelyard.serving.gateway.audit import AuditHook, CallRecord
from modelyard.serving.gateway.settings import GatewaySettings

__all__ = ["AuditHook", "CallRecord", "GatewaySettings", "create_app"]
