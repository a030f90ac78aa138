"""planish: a compiler that optimizes PyTorch models and checks every step.

result = planish.optimize(model, example_inputs)
print(result.report)
result.export("model.onnx")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if __name__ != "planish":
    raise ImportError(f"import this package as 'planish', not as {__name__!r}")

__version__ = "0.1.0"

if TYPE_CHECKING:
    from planish.api import optimize
    from planish.ir.errors import (
        CaptureError,
        ExportError,
        PassError,
        PlanishError,
        RecipeError,
        RequirementError,
        UnsupportedError,
        UsageError,
        VerificationError,
    )
    from planish.ir.program import Program
    from planish.optimized import Optimized
    from planish.passes.recipe import Recipe
    from planish.recall import recall_report
    from planish.report import Report

# Imported on first use: torch.export alone costs more than everything else here together.
_HOMES = {
    "optimize": "planish.api",
    "Optimized": "planish.optimized",
    "Program": "planish.ir.program",
    "Recipe": "planish.passes.recipe",
    "recall_report": "planish.recall",
    "Report": "planish.report",
    **dict.fromkeys(
        (
            "CaptureError",
            "ExportError",
            "PassError",
            "PlanishError",
            "RecipeError",
            "RequirementError",
            "UnsupportedError",
            "UsageError",
            "VerificationError",
        ),
        "planish.ir.errors",
    ),
}

__all__ = [
    "CaptureError",
    "ExportError",
    "Optimized",
    "PassError",
    "PlanishError",
    "Program",
    "Recipe",
    "RecipeError",
    "Report",
    "RequirementError",
    "UnsupportedError",
    "UsageError",
    "VerificationError",
    "optimize",
    "recall_report",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - every public object
    if name not in _HOMES:
        raise AttributeError(f"module 'planish' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
