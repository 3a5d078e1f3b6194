"""What runs tell about themselves."""

from modelyard.observability.tracking import Tracker

__all__ = ["Tracker"]
