"""Which function runs which step of a recipe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from modelyard.compression.recipe import Step
from modelyard.compression.workspace import Workspace


def run_step(work: Workspace, step: Step) -> Workspace:
    """The workspace after a step; only that step's module is imported."""
    runner: Callable[[Workspace, Any], Workspace]
    if step.kind == "quantize":
        from modelyard.compression.quantize import quantize as runner
    elif step.kind == "prune":
        from modelyard.compression.prune import prune as runner
    elif step.kind == "shrink":
        from modelyard.compression.shrink import shrink as runner
    elif step.kind == "distill":
        from modelyard.compression.recovery import distill as runner
    elif step.kind == "train":
        from modelyard.compression.recovery import train as runner
    elif step.kind == "factorize":
        from modelyard.compression.low_rank import factorize as runner
    elif step.kind == "merge_lora":
        from modelyard.compression.low_rank import merge_lora as runner
    else:
        from modelyard.compression.export import export as runner
    return runner(work, step)
