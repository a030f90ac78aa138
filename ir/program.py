"""``Program``: one traced model, as a graph of ATen operators plus constants and a contract.

The graph holds one placeholder per tensor input, one ``get_attr`` per use of a constant and one
``output`` whose argument is a flat tuple. Pytrees live only in the ``Signature``, so a pass never
meets them. Constants are shared between clones and never written into: a pass that wants another
value makes a new tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.graph_module import _assign_attr
from torch.utils import _pytree as pytree

from planish.ir.errors import UsageError, VerificationError

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import FakeTensorMode

    from planish.ir.tensortype import SparseLayout

Constant = Tensor | GraphModule  # a GraphModule is the body of a branch of ``torch.cond``


@dataclass(frozen=True)
class Signature:
    """What the caller sees: names, pytrees, dimension names and their legal ranges.

    Attributes:
        parameters: names of ``forward``'s arguments, in the order of ``in_spec``'s children.
        positional: how many of ``parameters`` were passed by position at capture.
        input_names: one name per leaf of ``in_spec``.
        fixed: leaves that are Python constants (None, bool, int, str), by leaf position.
        in_spec: pytree of ``(args, kwargs)``.
        out_spec: pytree of the result.
        output_names: one name per leaf of ``out_spec``.
        symbols: torch's symbol -> the user's dimension name.
        ranges: torch's symbol -> (smallest, largest or None) legal size.
        defaults: parameters of ``forward`` that have a default -> that default.
    """

    parameters: tuple[str, ...]
    positional: int
    input_names: tuple[str, ...]
    fixed: Mapping[int, object]
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    output_names: tuple[str, ...]
    symbols: Mapping[str, str] = field(default_factory=dict)
    ranges: Mapping[str, tuple[int, int | None]] = field(default_factory=dict)
    defaults: Mapping[str, object] = field(default_factory=dict)

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """Names of the leaves that are placeholders of the graph, in order."""
        return tuple(n for i, n in enumerate(self.input_names) if i not in self.fixed)

    def flatten(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
        """Turn a call into the flat tuple of placeholder values.

        Accepts any mix of positional and keyword arguments that names the captured ones.

        Raises:
            UsageError: an argument is unknown, missing, or a constant differs from capture.
        """
        args, kwargs = self._arrange(args, kwargs)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if spec != self.in_spec:
            raise UsageError(
                "the inputs are nested differently than the example inputs were",
                hint=f"pass them as {self.in_spec}; got {spec}",
            )
        for position, value in self.fixed.items():
            got = leaves[position]
            if got is not value and (isinstance(got, Tensor) or got != value):
                raise UsageError(
                    f"input {self.input_names[position]!r} was the constant {value!r} at capture "
                    f"and is {got!r} now",
                    hint="capture again with this value; constants are compiled into the program",
                )
        return tuple(leaf for i, leaf in enumerate(leaves) if i not in self.fixed)

    def _arrange(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Bring a call into the positional/keyword split of the capture."""
        if not self.parameters:
            return tuple(args), dict(kwargs)
        if len(args) > len(self.parameters):
            raise UsageError(
                f"got {len(args)} positional inputs; the program takes {len(self.parameters)}: "
                + ", ".join(self.parameters)
            )
        given = dict(zip(self.parameters, args, strict=False))
        for name, value in kwargs.items():
            if name in given:
                raise UsageError(f"input {name!r} was given twice")
            if name not in self.parameters:
                if name in self.defaults and _is_default(value, self.defaults[name]):
                    continue
                raise UsageError(
                    f"unknown input {name!r}",
                    hint="the program was captured with " + ", ".join(self.parameters),
                )
            given[name] = value
        constants = self._constant_parameters()
        for name in self.parameters:
            if name not in given:
                if name not in constants:
                    raise UsageError(f"missing input {name!r}", hint="pass every captured input")
                given[name] = constants[name]
        names = self.parameters
        return (
            tuple(given[n] for n in names[: self.positional]),
            {n: given[n] for n in names[self.positional :]},
        )

    def _constant_parameters(self) -> dict[str, object]:
        """Parameters that a call may leave out, with the constants they were captured with.

        That is where ``forward`` itself would take this constant, or says by None that it has no
        opinion (``use_cache=None``); any other default would give another result than the program.
        """
        args, kwargs = pytree.tree_unflatten(list(range(self.in_spec.num_leaves)), self.in_spec)
        leaves = dict(zip(self.parameters, (*args, *kwargs.values()), strict=True))
        return {
            name: self.fixed[leaf]
            for name, leaf in leaves.items()
            if isinstance(leaf, int)
            and leaf in self.fixed
            and name in self.defaults
            and (self.defaults[name] is None or _is_default(self.fixed[leaf], self.defaults[name]))
        }

    def unflatten(self, outputs: tuple[Any, ...]) -> Any:  # noqa: ANN401 - the caller's structure
        """Rebuild the caller's output structure from flat outputs."""
        return pytree.tree_unflatten(list(outputs), self.out_spec)


def _is_default(value: object, default: object) -> bool:
    plain = type(value) is type(default) and isinstance(value, (bool, int, float, str))
    return value is default or (plain and value == default)


class Program:
    """A graph, its constants and its contract.

    Attributes:
        graph: the ``torch.fx`` graph. Edit it through ``planish.ir.Rewriter`` only.
        constants: live constants by dotted name; tensors carry no gradient.
        signature: the input and output contract.
        samples: flat example inputs (one tuple per sample), as the caller gave them.
        layouts: sparse layouts claimed for constants, checked by the verifier.
        remarks: sentences about what capture changed or dropped.
    """

    def __init__(
        self,
        graph: Graph,
        constants: dict[str, Constant],
        signature: Signature,
        samples: tuple[tuple[Any, ...], ...] = (),
        *,
        layouts: dict[str, SparseLayout] | None = None,
        remarks: tuple[str, ...] = (),
    ):
        self.graph = graph
        self.constants = constants
        self.signature = signature
        self.samples = samples
        self.layouts = dict(layouts or {})
        self.remarks = remarks
        self._module: GraphModule | None = None

    # -- looking ------------------------------------------------------------------------------

    @property
    def nodes(self) -> Iterator[Node]:
        """All nodes in topological order."""
        return iter(self.graph.nodes)

    @property
    def operators(self) -> list[Node]:
        """The nodes that compute something."""
        return [n for n in self.graph.nodes if n.op == "call_function"]

    @property
    def placeholders(self) -> list[Node]:
        """One node per tensor input, in the order of ``signature.tensor_names``."""
        return self.graph.find_nodes(op="placeholder")

    @property
    def output(self) -> Node:
        """The single output node; ``args[0]`` is a flat tuple of nodes and constants."""
        return self.graph.output_node()

    @property
    def results(self) -> tuple[Any, ...]:
        """The flat outputs: nodes, or Python constants."""
        return tuple(self.output.args[0])  # type: ignore[arg-type]

    def constant(self, node: object) -> Tensor | None:
        """The tensor behind a ``get_attr`` node; None for anything else."""
        if isinstance(node, Node) and node.op == "get_attr":
            value = self.constants.get(str(node.target))
            return value if isinstance(value, Tensor) else None
        return None

    @property
    def fake_mode(self) -> FakeTensorMode:
        """The fake-tensor mode that knows this program's symbols."""
        from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

        for node in self.graph.nodes:
            value = node.meta.get("val")
            if isinstance(value, FakeTensor):
                return value.fake_mode
        return FakeTensorMode()

    # -- copying ------------------------------------------------------------------------------

    def clone(self) -> Program:
        """A copy with its own graph; constants, types and samples are shared, not copied."""
        graph = Graph()
        mapping: dict[Node, Node] = {}
        output = graph.graph_copy(self.graph, mapping)
        new_output = graph.output(output)
        new_output.meta = dict(self.output.meta)
        for old, new in mapping.items():
            new.meta = dict(old.meta)
        return Program(
            graph,
            dict(self.constants),
            self.signature,
            self.samples,
            layouts=self.layouts,
            remarks=self.remarks,
        )

    def drop_dead_constants(self) -> None:
        """Forget constants that no node reads."""
        live = {str(n.target) for n in self.graph.nodes if n.op == "get_attr"}
        self.constants = {name: c for name, c in self.constants.items() if name in live}
        self.layouts = {name: s for name, s in self.layouts.items() if name in live}

    # -- as torch modules ---------------------------------------------------------------------

    @property
    def graph_module(self) -> GraphModule:
        """The graph as a ``GraphModule`` over flat inputs; its state dict is the live constants.

        Built on first use. It shares this program's graph, so an edit through it is an edit of
        the program; call ``absorb_module_edits`` (the pipeline does) to take over new constants.
        """
        if self._module is None:
            self.drop_dead_constants()
            root = torch.nn.Module()
            for name, value in self.constants.items():
                _assign_attr(value, root, name)
            self._module = GraphModule(root, self.graph)
            self._module.eval()
        return self._module

    def touch(self) -> None:
        """Say that the graph or the constants changed: the cached module is stale."""
        self._module = None

    def absorb_module_edits(self) -> None:
        """Take over constants that somebody set on ``graph_module`` behind the rewriter's back."""
        if self._module is None:
            return
        for node in self.graph.find_nodes(op="get_attr"):
            name = str(node.target)
            found: Any = self._module
            for part in name.split("."):
                found = getattr(found, part, None)
            if isinstance(found, (Tensor, GraphModule)):
                if found is not self.constants.get(name):
                    self.constants[name] = found.detach() if isinstance(found, Tensor) else found
            elif name not in self.constants:
                raise VerificationError(f"node {node.name} reads {name!r}, which does not exist")
        self.touch()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - the caller's structure
        """Run the program with the caller's own signature and output structure.

        Raises:
            UsageError: the inputs are not of the types and sizes it was captured for.
        """
        from planish.ir.contract import check_inputs
        from planish.ir.execute import run

        inputs = self.signature.flatten(args, kwargs)
        check_inputs(self, inputs)
        return self.signature.unflatten(run(self, inputs))

    def __str__(self) -> str:
        from planish.ir.text import text

        return text(self)
