"""Writing operands as integers: the edits of ``quantize``, each within an open rewrite site."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import Argument

from planish.ir.quantscheme import QuantScheme
from planish.ir.rewriter import Rewriter
from planish.passes.quantize.operands import (
    DEQUANTIZE,
    DYNAMIC,
    QUANTIZE,
    Operands,
    Slot,
    Weight,
    is_dequantized,
    with_operands,
)
from planish.passes.quantize.pairs import behind, existing_pair
from planish.passes.quantize.ranges import Grid
from planish.passes.quantize.weights import (
    Codes,
    quantize_bias,
    quantize_weight,
    rescaled,
    room_for_bias,
    weight_scheme,
)

RIGHT = frozenset({"other", "mat2", "batch2"})  # operands whose rows are summed over


class Inserter:
    """Makes the nodes that write operands as integers, one for each value and scheme.

    Args:
        rewriter: edits the program.
        weights: the scheme of weights.
        search: see ``quantize_weight``.
        grids: how values are written, by name; where dynamic, None.
        dynamic: dtype and "per token" of values whose range is found at run time.
    """

    def __init__(
        self,
        rewriter: Rewriter,
        weights: QuantScheme,
        *,
        search: bool = False,
        grids: Mapping[str, Grid] | None = None,
        dynamic: tuple[str, bool] | None = None,
    ):
        self.rewriter = rewriter
        self.weights = weights
        self.search = search
        self.grids = grids
        self.dynamic = dynamic
        self.remarks: list[str] = []
        self._pairs: dict[tuple[str, bool], Node] = {}
        self._constants: dict[tuple[str, QuantScheme], tuple[Node, Codes]] = {}

    def write(self, node: Node, operands: Operands) -> None:
        """Let an operator read integers wherever it does not yet."""
        new: dict[Slot, Argument] = {}
        for slot in operands.values:
            value = slot.read(node)
            if not is_dequantized(value):
                new[slot] = self._value(value, node, per_token=slot.name not in RIGHT)
        for weight in operands.weights:
            if not is_dequantized(weight.slot.read(node)):
                new[weight.slot] = self._weight(node, weight, operands, new)
        if operands.bias is not None and self.grids is not None:
            bias = self._bias(node, operands, new)
            if bias is not None:
                new[operands.bias] = bias
        if new:
            self.rewriter.set_args(node, *with_operands(node, new))

    def finish(self) -> None:
        """Once everything is written: remark weights that stay in float beside their integers."""
        for name in sorted({name for name, _ in self._constants}):
            readers = [
                user.name
                for node in self.rewriter.program.graph.find_nodes(op="get_attr", target=name)
                for user in node.users
            ]
            if readers:
                self.remarks.append(
                    f"{name} stays in float beside its integers: {', '.join(readers)} reads it"
                )

    # -- values -------------------------------------------------------------------------------

    def _value(self, value: Node, reader: Node, *, per_token: bool) -> Node:
        """The pair of a value, made right behind it.

        Args:
            value: to be read as integers.
            reader: what reads it.
            per_token: whether its rows may have a scale each, where the caller asked for that;
                the rows of a right operand are summed over and must share one.
        """
        key = (value.name, per_token)
        if key not in self._pairs:
            self.rewriter.insert_before(behind(value))
            static = self.grids is not None
            self._pairs[key] = self._static(value) if static else self._dynamic(value, per_token)
            self.rewriter.insert_before(reader)
        return self._pairs[key]

    def _static(self, value: Node) -> Node:
        assert self.grids is not None
        grid = self.grids[value.name]
        existing = existing_pair(value, grid, self.rewriter)
        if existing is not None:
            return existing
        name = value.name
        scale = self.rewriter.constant(grid.scale.clone(), f"{name}_scale", like=value)
        zero = self.rewriter.constant(grid.zero_point.clone(), f"{name}_zero_point", like=value)
        dtype = {"dtype": grid.scheme.dtype}
        codes = self.rewriter.call(QUANTIZE, [value, scale, zero], dtype, like=value)
        return self.rewriter.call(DEQUANTIZE, [codes, scale, zero], dtype, like=value)

    def _dynamic(self, value: Node, per_token: bool) -> Node:
        assert self.dynamic is not None
        dtype, wanted = self.dynamic
        per_token = per_token and wanted
        options: dict[str, Argument] = {"dtype": dtype}
        triple = self.rewriter.call(
            DYNAMIC, [value], {**options, "per_token": per_token}, like=value
        )
        parts = [
            self.rewriter.call(operator.getitem, [triple, index], like=value) for index in range(3)
        ]
        if per_token:
            options |= {"axis": -1, "block_size": int(value.meta["val"].shape[-1])}
        return self.rewriter.call(DEQUANTIZE, parts, options, like=value)

    # -- constants ----------------------------------------------------------------------------

    def _weight(
        self, node: Node, weight: Weight, operands: Operands, new: Mapping[Slot, Argument]
    ) -> Node:
        source = weight.slot.read(node)
        value = self.rewriter.program.constant(source)
        assert value is not None  # operands_of looked
        scheme = weight_scheme(self.weights, weight.axis, weight.inner, tuple(value.shape))
        if str(source.target) in self.rewriter.program.layouts and scheme.symmetric:
            scheme = replace(scheme, narrow=scheme.signed)
        key = (str(source.target), scheme)
        if key in self._constants:
            return self._constants[key][0]
        codes = quantize_weight(value, scheme, search=self.search)
        if codes.coarse is not None:
            self.remarks.append(f"{source.target}: {codes.coarse}")
        codes = self._with_room(node, operands, new, value, codes)
        self._constants[key] = self._constant(source, codes), codes
        return self._constants[key][0]

    def _with_room(
        self,
        node: Node,
        operands: Operands,
        new: Mapping[Slot, Argument],
        weight: Tensor,
        codes: Codes,
    ) -> Codes:
        """Raise scales of channels whose bias would overflow."""
        x_scale = self._x_scale(node, operands, new)
        bias = self._plain_bias(node, operands)
        if x_scale is None or bias is None or codes.scheme.granularity == "block":
            return codes
        scale = room_for_bias(codes, bias, x_scale)
        raised = int((scale != codes.scale).sum())
        if not raised:
            return codes
        self.remarks.append(
            f"{node.name}: the weights of {raised} channels are so small beside their bias that "
            "its integers would overflow; their scales were raised"
        )
        return rescaled(weight, codes, scale)

    def _constant(self, source: Node, codes: Codes) -> Node:
        name, rewriter = str(source.target), self.rewriter
        layout = rewriter.program.layouts.get(name)
        scheme = codes.scheme
        q = rewriter.constant(codes.codes, f"{name}_{scheme.dtype}", like=source, layout=layout)
        scale = rewriter.constant(codes.scale, f"{name}_scale", like=source)
        zero = rewriter.constant(codes.zero_point, f"{name}_zero_point", like=source)
        options: dict[str, Argument] = {"dtype": scheme.dtype}
        axis, block = scheme.layout(codes.codes)
        if axis is not None:
            options["axis"] = axis
        if block:
            options["block_size"] = block
        return rewriter.call(DEQUANTIZE, [q, scale, zero], options, like=source)

    def _bias(self, node: Node, operands: Operands, new: Mapping[Slot, Argument]) -> Node | None:
        """The bias in int32, if the scales of the products are known."""
        bias, x_scale = self._plain_bias(node, operands), self._x_scale(node, operands, new)
        w = new.get(operands.weights[0].slot, operands.weights[0].slot.read(node))
        if bias is None or x_scale is None or not isinstance(w, Node):
            return None
        w_scale = self.rewriter.program.constant(w.args[1])
        if w_scale is None or w.kwargs.get("block_size"):
            return None
        assert operands.bias is not None
        scale = (x_scale.double() * w_scale.double()).to(torch.float32)
        codes = quantize_bias(bias, scale)
        if codes is None:
            self.remarks.append(f"{node.name}: its bias does not fit into int32 and stays float")
            return None
        source: Node = operands.bias.read(node)
        scheme = QuantScheme(dtype="int32")
        if scale.dim():
            scheme = QuantScheme(dtype="int32", granularity="channel", axis=0)
        zero = torch.zeros_like(scale, dtype=torch.int32)
        return self._constant(source, Codes(codes, scale, zero, scheme))

    def _plain_bias(self, node: Node, operands: Operands) -> Tensor | None:
        if operands.bias is None:
            return None
        return self.rewriter.program.constant(operands.bias.read(node))

    def _x_scale(
        self, node: Node, operands: Operands, new: Mapping[Slot, Argument]
    ) -> Tensor | None:
        """The scale of the one value that a weight multiplies; None where it is not constant."""
        if len(operands.values) != 1 or len(operands.weights) != 1:
            return None
        value = new.get(operands.values[0], operands.values[0].read(node))
        if not isinstance(value, Node) or not is_dequantized(value):
            return None
        scale = self.rewriter.program.constant(value.args[1])
        return scale if scale is not None and scale.numel() == 1 else None
