"""What an error at one layer's output makes of the outputs of the model.

To first order an error ``e`` of a layer's output changes the model's outputs by ``J e``. For random
``v`` of independent unit entries, ``g = J^T v`` has ``E[g g^T] = J^T J``: one backward run with
random signs at the outputs gives every layer's ``S = J^T J``, summed over positions, without
labels (Hutchinson's estimator). ``tr(S e e^T)`` is then the energy of the error at the outputs, in
one unit for all layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from planish.ir.errors import UsageError
from planish.ir.execute import evaluate, last_uses
from planish.ir.program import Program
from planish.passes.base import PassContext
from planish.passes.observe.feeding import required
from planish.passes.quantize.outputs import Padding

# Of calibration batches; more make the estimate steadier, and each costs two runs.
_PROBES = 4


def output_importance(
    program: Program, axes: Mapping[Node, int], context: PassContext, padding_mask: str = ""
) -> dict[Node, Tensor]:
    """``S`` of some values: what an error of each makes of the outputs, relative to their energy.

    Args:
        program: is not changed.
        axes: values, and the axis of each that errors are told apart along.
        context: holds the calibration, and the generator of the signs.
        padding_mask: input that is 0 for padding, whose outputs do not count, or "".

    Returns:
        float64 [n, n] each, mean over samples of the sum over positions.

    Raises:
        RequirementError: there is no calibration.
        UsageError: no output is a real number that depends on a value, or gradients are not finite.
    """
    batches = required(context.calibration)
    padding = Padding.named(program, padding_mask or None)
    found: dict[Node, Tensor] = {}
    for inputs in batches:
        leaves, outputs = _run(program, inputs, axes)
        real = [
            (o, padding.kept(inputs, o))
            for o in outputs
            if isinstance(o, Tensor) and o.is_floating_point() and o.requires_grad
        ]
        if not real:
            raise UsageError(
                "no output of real numbers depends on the layers to be factored",
                hint="aim=layer counts the error of each layer's own output",
            )
        for probe in range(_PROBES):
            total = torch.stack([_probed(o, kept, context.generator) for o, kept in real]).sum()
            gradients = torch.autograd.grad(
                total, list(leaves.values()), allow_unused=True, retain_graph=probe + 1 < _PROBES
            )
            for node, gradient in zip(leaves, gradients, strict=True):
                if gradient is None:
                    continue
                rows = gradient.movedim(axes[node], -1).flatten(0, -2).float()
                part = (rows.t() @ rows).double()
                found[node] = found[node] + part if node in found else part
    for node, axis in axes.items():
        width = int(node.meta["val"].shape[axis])
        held = found.setdefault(node, torch.zeros(width, width, dtype=torch.float64))
        if not bool(held.isfinite().all()):
            raise UsageError("gradients of the outputs are not finite", where=node)
    return {node: found[node] / (_PROBES * len(batches)) for node in axes}


def _probed(output: Tensor, kept: Tensor | None, generator: torch.Generator) -> Tensor:
    """An output along random signs, over the root of its energy."""
    if output.dtype != torch.float64:
        output = output.float()  # squares of half precision overflow soon
    signs = torch.randint(0, 2, output.shape, generator=generator).to(output.dtype) * 2 - 1
    if kept is not None:
        signs = signs * kept
        energy = (output * kept).detach().square().sum()
    else:
        energy = output.detach().square().sum()
    return (output * signs).sum() / energy.clamp(min=torch.finfo(output.dtype).tiny).sqrt()


def _run(
    program: Program, inputs: Sequence[Any], values: Mapping[Node, int]
) -> tuple[dict[Node, Tensor], list[Any]]:
    """The outputs, differentiable by something added to each value."""
    env: dict[Any, Any] = dict(zip(program.placeholders, inputs, strict=True))
    frees = last_uses(program)
    leaves: dict[Node, Tensor] = {}
    with torch.enable_grad():
        for node in program.graph.nodes:
            if node.op == "get_attr":
                env[node] = program.constants[str(node.target)]
            elif node.op == "call_function":
                env[node] = evaluate(node, env)
            elif node.op == "output":
                return leaves, list(map_arg(node.args[0], lambda n: env[n]))
            if node in values:
                leaves[node] = torch.zeros_like(env[node]).requires_grad_()
                env[node] = env[node] + leaves[node]
            for dead in frees[node]:
                env.pop(dead, None)
    raise AssertionError("a graph always ends in its output node")
