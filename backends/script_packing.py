"""What is done when a TorchScript file is loaded: weights are brought into a kernel's layout.

torch cannot store such a layout. So the submodule ``packed`` says itself what is stored of it and
what is made of that:

    def __getstate__(self):
        return ([self.layer_weight.to_dense()], self.training)
    def __setstate__(self, state: Tuple[List[Tensor], bool]) -> None:
        raw = state[0]
        self.training = state[1]
        weight = raw[0]
        layer_weight = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        self.layer_weight = layer_weight
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from planish.backends.script_text import INDENT, Body, Names, is_packing
from planish.backends.torch_lowering import Lowered
from planish.ir.errors import UnsupportedError
from planish.ir.infer import reason


class Packing:
    """The submodule ``packed``: constants of the file, and what they become in memory.

    A weight that can be read back from the kernel's layout is kept in that layout alone; the rest
    keeps its codes beside it, for the file may be saved again.
    """

    def __init__(self, lowered: Lowered):
        self._lowered = lowered
        self._names = Names(("training", "raw", "state"))
        self.reads: dict[Node, str] = {}
        self.values: dict[str, Tensor] = {}
        self.kept: dict[str, Tensor] = {}
        self._stored: list[tuple[str, str]] = []  # (variable in setstate, text in getstate)
        self._sources: dict[Node, str] = {}
        self._body = Body(lowered, self._names, lambda _: "", {})
        results: dict[Node, Any] = {}
        for node in lowered.packed:
            self._take(node, results)

    def _take(self, node: Node, results: dict[Node, Any]) -> None:
        """Compute one packed value, and write how it is computed when the file is loaded."""
        for source in _constants(node):
            results[source] = self._lowered.constants[str(source.target)]
        results[node] = _computed(node, results)
        name = self._names.new(node.name)
        is_read = any(not is_packing(user) for user in node.users)
        for source in _constants(node):
            self._store(source, name, results[node] if is_read else None)
        self._body.add(f"{name} = {self._body.expression(node)}")
        self._body.variables[node] = name
        if is_read:
            self.values[name] = results[node]
            self.reads[node] = f"self.packed.{name}"
            self._body.add(f"self.{name} = {name}")

    def _store(self, source: Node, name: str, packed: Tensor | None) -> None:
        """Have the file hold a constant: read back from what was made of it, or beside it.

        Args:
            source: the constant's node.
            name: of what was made of it.
            packed: what was made of it; None where ``forward`` does not read that.
        """
        if source in self._body.variables:
            return
        raw = self._lowered.constants[str(source.target)]
        assert isinstance(raw, Tensor)
        variable = self._names.new(str(source.target))
        self._body.variables[source] = variable
        alone = len(source.users) == 1
        back = _way_back(raw, packed) if alone and packed is not None else None
        if back is not None:
            self._stored.append((variable, f"self.{name}{back}"))
        else:
            self.kept[variable] = raw
            self._stored.append((variable, f"self.{variable}"))

    def source(self) -> str:
        """``__getstate__`` and ``__setstate__``; empty where nothing is packed."""
        if not self.values:
            return ""
        texts = ", ".join(text for _, text in self._stored)
        lines = [
            "def __getstate__(self):",
            f"{INDENT}return ([{texts}], self.training)",
            "def __setstate__(self, state: Tuple[List[Tensor], bool]) -> None:",
            f"{INDENT}raw = state[0]",
            f"{INDENT}self.training = state[1]",
        ]
        for position, (variable, _) in enumerate(self._stored):
            lines.append(f"{INDENT}{variable} = raw[{position}]")
            if variable in self.kept:
                lines.append(f"{INDENT}self.{variable} = {variable}")
        return "\n".join([*lines, *self._body.lines]) + "\n"


def _constants(node: Node) -> list[Node]:
    return [source for source in node.all_input_nodes if source.op == "get_attr"]


def _computed(node: Node, results: Mapping[Node, Any]) -> Any:  # noqa: ANN401 - as its operator gives
    """The value of a packing node.

    Raises:
        UnsupportedError: its kernel has no layout for it.
    """
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: results[n])
    try:
        with torch.no_grad():
            return node.target(*args, **kwargs)  # type: ignore[operator] # an operator
    except RuntimeError as error:
        raise UnsupportedError(
            f"a constant does not go into the layout of its kernel: {reason(error)}",
            where=node,
            hint="this is a defect of planish: report it with the model",
        ) from error


def _way_back(raw: Tensor, packed: Tensor) -> str | None:
    """How to read a weight back from a kernel's layout, bit by bit; None where that is not so."""
    if packed.layout == torch.strided:
        return None
    try:
        dense = packed.to_dense()
    except RuntimeError:  # a layout that oneDNN does not take apart
        return None
    if dense.dtype != raw.dtype:
        return None
    if dense.shape == raw.shape and torch.equal(dense, raw):
        return ".to_dense()"
    if dense.dim() == 2 and dense.t().shape == raw.shape and torch.equal(dense.t(), raw):
        return ".to_dense().t().contiguous()"
    if dense.numel() == raw.numel() and torch.equal(dense.reshape(raw.shape), raw):
        return f".to_dense().reshape({list(raw.shape)})"
    return None
