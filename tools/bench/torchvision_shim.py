"""Import torchvision on a torch build that its compiled operators do not match.

torchvision registers shape rules for two of its own operators, ``nms`` and ``qnms``, the moment it is
imported. Where its compiled extension cannot be loaded (the wheel was built against another torch
build, for example the CUDA one beside a CPU torch) nobody has declared those operators, and the import
stops with "operator torchvision::nms does not exist". Declaring the two schemas is enough: the
networks of the zoo call neither, and a call to one still fails loudly for want of a kernel.
"""

import importlib
from types import ModuleType

import torch

from planish.ir.errors import RequirementError

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
# The library must outlive the import: torch drops the schemas when the object is collected.
_declared: list[torch.library.Library] = []


def import_torchvision() -> ModuleType:
    """Import torchvision, declaring its two operators first if its extension does not load.

    Raises:
        RequirementError: torchvision is not installed.
    """
    try:
        return importlib.import_module("torchvision")
    except ModuleNotFoundError as error:
        if error.name != "torchvision":
            raise
        raise RequirementError(
            "torchvision is not installed",
            hint="pip install --no-deps torchvision==0.28.0 (the release that goes with torch 2.13)",
        ) from error
    except RuntimeError as error:
        if "torchvision::" not in str(error) or _declared:
            raise
    library = torch.library.Library("torchvision", "DEF")
    for schema in _SCHEMAS:
        library.define(schema)
    _declared.append(library)
    return importlib.import_module("torchvision")
