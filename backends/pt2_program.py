"""A lowered program as ``torch.export.ExportedProgram``: every value typed, every pytree plain."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from planish.backends.torch_lowering import PACK, Lowered
from planish.ir.exported import to_exported_program
from planish.ir.infer import fake_constant, infer
from planish.ir.program import Program, Signature
from planish.ir.trees import child_keys

_KEPT = (tuple, list, dict, OrderedDict)


def exported_program(lowered: Lowered, remark: Callable[[str], None]) -> ExportedProgram:
    """A lowered program in torch's own container; shares its constants.

    Args:
        lowered: made with ``exportable``.
        remark: told what changes its form.

    Raises:
        UnsupportedError: a node has a type that an exported program cannot hold.
    """
    for node in lowered.graph.nodes:
        _give_type(lowered, node)
    program = Program(
        lowered.graph,
        dict(lowered.constants),
        _plain(lowered.program.signature, remark),
        lowered.program.samples[:1],
    )
    return to_exported_program(program)


def _give_type(lowered: Lowered, node: Node) -> None:
    """Note a node's type: that of what it stands for in the program, or else derived."""
    if node.op == "placeholder":
        node.meta["val"] = lowered.types[node]
    elif node.op == "get_attr":
        held = lowered.constants[str(node.target)]
        if not isinstance(held, GraphModule):
            node.meta["val"] = fake_constant(lowered.program, held)
    elif node.op == "call_function":
        known = lowered.types.get(node)
        if known is None:
            known = _packed(lowered, node) if _is_opaque(node) else _inferred(lowered, node)
        node.meta["val"] = known


def _inferred(lowered: Lowered, node: Node) -> Any:  # noqa: ANN401 - whatever it returns
    return infer(lowered.program, node.target, node.args, node.kwargs)


def _is_opaque(node: Node) -> bool:
    """Whether a node brings a weight into a kernel's layout: torch derives no type for these."""
    return bool(node.meta.get(PACK)) and getattr(node.target, "namespace", "") == "onednn"


def _packed(lowered: Lowered, node: Node) -> Tensor:
    """The type of a packed weight, from packing it."""
    made = node.target(*_real(lowered, node.args), **_real(lowered, node.kwargs))  # type: ignore[operator] # an operator
    stand_in = torch.empty(made.shape, dtype=made.dtype, device="meta")
    return fake_constant(lowered.program, stand_in)


def _real(lowered: Lowered, argument: Any) -> Any:  # noqa: ANN401 - arguments of an operator
    def value(node: Node) -> Any:  # noqa: ANN401 - map_arg's own type knows of no tensors
        return lowered.constants[str(node.target)]

    return torch.fx.node.map_arg(argument, value)


def _plain(signature: Signature, remark: Callable[[str], None]) -> Signature:
    """The signature in tuples, lists and dicts, which every process knows."""
    return replace(
        signature,
        in_spec=plain_spec(signature.in_spec, remark, "an input"),
        out_spec=plain_spec(signature.out_spec, remark, "the output"),
    )


def plain_spec(spec: pytree.TreeSpec, remark: Callable[[str], None], what: str) -> pytree.TreeSpec:
    """A pytree without classes that only some processes know.

    A file with such a class could be loaded only where it was imported and registered before.
    Named tuples become tuples, dataclasses and ``ModelOutput`` dicts of their fields.
    """
    if spec.is_leaf():
        return spec
    children = [plain_spec(child, remark, what) for child in spec.children()]
    if spec.type in _KEPT:
        return pytree.TreeSpec(spec.type, spec.context, children)
    keys = child_keys(spec)
    name = (spec.context if isinstance(spec.context, type) else spec.type).__name__
    named = keys != [str(i) for i in range(len(keys))]
    if named and not hasattr(spec.context, "_fields") and not hasattr(spec.type, "_fields"):
        remark(f"{what} is a {name}; the file makes it a dict of the same fields")
        return pytree.TreeSpec(dict, keys, children)
    remark(f"{what} is a {name}; the file makes it a tuple")
    return pytree.TreeSpec(tuple, None, children)
