"""The source of a TorchScript file: ``forward``, and what its submodule does when it is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import Node

from planish.backends.script_call import Types, kind_of, structure
from planish.backends.script_inputs import open_inputs
from planish.backends.script_packing import Packing
from planish.backends.script_text import Body, Names, is_packing
from planish.backends.torch_lowering import Lowered
from planish.ir.ops import is_view
from planish.ir.program import Program


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a file is compiled from.

    Attributes:
        forward: source of the method.
        origins: line of ``forward``, from 1 -> the node that it computes.
        setstate: source of ``__getstate__`` and ``__setstate__`` of the submodule ``packed``; empty
            where nothing is packed.
        attributes: name -> constant of the program, held by the module itself.
        raw: name -> constant that ``packed`` stores.
        packed: name -> tensor in a kernel's layout, which ``packed`` holds while it lives.
        classes: the named tuples that ``forward`` mentions.
        call: how flat inputs fill the arguments, as JSON; see ``script_run``.
    """

    forward: str
    origins: dict[int, Node]
    setstate: str
    attributes: dict[str, Tensor]
    raw: dict[str, Tensor]
    packed: dict[str, Tensor]
    classes: dict[str, type]
    call: dict[str, Any]


def source_of(lowered: Lowered, remark: Callable[[str], None]) -> Source:
    """Write a lowered program as TorchScript.

    Raises:
        UnsupportedError: TorchScript cannot represent it; names the node.
    """
    attributes: dict[str, Tensor] = {}
    names = Names(("packed", "training", "forward"))
    chosen: dict[str, str] = {}

    def attribute(constant: str) -> str:
        if constant not in chosen:
            chosen[constant] = names.new(constant)
            attributes[chosen[constant]] = lowered.constants[constant]  # type: ignore[assignment] # a tensor, by its reader
        return f"self.{chosen[constant]}"

    packing = Packing(lowered)
    parameters = _parameters(lowered.program)
    body = Body(lowered, Names(tuple(parameters)), attribute, packing.reads)
    types = Types(body.names)
    declared, trees = open_inputs(lowered.program, parameters, body, types, remark)
    for node in lowered.graph.nodes:
        if not _only_packed(node):
            body.write(node)
    body.add(f"return {_result(lowered, body, types, remark)}")
    head = f"def forward(self{''.join(', ' + p for p in declared)}):"
    return Source(
        forward="\n".join([head, *body.lines]) + "\n",
        origins={k: n for k, n in enumerate(body.origins, start=2) if n is not None},
        setstate=packing.source(),
        attributes=attributes,
        raw=packing.kept,
        packed=packing.values,
        classes=types.classes(),
        call={"args": trees},
    )


def _parameters(program: Program) -> list[str]:
    """Names of ``forward``'s parameters: the user's own wherever TorchScript lets them be."""
    signature = program.signature
    args, kwargs = signature.in_spec.children()
    count = args.num_children + kwargs.num_children
    names = Names()
    return [names.new(n) for n in signature.parameters or [f"input_{i}" for i in range(count)]]


def _only_packed(node: Node) -> bool:
    """Whether a node belongs to what is done when the file is loaded."""
    if is_packing(node) and all(is_packing(u) for u in node.users):
        return True
    return node.op == "get_attr" and bool(node.users) and all(is_packing(u) for u in node.users)


def _result(lowered: Lowered, body: Body, types: Types, remark: Callable[[str], None]) -> str:
    """What ``forward`` returns, in the caller's structure."""
    program = lowered.program
    (made,) = lowered.graph.output_node().args
    texts, kinds = [], []
    assert isinstance(made, (list, tuple))
    for value, original in zip(made, program.results, strict=True):
        text = body.literal(value)
        if _may_be_constant(value):  # the caller may write into it, and the file must not change
            text += ".clone()"
        elif isinstance(original, Node) and isinstance(original.meta["val"], Tensor):
            if original.meta["val"].dim() >= 3:  # a picture may lie channels-last
                text += ".contiguous()"
        texts.append(text)
        kinds.append((kind_of(original, program), None))
    shown = structure(program.signature.out_spec, kinds, types, remark, "the output")
    return shown.build(texts)


def _may_be_constant(node: object) -> bool:
    """Whether a value of the lowered graph may share the memory of a constant."""
    while isinstance(node, Node) and is_view(node.target) and node.args:
        node = node.args[0]
    return isinstance(node, Node) and (node.op == "get_attr" or is_packing(node))
