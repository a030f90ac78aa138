"""Types by fake-tensor propagation: what would this operator return, without computing it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node
from torch.fx.node import Argument, Target, map_arg

from planish.ir.errors import PassError
from planish.ir.program import Program


def fake_constant(program: Program, tensor: Tensor) -> Tensor:
    """A fake tensor that stands for a constant."""
    mode = program.fake_mode
    if type(tensor) is not Tensor or tensor.layout is not torch.strided:
        return mode.from_tensor(tensor, static_shapes=True)
    # What from_tensor does for a plain tensor, at a tenth of the time: passes make thousands.
    empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return FakeTensor(mode, empty, tensor.device)


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
        body = program.constants.get(str(node.target)) if node.op == "get_attr" else None
        if isinstance(body, GraphModule):
            return body  # of a branch
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
    function = _SHAPE_RULES.get(target, target)
    try:
        # Without the Python dispatcher, operators whose C++ kernels take plain integers (addcmul)
        # reject symbolic sizes. Tracing has it on too, and it costs nothing measurable.
        with mode, quiet, torch.no_grad(), enable_python_dispatcher():
            return function(*fake_args, **fake_kwargs)  # type: ignore[operator]
    except Exception as error:  # shape functions raise RuntimeError, TypeError, IndexError, ...
        raise PassError(f"{target} rejects these operands: {reason(error)}") from error


def reason(error: Exception) -> str:
    """What an error of torch says, without the C++ frames that it may carry."""
    return str(error).partition("\nException raised from")[0].strip() or type(error).__name__


def infer_node(program: Program, node: Node) -> Any:  # noqa: ANN401
    """Derive a node's type from its operands' types."""
    return infer(program, node.target, node.args, node.kwargs)


def _recurrent(
    x: Tensor,
    hx: Tensor | Sequence[Tensor],
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    """Types of ``lstm``, ``gru`` and ``rnn``, whose kernels reject symbolic sizes.

    ``x: [T, B, I]`` (``[B, T, I]`` where ``batch_first``), states ``[layers * D, B, H]`` ->
    ``[T, B, D * H]`` and the states, D being the number of directions.
    """
    states = [hx] if isinstance(hx, Tensor) else list(hx)
    if x.shape[-1] != params[0].shape[-1]:
        raise ValueError(f"{x.shape[-1]} features for weights of {params[0].shape[-1]}")
    time, batch = (x.shape[1], x.shape[0]) if batch_first else (x.shape[0], x.shape[1])
    features = states[0].shape[-1] * (2 if bidirectional else 1)
    out = x.new_empty((time, batch, features))
    return (out.transpose(0, 1) if batch_first else out, *(s.new_empty(s.shape) for s in states))


_SHAPE_RULES: dict[Target, Callable[..., Any]] = {
    torch.ops.aten.lstm.input: _recurrent,
    torch.ops.aten.gru.input: _recurrent,
    torch.ops.aten.rnn_tanh.input: _recurrent,
    torch.ops.aten.rnn_relu.input: _recurrent,
}
