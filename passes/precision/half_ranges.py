"""Which operators can compute in a 16-bit format: what they hold, measured on real inputs.

One streamed sweep gives the largest magnitude of every value; on its first batch every operator is
also tried in the format, fed with the values of the float program, so that what overflows on the
way (a sum of squares, say) is found and not only what overflows in the end.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from planish.ir.execute import evaluate, last_uses
from planish.ir.ops import aten, is_op, is_view
from planish.ir.program import Program

# Sums and exponentials, which lose what matters: the float32 islands of every mixed precision.
_PRECISE = frozenset(
    {
        aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten._log_softmax.default,
        aten.layer_norm.default, aten.native_layer_norm.default, aten.rms_norm.default,
        aten.group_norm.default, aten.instance_norm.default, aten.batch_norm.default,
        aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim, aten.logsumexp.default,
        aten.cumsum.default, aten.cumprod.default, aten.prod.default, aten.exp.default,
        aten.var.correction, aten.std.correction, aten.var_mean.correction,
    }
)  # fmt: skip
# Sums, which are exact enough where they are short.
_SUMS = frozenset({aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim})
_MOVES = frozenset({aten.contiguous.default, aten.clone.default, aten.reshape.default})
CONVERSIONS = (aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default)
_LONG_SUM = 1024  # elements; a float16 sum of more may lose a whole addend


def moves(node: Node) -> bool:
    """Whether an operator only moves values around, which every format does alike."""
    if node.target is operator.getitem:
        return True
    if is_op(node, *CONVERSIONS):
        return False
    return node.op == "call_function" and (node.target in _MOVES or is_view(node.target))


def real_inputs(node: Node) -> list[Node]:
    """The float32 tensors that an operator reads."""
    return [n for n in node.all_input_nodes if is_real(n.meta.get("val"))]


def is_real(value: object) -> bool:
    """Whether a value is a float32 tensor, or a tuple of nothing else."""
    if isinstance(value, (tuple, list)):
        return bool(value) and all(is_real(part) for part in value)
    return isinstance(value, Tensor) and value.dtype is torch.float32


@dataclass
class Ranges:
    """What the sweep found.

    Attributes:
        peak: node -> largest magnitude, numbers at the edge of float32 left out.
        edge: nodes with infinities, or numbers at the edge of float32: masks.
        trouble: node -> why it cannot compute in the format, from the trial.
    """

    peak: dict[Node, float] = field(default_factory=dict)
    edge: set[Node] = field(default_factory=set)
    trouble: dict[Node, str] = field(default_factory=dict)

    def note(self, node: Node, value: object) -> None:
        """Take in one value of a node."""
        if isinstance(value, (tuple, list)):
            for part in value:
                self.note(node, part)
            return
        if not isinstance(value, Tensor) or not value.is_floating_point() or not value.numel():
            return
        size = value.detach().abs()
        usual = size < 0.99 * torch.finfo(value.dtype).max
        if not bool(usual.all()):
            self.edge.add(node)
            size = torch.where(usual, size, 0.0)
        self.peak[node] = max(self.peak.get(node, 0.0), float(size.max()))


def measure_ranges(
    program: Program,
    batches: Iterable[tuple[Any, ...]],
    candidates: Collection[Node],
    dtype: torch.dtype,
) -> Ranges:
    """Run the float program on all batches; try the candidates on the first.

    Args:
        program: in float32.
        batches: flat inputs.
        candidates: operators that might compute in the format.
        dtype: the format.

    Raises:
        PassError: an operator of the program itself fails; names it.
    """
    found = Ranges()
    frees = last_uses(program)
    with torch.no_grad():
        for number, inputs in enumerate(batches):
            env: dict[Node, Any] = dict(zip(program.placeholders, inputs, strict=True))
            for node, value in env.items():
                found.note(node, value)
            for node in program.graph.nodes:
                if node.op == "get_attr":
                    env[node] = program.constants[str(node.target)]
                    found.note(node, env[node])
                elif node.op == "call_function":
                    env[node] = evaluate(node, env)
                    found.note(node, env[node])
                    if not number and node in candidates:
                        _try(found, node, env, dtype)
                for dead in frees[node]:
                    env.pop(dead, None)
    return found


def _try(found: Ranges, node: Node, env: Mapping[Node, Any], dtype: torch.dtype) -> None:
    """Compute one operator in the format, fed with what the float program has."""

    def lowered(n: Node) -> Any:  # noqa: ANN401 - whatever it is
        return saturated(env[n], dtype) if is_real(n.meta.get("val")) else env[n]

    args: Any = map_arg(node.args, lowered)
    kwargs: Any = map_arg(node.kwargs, lowered)
    try:
        result = node.target(*args, **kwargs)  # type: ignore[operator]  # an operator
    except (RuntimeError, NotImplementedError, TypeError, ValueError, OverflowError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        found.trouble[node] = f"torch does not compute it in {_name(dtype)}: {first[:120]}"
        return
    for wanted, got in zip(_leaves(env[node]), _leaves(result), strict=True):
        if not isinstance(got, Tensor) or got.dtype is not dtype:
            found.trouble[node] = "its result has a type of its own"
        elif bool((wanted.isfinite() & ~got.isfinite() & ~_at_edge(wanted)).any()):
            found.trouble[node] = f"it overflows {_name(dtype)} on the way"


def saturated(value: Any, dtype: torch.dtype) -> Any:  # noqa: ANN401 - a tensor or a tuple of them
    """A float32 value in the format; masks end at its largest number and not in infinity."""
    if isinstance(value, (tuple, list)):
        return type(value)(saturated(part, dtype) for part in value)
    limit = torch.finfo(dtype).max
    return value.clamp(-limit, limit).to(dtype) if bool(_at_edge(value).any()) else value.to(dtype)


def _at_edge(value: Tensor) -> Tensor:
    return value.abs() >= 0.99 * torch.finfo(value.dtype).max


def _leaves(value: object) -> list[Any]:
    return [*value] if isinstance(value, (tuple, list)) else [value]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def is_imprecise(node: Node) -> str | None:
    """Why an operator needs float32 whatever its range; None where it does not."""
    if is_op(node, *_PRECISE):
        return "it sums or exponentiates what 10 bits cannot hold"
    if is_op(node, *_SUMS):
        source = node.args[0]
        elements = _elements(source) // max(1, _elements(node))
        if elements > _LONG_SUM:
            return f"it sums {elements} elements"
    return None


def _elements(node: object) -> int:
    value = node.meta.get("val") if isinstance(node, Node) else None
    if not isinstance(value, Tensor):
        return 1
    return math.prod(map(_hint, value.shape))


def _hint(size: Any) -> int:  # noqa: ANN401 - an integer, perhaps symbolic
    """The size at the sample."""
    if isinstance(size, int):
        return size
    hint = size.node.hint
    return int(hint) if hint is not None else 1
