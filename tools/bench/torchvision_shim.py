"""Import torchvision and timm, on a torch that torchvision's compiled part may not match.

torchvision registers shape rules for two of its own operators, ``nms`` and ``qnms``, when it is
imported. Where its compiled extension cannot be loaded (the wheel was built against another torch
build, for example the CUDA one beside a CPU torch) nobody has declared them, and the import stops
with "operator torchvision::nms does not exist". Declaring the two schemas is enough: the networks
of the zoo call neither, and a call to one still fails loudly for want of a kernel.

Both packages may also lie where ``fetch.py`` unpacked them. Keeping them out of the environment
matters: transformers imports an installed torchvision by itself, and fails where that import fails.
"""

import importlib
import importlib.util
import sys
from types import ModuleType

import torch

from planish.tools.bench.fetch import locate

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
# The library must outlive the import: torch drops the schemas when the object is collected.
_declared: list[torch.library.Library] = []


def import_torchvision() -> ModuleType:
    """Import torchvision, declaring its two operators first if its extension does not load.

    Raises:
        RequirementError: torchvision is neither installed nor fetched.
    """
    _make_importable("torchvision")
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error) or _declared:
            raise
    library = torch.library.Library("torchvision", "DEF")
    for schema in _SCHEMAS:
        library.define(schema)
    _declared.append(library)
    return importlib.import_module("torchvision")


def import_timm() -> ModuleType:
    """Import timm, and torchvision before it.

    Raises:
        RequirementError: timm or torchvision is neither installed nor fetched.
    """
    import_torchvision()
    _make_importable("timm")
    return importlib.import_module("timm")


def _make_importable(name: str) -> None:
    """Put the fetched package at the end of the path unless the module can be found already."""
    if importlib.util.find_spec(name) is None:
        sys.path.append(str(locate(name, name).parent))
