"""Cut units out of a program: constants lose them, and literal sizes follow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node
from torch.fx.node import map_arg

from planish.ir.errors import PassError
from planish.ir.ops import argument, aten, declared_arguments, is_op
from planish.ir.rewriter import Rewriter
from planish.passes.prune.groups import Group
from planish.passes.prune.labels import (
    CHOICES,
    AllPinnedError,
    AmbiguousReshapeError,
    Labels,
    sizes_of,
)
from planish.passes.prune.literals import Removed, literals, old_sizes
from planish.passes.prune.propagate import grow

RULE = "cut-units"
_VIEWS = (aten.view.default, aten._unsafe_view.default)
_MOVES = (aten.transpose.int, aten.permute.default, aten.alias.default, aten.dropout.default)
_SQUEEZES = (aten.squeeze.default, aten.squeeze.dim)
_RETARGETED = (
    aten.split.Tensor,
    aten.chunk.default,
    aten.tensor_split.sections,
    aten.tensor_split.indices,
)


def cut(rewriter: Rewriter, kept: Mapping[Group, Tensor]) -> None:
    """Cut all units but the kept ones, of all groups in one go; each group is a site of its own.

    The program is whole again after ``rewriter.finish()``; groups must be found anew then.

    Args:
        rewriter: of the program that holds the groups.
        kept: by group, int64 indices of the units that stay, ascending.

    Raises:
        PassError: no such units, none kept, or the group does not fit the program (any more).
    """
    removed = {group: _removed(rewriter, group, units) for group, units in kept.items()}
    cutter = _Cutter(rewriter)
    for group, axes in removed.items():
        if not any(mask.any() for mask in axes.values()):
            continue
        with rewriter.site(RULE, group.first) as allowed:
            if allowed:
                rewriter.note(f"{group.name}, {len(kept[group])} kept")
                cutter.remove(axes)


def _removed(rewriter: Rewriter, group: Group, kept: Tensor) -> Removed:
    """Which indices of every axis of every value leave."""
    units = kept.tolist()
    if not units or units != sorted(set(units)) or units[0] < 0 or units[-1] >= group.size:
        raise PassError(
            f"{group.name}: the units kept must be ascending numbers below {group.size}, "
            f"at least one: {units[:8]}",
            where=group.first,
        )
    labels = _grown(rewriter, group)
    gone = np.ones(group.size + 1, dtype=np.bool_)
    gone[0] = False
    gone[kept.numpy() + 1] = False
    found: Removed = {}
    for axis, held in labels.of.items():
        mask: NDArray[np.bool_] = (held > 0) & gone[np.maximum(held, 0)]
        found[axis] = mask
    return found


def _grown(rewriter: Rewriter, group: Group) -> Labels:
    seeds = []
    for place in group.constants:
        unit = place.unit.numpy()
        seeds.append((place.node, place.axis, np.where(unit >= 0, unit + 1, -1)))
    problem = ""
    pending: list[dict[tuple[Node, int], tuple[int, int]]] = [{}]
    for choices in pending:  # grows with each reshape that can be read in several ways
        try:
            labels = grow(rewriter.program, seeds, group.size, choices)
        except AllPinnedError as pinned:
            problem = problem or str(pinned)
        except AmbiguousReshapeError as ambiguous:
            if len(pending) < CHOICES:
                pending += [{**choices, ambiguous.key: option} for option in ambiguous.options]
        else:
            apart = labels.parent == np.arange(len(labels.parent))
            if apart.all() and labels.reach_only(
                [(p.node, p.axis, p.unit) for p in group.constants]
            ):
                return labels
            problem = "some of its units cannot be cut, or only together"
    raise PassError(
        f"{group.name} does not fit the program: {problem}",
        where=group.first,
        hint="find groups again after every cut",
    )


class _Cutter:
    """What has been cut so far, in indices of the program as it was.

    Sizes are read off a copy of that: nodes keep their names in it, but lose their operands in the
    program once something stands for them.
    """

    def __init__(self, rewriter: Rewriter):
        self.rewriter = rewriter
        self.removed: Removed = {}
        self.was = {node.name: node for node in rewriter.program.clone().graph.nodes}
        self.now = {node.name: node for node in rewriter.program.graph.nodes}
        self.nodes: dict[str, list[Node]] = {}  # of every constant
        for node in self.was.values():
            if node.op == "get_attr":
                self.nodes.setdefault(str(node.target), []).append(node)
        self.values = dict(rewriter.program.constants)

    def remove(self, axes: Removed) -> None:
        """Take more indices away."""
        affected: dict[Node, None] = {}
        for (node, axis), mask in axes.items():
            if not mask.any():
                continue
            value = self.was[node.name]
            before = self.removed.get((value, axis))
            self.removed[value, axis] = mask if before is None else before | mask
            if self.removed[value, axis].all():
                raise PassError(f"nothing would be left along axis {axis}", where=node)
            affected[value] = None
        for name in dict.fromkeys(str(n.target) for n in affected if n.op == "get_attr"):
            self._slice(name)
        for node in dict.fromkeys(n for value in affected for n in (value, *value.users)):
            current = self.now[node.name]
            if node.op == "call_function" and not current._erased:
                self.rewriter.erase_if_dead(current)
            if node.op == "call_function" and not current._erased:
                self._resize(node)
                self._loosen(node)

    def _loosen(self, node: Node) -> None:
        """Views of an attention's result become reshapes.

        With fewer numbers to a head another kernel may compute it, and lay it out otherwise.
        """
        pending = [node] if is_op(node, aten.scaled_dot_product_attention.default) else []
        while pending:
            for user in pending.pop().users:
                if is_op(user, *_VIEWS) and is_op(self.now[user.name], *_VIEWS):
                    self.now[user.name] = self._copied(self.now[user.name])
                elif is_op(user, *_MOVES):
                    pending.append(user)

    def _slice(self, name: str) -> None:
        nodes = self.nodes[name]
        value = self.values[name]
        assert isinstance(value, Tensor)
        for axis in range(value.dim()):
            gone = self.removed.get((nodes[0], axis))
            if gone is not None:
                left = torch.from_numpy((~gone).nonzero()[0])
                value = value.index_select(axis, left)
        olds = [n for n in (self.now[node.name] for node in nodes) if not n._erased]
        if not olds:
            return  # only dead code read it
        self.rewriter.insert_before(olds[0])
        new = self.rewriter.constant(value.contiguous(), name, like=olds[0])
        for old in dict.fromkeys(olds):
            self.rewriter.replace(old, new)
        self.now.update({node.name: new for node in nodes})

    def _resize(self, node: Node) -> None:
        """Literal sizes of a call, as they are now."""
        found = {
            k: map_arg(v, lambda n: self.now[n.name])
            for k, v in literals(node, self.removed).items()
        }
        current = self.now[node.name]
        if is_op(node, *_VIEWS):
            if "size" in found:
                found = {"shape": found["size"]}
            # What a kernel gives for fewer units may lie in memory in another order.
            if is_op(current, *_VIEWS):
                shape = found.get("shape") if self._is_resized(node) else None
                current = self.now[node.name] = self._copied(current, shape)
        elif is_op(current, *_SQUEEZES):
            self.now[node.name] = self._squeezed(node, current)
        if not found:
            return
        if is_op(current, *_RETARGETED):
            current = self.now[node.name] = self._retarget(node, current, found)
        args, kwargs = list(current.args), dict(current.kwargs)
        for position, declared in enumerate(declared_arguments(current)):
            if declared.name not in found:
                continue
            if position < len(args) and not declared.kwarg_only:
                args[position] = found[declared.name]
            else:
                kwargs[declared.name] = found[declared.name]
        self.rewriter.set_args(current, args, kwargs)

    def _is_resized(self, node: Node) -> bool:
        """Whether what a call reads has its new type already: constants do, others at the end."""
        read = node.all_input_nodes[0]
        return sizes_of(read) != sizes_of(self.now[read.name])

    def _copied(self, node: Node, shape: Any = None) -> Node:  # noqa: ANN401 - an fx argument
        """A view, as a reshape that copies where it has to."""
        given = argument(node, "size") if shape is None else shape
        return self._instead(node, aten.reshape.default, (node.args[0], given))

    def _squeezed(self, node: Node, current: Node) -> Node:
        """A squeeze of the axes that were of one index, not of those that are by now."""
        sizes = sizes_of(node.all_input_nodes[0])
        named = is_op(node, aten.squeeze.dim)
        axes = [argument(node, "dim") % len(sizes)] if named else range(len(sizes))
        single = [i for i in axes if isinstance(sizes[i], int) and sizes[i] == 1]
        return self._instead(current, aten.squeeze.dims, (current.args[0], single))

    def _retarget(self, node: Node, current: Node, found: Mapping[str, Any]) -> Node:
        """A split into equal parts, as one into parts of any sizes."""
        dim, sizes = old_sizes(node)
        if self._is_resized(node):
            sizes = found["split_sizes"]
        return self._instead(current, aten.split_with_sizes.default, (current.args[0], sizes, dim))

    def _instead(self, node: Node, target: OpOverload, args: tuple[Any, ...]) -> Node:
        self.rewriter.insert_before(node)
        new = self.rewriter.call(target, args, like=node)
        self.rewriter.replace(node, new)
        return new
