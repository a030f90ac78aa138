"""What quantizing one operator alone does to the outputs, for all operators in one sweep.

Quantizing operator i moves its output by ``d_i = q_i(x) - f_i(x)``, both fed with the values of
the program in floating point. To first order that moves the outputs ``y`` by ``J_i d_i``, where
``J_i`` is the derivative of ``y`` by the operator's output. For random signs ``r``

    E_r <J_i^T r, d_i>^2 = ||J_i d_i||^2

(Hutchinson), and ``J_i^T r`` is what one backward pass gives for all operators at once. So a batch
costs one forward pass and ``projections`` backward ones, whatever the number of operators. Each
output is scaled to unit energy first, so that

    output_db_i = -10 log10( mean over batches and r of <J_i^T r, d_i>^2 )

is an estimate of the signal to noise at the outputs. ``one_by_one.alone`` measures the same, by one
run of the program for each operator with nothing else quantized; the tests hold one against the
other.

Noise of several operators adds up as energies only while it is small and independent; so the
estimate ranks operators, and what is decided by the rank is measured.

Sources: Hutchinson, "A stochastic estimator of the trace of the influence matrix", Communications
in Statistics 1990; Dong et al., "HAWQ-V2", NeurIPS 2020 (layers ranked by measured sensitivity).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from planish.ir.execute import evaluate
from planish.ir.operators import rotary_embedding
from planish.ir.program import Program
from planish.passes.base import OperatorError
from planish.passes.quantize.one_by_one import Sums, fed, ranked
from planish.passes.quantize.outputs import Batch, Padding

# Operators of planish's own that torch cannot derive, as functions that it can.
_DERIVABLE: Mapping[Any, Callable[..., Any]] = {
    torch.ops.planish.rotary_embedding.default: rotary_embedding,
}


class NotDerivableError(Exception):
    """Outputs depend on an operator through one that has no derivative: use ``alone``."""


def sensitivities(
    floating: Program,
    quantized: Program,
    names: Sequence[str],
    batches: Iterable[Batch],
    *,
    generator: torch.Generator,
    padding: Padding = Padding(),  # noqa: B008 - frozen
    projections: int = 4,
    independent_rows: bool = False,
) -> tuple[OperatorError, ...]:
    """Estimate the output error of every operator in one sweep.

    Args:
        floating: the program with these operators in floating point, all of the same names.
        quantized: the quantized program.
        names: which operators.
        batches: flat inputs.
        generator: draws the signs.
        padding: what does not count in the outputs.
        projections: backward passes for each batch.
        independent_rows: take the moves of different rows (all but the last axis) as independent:
            squares are added up row by row, so that few projections give a steady estimate. It
            leaves out what all rows have in common.

    Returns:
        One entry per operator, the worst first.

    Raises:
        NotDerivableError: no derivative reaches an operator that the outputs depend on.
    """
    nodes = {node.name: node for node in quantized.operators if node.name in set(names)}
    sums = {name: Sums() for name in nodes}
    for inputs in batches:
        _sweep(
            floating, quantized, nodes, sums, inputs, generator, padding, projections,
            independent_rows,
        )  # fmt: skip
    return ranked(nodes, sums)


def _sweep(
    floating: Program,
    quantized: Program,
    nodes: Mapping[str, Node],
    sums: Mapping[str, Sums],
    inputs: Batch,
    generator: torch.Generator,
    padding: Padding,
    projections: int,
    independent_rows: bool,
) -> None:
    """One batch: forward, keeping what the backward passes need, and those."""
    roots: list[tuple[str, Tensor, Tensor]] = []  # operator, (part of) its value, its move
    values: dict[str, Any] = {}

    def take(node: Node, value: Any) -> Any:  # noqa: ANN401 - as the operator gives
        values[node.name] = _like(value, [_plain(part) for part in _parts(value)])
        if node.name not in nodes:
            return value
        parts = [_root(part) for part in _parts(value)]
        moved = fed(quantized, nodes[node.name], values)
        sums[node.name].own.add(values[node.name], moved)
        for part, new in zip(parts, _parts(moved), strict=True):
            roots.append((node.name, part, new.to(part.dtype) - part.detach()))
        return _like(value, parts)

    with torch.enable_grad():
        outputs = _derivable_run(floating, inputs, take, values)
        for number in range(projections):
            total = _projection(inputs, outputs, padding, generator)
            gradients = torch.autograd.grad(
                total,
                [root for _, root, _ in roots],
                retain_graph=number < projections - 1,
                allow_unused=True,
            )
            found: dict[str, Tensor] = {}
            for (name, _, move), gradient in zip(roots, gradients, strict=True):
                if gradient is not None:
                    product = gradient.double() * move.double()
                    along = product.sum(-1) if independent_rows else product.sum()
                    found[name] = found[name] + along if name in found else along
            for name in nodes:
                noise = float(found[name].square().sum()) if name in found else 0.0
                if not math.isfinite(noise):
                    raise NotDerivableError
                sums[name].noise += noise
                sums[name].count += 1


def _derivable_run(
    program: Program,
    inputs: Batch,
    take: Callable[[Node, Any], Any],
    values: dict[str, Any],
) -> list[Any]:
    """Run with derivatives; ``take`` sees every value and may exchange it.

    Raises:
        NotDerivableError: derivatives go into an operator and do not come out.
    """
    env: dict[Node, Any] = dict(zip(program.placeholders, inputs, strict=True))
    values.update({node.name: value for node, value in env.items()})
    for node in program.graph.nodes:
        if node.op == "get_attr":
            env[node] = values[node.name] = program.constants[str(node.target)]
        elif node.op == "call_function":
            function = _DERIVABLE.get(node.target)
            if function is not None:
                args, kwargs = map_arg((node.args, node.kwargs), lambda n: env[n])
                value = function(*args, **kwargs)
            else:
                value = evaluate(node, env)
                entered = any(_derives(env[n]) for n in node.all_input_nodes)
                if entered and getattr(node.target, "namespace", "aten") == "planish":
                    raise NotDerivableError
            env[node] = take(node, value)
    return [env[r] if isinstance(r, Node) else r for r in program.results]


def _projection(
    inputs: Batch, outputs: Sequence[Any], padding: Padding, generator: torch.Generator
) -> Tensor:
    """All outputs, each of unit energy, times random signs.

    Raises:
        NotDerivableError: no output has a derivative.
    """
    total: Tensor | None = None
    for output in outputs:
        if not _derives(output):
            continue
        usual = output.detach().abs() < 0.99 * torch.finfo(output.dtype).max
        mask = padding.kept(inputs, output)
        if mask is not None:
            usual &= mask
        kept = torch.where(usual, output, torch.zeros_like(output))
        scale = float(kept.detach().double().pow(2).sum()) ** 0.5
        if scale > 0.0:
            signs = torch.randint(0, 2, output.shape, generator=generator, dtype=torch.int8)
            part = (kept * (2 * signs - 1)).sum() / scale
            total = part if total is None else total + part
    if total is None:
        raise NotDerivableError
    return total


def _parts(value: Any) -> list[Any]:  # noqa: ANN401 - as the operator gives
    return list(value) if isinstance(value, (tuple, list)) else [value]


def _like(value: Any, parts: list[Any]) -> Any:  # noqa: ANN401 - as the operator gives
    return tuple(parts) if isinstance(value, (tuple, list)) else parts[0]


def _plain(value: Any) -> Any:  # noqa: ANN401 - as the operator gives
    return value.detach() if isinstance(value, Tensor) else value


def _derives(value: object) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _root(value: Any) -> Any:  # noqa: ANN401 - as the operator gives
    """A value that derivatives are taken by."""
    if isinstance(value, Tensor) and value.is_floating_point() and not value.requires_grad:
        return value.detach().requires_grad_()
    return value
