"""Choose between equal forms of an operator for ONNX Runtime, by measurement.

Which form is faster is a fact of the runtime and the machine, and folklore about it is often
wrong: ONNX Runtime 1.32 fuses Add and LayerNormalization into a kernel that takes four times as
long as both. So each choice that a program meets is measured once per machine and runtime, and
kept in the user's cache. An alternative must win by a margin; within it the default stays, so
that noise does not change files. The choices made are recorded in the artifact and the recipe,
and replayed from there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

import planish.ir.operators  # noqa: F401 - registers torch.ops.planish
from planish.backends.base import ExportOptions
from planish.ir.errors import RecipeError
from planish.ir.ops import is_op
from planish.ir.program import Program

if TYPE_CHECKING:
    from planish.backends.onnx_view import Style

aten = torch.ops.aten


@dataclass(frozen=True)
class Choice:
    """A decision between two forms.

    Attributes:
        name: as recipes write it.
        default: taken where neither wins.
        alternative: taken where it is faster by the margin.
        operators: the choice matters to programs that have one of these.
        opset: the default needs this operator set version; below, the alternative is taken.
    """

    name: str
    default: str
    alternative: str
    operators: tuple[Any, ...]
    opset: int = 0


CHOICES: tuple[Choice, ...] = (
    Choice("residual", "sum", "add", (aten.layer_norm.default, aten.rms_norm.default)),
    Choice("linear", "gemm", "matmul", (aten.linear.default,)),
    Choice(
        "attention", "operator", "matmul", (aten.scaled_dot_product_attention.default,), opset=23
    ),
    Choice("rms-norm", "operator", "primitives", (aten.rms_norm.default,), opset=23),
    Choice(
        "rotary", "operator", "primitives", (torch.ops.planish.rotary_embedding.default,), opset=23
    ),
)


def choose(program: Program, opset: int, options: ExportOptions) -> tuple[Style, Mapping[str, str]]:
    """The forms to emit a program in.

    Args:
        program: which operators it has decides which choices are to be made.
        opset: what the file may contain.
        options: ``choices`` to replay, and ``remark``.

    Returns:
        The style, and the choices to record.

    Raises:
        RecipeError: a choice to be replayed does not exist.
    """
    from planish.backends.onnx_view import Style

    replayed = _validated(options.choices or {})
    met = [c for c in CHOICES if any(is_op(n, *c.operators) for n in program.graph.nodes)]
    taken: dict[str, str] = {}
    for choice in met:
        wanted = replayed.get(choice.name)
        if opset < choice.opset:
            if wanted == choice.default:
                options.remark(
                    f"choice {choice.name}={wanted} needs opset {choice.opset}; "
                    f"{choice.alternative} is used with opset {opset}"
                )
            taken[choice.name] = choice.alternative
        elif wanted is not None:
            taken[choice.name] = wanted
        else:
            taken[choice.name] = _measured(choice, options)
    fields = {name.replace("-", "_"): value for name, value in taken.items()}
    return Style(**fields, integers="onnxruntime"), taken


def _measured(choice: Choice, options: ExportOptions) -> str:
    from planish.backends.ort_measure import speed_of_alternative, wins

    ratio = speed_of_alternative(choice.name, options.remark)
    return choice.alternative if wins(ratio) else choice.default


def _validated(choices: Mapping[str, str]) -> Mapping[str, str]:
    known = {c.name: (c.default, c.alternative) for c in CHOICES}
    for name, value in choices.items():
        if name not in known:
            raise RecipeError(
                f"there is no lowering choice {name!r} for onnxruntime-cpu",
                hint="known: " + ", ".join(known),
            )
        if value not in known[name]:
            raise RecipeError(
                f"lowering choice {name!r} cannot be {value!r}",
                hint="use " + " or ".join(known[name]),
            )
    return choices
