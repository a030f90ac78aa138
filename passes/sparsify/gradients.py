"""Gradients of the loss with respect to weights of a program, batch after batch.

Every labeled batch gives one gradient of each weight: batches of one sample give the empirical
Fisher matrix of the textbook, larger ones the cheaper average that Singh and Alistarh use. The
program is run as it is evaluated elsewhere (dropout gone, norms fixed); only the weights asked for
are tracked, so that a caller short of memory can ask for few at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from planish.ir.errors import PlanishError, RequirementError, UsageError
from planish.ir.execute import evaluate, last_uses
from planish.ir.program import Program
from planish.passes.base import Fact, PassContext
from planish.passes.calibrate_reading import check_inputs


def gradients(
    program: Program,
    names: Sequence[str],
    context: PassContext,
    *,
    limit: int | None = None,
    constants: Mapping[str, Tensor] | None = None,
) -> Iterator[dict[str, Tensor]]:
    """One gradient for each labeled batch.

    Args:
        program: is not changed.
        names: float constants to differentiate by; a constant with several readers gives the sum.
        context: holds ``labeled`` and ``loss``.
        limit: batches read at most; None for all.
        constants: values to use in place of the program's own.

    Yields:
        For each name a tensor of its shape, float32 or as the constant is.

    Raises:
        RequirementError: there are no labeled batches, or there is no loss.
        UsageError: a batch does not fit the program, the loss is no finite scalar or does not
            depend on the weights, or a gradient is not finite; names the batch.
    """
    labeled, loss = _required(context)
    known: dict[str, Any] = {**program.constants, **(constants or {})}
    leaves: dict[str, Tensor] = {n: known[n].detach().clone().requires_grad_() for n in names}
    known.update(leaves)
    read = 0
    for number, batch in enumerate(islice(_again(labeled), limit)):
        where = f"labeled batch {number}"
        outputs = _outputs(program, inputs_of(program, batch, where), known)
        value = _scalar(loss, outputs, batch, where)
        found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
        result = {}
        for name, gradient in zip(leaves, found, strict=True):
            if gradient is None:
                gradient = torch.zeros_like(leaves[name])
            if not bool(gradient.isfinite().all()):
                raise UsageError(
                    f"the gradient of {name} is not finite", where=where,
                    hint="look for a division by zero or an overflow in the loss or the inputs",
                )  # fmt: skip
            result[name] = gradient.detach()
        read += 1
        yield result
    if not read:
        raise UsageError("labeled gave no batch", hint="a generator can be read only once")


def count_batches(context: PassContext) -> int:
    """How many labeled batches there are; they are read through where they do not say.

    Raises:
        RequirementError: there are no labeled batches, or there is no loss.
        UsageError: labeled can be read only once, or gives no batch.
    """
    labeled, _ = _required(context)
    again = _again(labeled)
    count = len(labeled) if isinstance(labeled, Sized) else sum(1 for _ in again)
    if not count:
        raise UsageError("labeled gave no batch", hint="give batches of inputs and labels")
    return count


def _required(context: PassContext) -> tuple[Iterable[Any], Callable[[Any, Any], Tensor]]:
    labeled, loss = context.labeled, context.loss
    missing = [f.value for f, v in ((Fact.LABELS, labeled), (Fact.LOSS, loss)) if v is None]
    if labeled is None or loss is None:
        raise RequirementError("gradients of the loss are needed", hint="; ".join(missing))
    return labeled, loss


def inputs_of(program: Program, batch: object, where: str) -> tuple[Any, ...]:
    """The flat inputs of a labeled batch.

    Args:
        program: says what its inputs are.
        batch: ``(inputs, labels)``, inputs as in calibration; or a dict that holds the inputs by
            name and anything else besides.
        where: for errors.

    Raises:
        UsageError: the batch is neither, or its inputs are not what the program takes.
    """
    signature = program.signature
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(batch, Mapping):
        taken = signature.parameters or signature.input_names
        kwargs = {k: v for k, v in batch.items() if k in taken or k in signature.defaults}
    elif isinstance(batch, (tuple, list)) and len(batch) == 2:
        inputs = batch[0]
        if isinstance(inputs, Mapping):
            kwargs = dict(inputs)
        else:
            args = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    else:
        raise UsageError(
            f"a {type(batch).__name__} is no labeled batch", where=where,
            hint="give (inputs, labels), or a dict with the inputs by name and the labels",
        )  # fmt: skip
    try:
        flat = tuple(signature.flatten(args, kwargs))
        check_inputs(flat, program, where)
    except PlanishError as error:
        raise UsageError(error.what, where=where, hint=error.hint) from error
    return flat


def _again(labeled: Iterable[Any]) -> Iterator[Any]:
    """Iterate from the start.

    Raises:
        UsageError: it is an iterator, which a second pass over the data would find empty.
    """
    if iter(labeled) is labeled:
        raise UsageError(
            "labeled is a generator, which can be read only once",
            hint="give a list or a DataLoader: gradients are computed several times",
        )
    return iter(labeled)


def _outputs(program: Program, inputs: Sequence[Any], constants: Mapping[str, Any]) -> Any:  # noqa: ANN401 - the model's own structure
    """Run with gradients; the result in the structure of the model."""
    if len(inputs) != len(program.placeholders):
        raise UsageError(f"the program takes {len(program.placeholders)} inputs")
    env: dict[Any, Any] = dict(zip(program.placeholders, inputs, strict=True))
    frees = last_uses(program)
    with torch.enable_grad():
        for node in program.graph.nodes:
            if node.op == "get_attr":
                env[node] = constants[str(node.target)]
            elif node.op == "call_function":
                env[node] = evaluate(node, env)
            elif node.op == "output":
                flat = map_arg(node.args[0], lambda n: env[n])
                return pytree.tree_unflatten(list(flat), program.signature.out_spec)
            for dead in frees[node]:
                env.pop(dead, None)
    raise AssertionError("a graph always ends in its output node")


def _scalar(loss: Any, outputs: Any, batch: Any, where: str) -> Tensor:  # noqa: ANN401 - the caller's
    """The loss of one batch, ready to be differentiated."""
    with torch.enable_grad():
        value = loss(outputs, batch)
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = f"{type(value).__name__}" + (
            f" of shape {list(value.shape)}" if isinstance(value, Tensor) else ""
        )
        raise UsageError(f"loss returned a {got}, not a scalar tensor", where=where)
    if not value.requires_grad:
        raise UsageError(
            "the loss does not depend on the weights", where=where,
            hint="compute it from the outputs, without detach() or .item()",
        )  # fmt: skip
    if not bool(value.isfinite()):
        raise UsageError(f"the loss is {float(value.detach())}", where=where)
    return value.reshape(())
