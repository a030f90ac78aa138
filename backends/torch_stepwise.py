"""Hold a lowered quantized program to its origin one operator at a time.

As ``planish.backends.stepwise`` does for ONNX files: each operator of the program is computed in
its own meaning from the values that the kernels made of its operands (or, where these were fused
away, from what they are in turn computed from). Integers may differ by one step, real numbers by
the bound of their type.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from planish.backends.base import Stepwise
from planish.backends.torch_grids import expect_quantized_tensors
from planish.backends.torch_lowering import Lowered
from planish.ir.compare import BOUNDS, SMALLEST_SCALE
from planish.ir.errors import ExportError
from planish.ir.execute import evaluate
from planish.ir.infer import reason
from planish.ir.ops import is_pure_call
from planish.ir.program import Program

_STEPS = 1


def run_lowered(lowered: Lowered, inputs: Sequence[Any]) -> dict[Node, Any]:
    """All values of the lowered graph on flat inputs.

    Raises:
        ExportError: a kernel fails on its operands; names the operator.
    """
    expect_quantized_tensors()
    rest, values = iter(inputs), {}
    with torch.no_grad():
        for node in lowered.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(rest)
            elif node.op == "get_attr":
                values[node] = lowered.constants[str(node.target)]
            elif node.op == "call_function":
                args, kwargs = (map_arg(a, lambda n: values[n]) for a in (node.args, node.kwargs))
                try:
                    values[node] = node.target(*args, **kwargs)
                except RuntimeError as error:
                    raise ExportError(
                        f"the kernel fails: {reason(error)}",
                        where=node,
                        hint="this is a defect of planish: report it with the model",
                    ) from error
    return values


def stepwise(lowered: Lowered, probes: Sequence[tuple[str, Sequence[Any]]]) -> Stepwise:
    """Compare every operator that has a value of its own in the lowered graph.

    Operators that draw at random are left out: they give something else every time.

    Raises:
        ExportError: one differs by more than a step; names it.
    """
    steps, relative, compared = 0, 0.0, 0
    unchecked = tuple(n.name for n in lowered.program.operators if not is_pure_call(n))
    for label, inputs in probes:
        values = run_lowered(lowered, inputs)
        known: dict[Node, Any] = dict(zip(lowered.program.placeholders, inputs, strict=True))
        for node, made in lowered.origins.items():
            if isinstance(made, Node) and made in values and node.op == "call_function":
                known[node] = values[made]
        compared = 0
        for node in lowered.program.operators:
            if node not in known or not isinstance(known[node], Tensor) or not is_pure_call(node):
                continue
            env = {n: _reference(n, known, lowered) for n in node.all_input_nodes}
            try:
                step, rel = _compare(node, evaluate(node, env), known[node], label)
            except ExportError as error:
                raise ExportError(error.what, where=node, hint=_advice(lowered.program)) from error
            steps, relative, compared = max(steps, step), max(relative, rel), compared + 1
    return Stepwise(
        probes=tuple(label for label, _ in probes),
        values=compared,
        unchecked=unchecked,
        max_steps=steps,
        max_relative=relative,
    )


def _reference(node: Node, known: Mapping[Node, Any], lowered: Lowered) -> Any:  # noqa: ANN401
    """A node's value from those that the kernels made."""
    if node in known:
        return known[node]
    if node.op == "get_attr":
        return lowered.program.constants[str(node.target)]
    return evaluate(node, {n: _reference(n, known, lowered) for n in node.all_input_nodes})


def _compare(node: Node, expected: Tensor, found: Tensor, label: str) -> tuple[int, float]:
    if expected.shape != found.shape or expected.dtype != found.dtype:
        raise ExportError(
            f"the kernel makes {found.dtype} {list(found.shape)} of {expected.dtype} "
            f"{list(expected.shape)}",
            where=node,
        )
    if not expected.numel():
        return 0, 0.0
    if not expected.is_floating_point():
        step = int((expected.long() - found.long()).abs().max())
        if step > _STEPS:
            raise ExportError(f"the kernel is {step} steps off ({label})", where=node)
        return step, 0.0
    error = (expected - found).abs()
    finite = torch.nan_to_num(error, nan=0.0 if torch.equal(expected, found) else float("inf"))
    scale = max(float(expected.abs().max()), SMALLEST_SCALE)
    relative = float(finite.max()) / scale
    if relative > BOUNDS.get(expected.dtype, 0.0):
        raise ExportError(
            f"the kernel differs by {relative:.1e} of the largest ({label})", where=node
        )
    return 0, relative


def _advice(program: Program) -> str:
    from planish.passes.quantize.saturation import saturating_operators

    if saturating_operators(program) and saturates_here():
        return (
            "this processor adds pairs of uint8 * int8 in 16 bits: quantize with "
            "saturation=reduced, or export on one with VNNI for such ones"
        )
    return "this is a defect of planish or of torch: report it with the model"


def saturates_here() -> bool:
    """Whether oneDNN's integer kernels add pairs of products in 16 bits on this processor."""
    size = 64
    x = torch.full((size, size), 255, dtype=torch.uint8)
    weight = torch.full((size, size), 127, dtype=torch.int8)
    ones, zeros = torch.ones(size), torch.zeros(size, dtype=torch.int32)
    packed = torch.ops.onednn.qlinear_prepack(weight, None)
    product = torch.ops.onednn.qlinear_pointwise(
        x, 1.0, 0, packed, ones, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return float(product.max()) < 255 * 127 * size
