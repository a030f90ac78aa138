"""The hand-written family of the sweep: what real models do, one thing at a time."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from planish.tools.bench import zoo_operators as operators
from planish.tools.bench import zoo_signatures as signatures
from planish.tools.bench.zoo import (
    DynamicShapes,
    Inputs,
    ZooEntry,
    integers,
    normal,
    padding_mask,
    seeded,
)

_B = Dim("batch", min=1, max=16)
_T = Dim("length", min=2, max=32)


def _entry(
    name: str,
    constructor: Callable[[], nn.Module],
    inputs: Callable[[], Inputs],
    dynamic_shapes: DynamicShapes | None = None,
) -> ZooEntry:
    return ZooEntry(
        name=f"small/{name}",
        family="small",
        build=seeded(constructor),
        inputs=inputs,
        dynamic_shapes=dynamic_shapes,
    )


def _args(*args: object, **kwargs: object) -> Callable[[], Inputs]:
    """The arguments as given; a callable among them is called each time, so samples are fresh."""

    def make(value: object) -> Any:  # noqa: ANN401 - samples hold whatever a model takes
        return pytree.tree_map(lambda leaf: leaf() if callable(leaf) else leaf, value)

    return lambda: (make(args), make(kwargs))


def _n(*shape: int, seed: int = 20) -> Callable[[], Tensor]:
    return lambda: normal(*shape, seed=seed)


def _i(high: int, *shape: int) -> Callable[[], Tensor]:
    return lambda: integers(high, *shape)


_ROWS: Mapping[int, Any] = {0: _B}
_ROWS_AND_STEPS: Mapping[int, Any] = {0: _B, 1: _T}


_ONE: DynamicShapes = (_ROWS,)
_STEPS: DynamicShapes = (_ROWS_AND_STEPS,)

_ENTRIES = (
    _entry(
        "dict-input",
        signatures.DictInput,
        _args({"left": _n(3, 8), "right": _n(3, 4, seed=21)}),
        ({"left": _ROWS, "right": _ROWS},),
    ),
    _entry(
        "nested-tuples", signatures.NestedTuples, _args((_n(2, 6), [_n(2, 6), _n(2, 6, seed=21)]))
    ),
    _entry("dataclass-output", signatures.DataclassOutput, _args(_n(2, 3, 8, 8)), _ONE),
    _entry(
        "keyword-only",
        signatures.KeywordOnly,
        _args(values=_n(2, 5, 8), weights=lambda: normal(2, 5, 1).abs()),
        {"values": _ROWS_AND_STEPS, "weights": _ROWS_AND_STEPS},
    ),
    _entry("optional-none", signatures.OptionalInputs, _args(_i(20, 2, 6), None, bias=_n(8))),
    _entry("python-constants", signatures.PythonConstants, _args(_n(2, 8), 0.5, 2, True, "sum")),
    _entry("in-place", signatures.InPlace, _args(_n(2, 3, 6, 6)), _ONE),
    _entry("tied-weights", signatures.TiedWeights, _args(_i(30, 2, 5)), _STEPS),
    _entry("shared-layer", signatures.SharedLayer, _args(_n(3, 8)), _ONE),
    _entry("buffers", signatures.Buffers, _args(_i(10, 4)), _ONE),
    _entry("recurrent", signatures.Recurrent, _args(_n(2, 5, 6)), _ONE),
    _entry(
        "lstm-with-state",
        signatures.LstmWithState,
        _args(_n(5, 2, 6), (_n(1, 2, 8), _n(1, 2, 8, seed=21))),
    ),
    _entry("conditional", signatures.Conditional, _args(_n(2, 4))),
    _entry("einsum", operators.Einsum, _args(_n(2, 5, 8)), _STEPS),
    _entry(
        "hand-attention",
        operators.HandAttention,
        _args(_n(2, 6, 16), lambda: padding_mask(2, 6)),
        (_ROWS_AND_STEPS, _ROWS_AND_STEPS),
    ),
    _entry("where-and-mask", operators.WhereAndMask, _args(_n(3, 8)), _ONE),
    _entry("integer-outputs", operators.IntegerOutputs, _args(_n(3, 8)), _ONE),
    _entry("same-output-twice", operators.SameOutputTwice, _args(_n(2, 4)), _ONE),
    _entry("constant-output", operators.ConstantOutput, _args(_n(2, 4))),
    _entry("unused-input", operators.UnusedInput, _args(_n(2, 4), _n(3))),
    _entry("bags", operators.Bags, _args(_i(20, 3, 4)), _ONE),
    _entry("upsampler", operators.Upsampler, _args(_n(1, 4, 5, 5))),
    _entry("convolutions-1d", operators.Convolutions1d, _args(_n(2, 4, 16)), _ONE),
    _entry("convolutions-3d", operators.Convolutions3d, _args(_n(1, 2, 4, 4, 4))),
    _entry("norms", operators.Norms, _args(_n(2, 8, 6, 6)), _ONE),
    _entry("gated", operators.Gated, _args(_n(2, 5, 8)), _STEPS),
    _entry("shape-arithmetic", operators.ShapeArithmetic, _args(_n(2, 5, 6)), _STEPS),
    _entry("reshape-chains", operators.ReshapeChains, _args(_n(2, 5, 8)), _STEPS),
    _entry("casts", operators.Casts, _args(_n(2, 6)), _ONE),
    _entry("scalar-input", operators.ScalarInput, _args(_n(2, 4), lambda: torch.tensor(0.7))),
    _entry("linear-stack", operators.LinearStack, _args(_n(3, 16)), _ONE),
    _entry("residuals", operators.Residuals, _args(_n(2, 3, 8, 8)), _ONE),
    # A sample of size 1 in a dynamic dimension, which torch.export alone would specialize.
    _entry("batch-of-one", operators.Residuals, _args(_n(1, 3, 8, 8)), _ONE),
)


def entries() -> tuple[ZooEntry, ...]:
    """The hand-written family."""
    return _ENTRIES
