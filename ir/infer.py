"""Types by fake-tensor propagation: what would this operator return, without computing it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import Argument, Target, map_arg

from planish.ir.errors import PassError
from planish.ir.program import Program


def fake_constant(program: Program, tensor: Tensor) -> Tensor:
    """A fake tensor that stands for a constant."""
    return program.fake_mode.from_tensor(tensor, static_shapes=True)


def infer(
    program: Program,
    target: Target,
    args: tuple[Argument, ...],
    kwargs: Mapping[str, Argument] | None = None,
) -> Any:  # noqa: ANN401 - a tensor, a symbolic number, or a tuple of them
    """The value ``target(*args, **kwargs)`` would have, as fake tensors.

    Args:
        program: gives the symbols.
        target: an operator or a Python function.
        args: nodes (which must have a type) and plain values.
        kwargs: likewise.

    Raises:
        PassError: the operator rejects these types.
    """

    def value(node: Node) -> Any:  # noqa: ANN401
        if "val" not in node.meta:
            raise PassError(f"{node.name} has no type yet")
        return node.meta["val"]

    fake_args = map_arg(args, value)
    fake_kwargs = map_arg(dict(kwargs or {}), value)
    mode = program.fake_mode
    shape_env = mode.shape_env
    # A rewrite must not narrow the sizes the program is legal for, so no guard is recorded; one
    # that holds for the sample only is found by the second probe.
    quiet = shape_env.suppress_guards() if shape_env is not None else nullcontext()
    try:
        with mode, quiet, torch.no_grad():
            return target(*fake_args, **fake_kwargs)  # type: ignore[operator]
    except Exception as error:  # shape functions raise RuntimeError, TypeError, IndexError, ...
        raise PassError(f"{target} rejects these operands: {error}") from error


def infer_node(program: Program, node: Node) -> Any:  # noqa: ANN401
    """Derive a node's type from its operands' types."""
    return infer(program, node.target, node.args, node.kwargs)
