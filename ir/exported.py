"""From ``Program`` to ``torch.export.ExportedProgram``, without tracing again.

The two hold the same graph. An exported program passes its constants in as extra inputs and keeps
Python constants among the inputs as placeholders nobody reads; that is all there is to translate.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import sympy
from torch import SymBool, SymFloat, SymInt, Tensor
from torch._export.verifier import SpecViolationError, TrainingIRVerifier
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ConstantArgument,
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    SymBoolArgument,
    SymFloatArgument,
    SymIntArgument,
    TensorArgument,
)
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

from planish.ir.errors import UnsupportedError
from planish.ir.infer import fake_constant
from planish.ir.program import Program

Argument = TensorArgument | SymIntArgument | SymFloatArgument | SymBoolArgument | ConstantArgument

# What a node brings along. torch's own `from_node` chains refer to graphs that are long gone.
_CARRIED = ("val", "stack_trace", "nn_module_stack", "torch_fn", "custom", "unbacked_bindings")


def to_exported_program(program: Program) -> ExportedProgram:
    """The same program in torch's own container.

    Constants become lifted buffers with their own names and share memory with the program's.
    Inputs are named as the signature names them. The program's first sample becomes the example
    inputs.

    Raises:
        UnsupportedError: a node has a type or an operator that an exported program cannot hold.
    """
    graph = Graph()
    mapping: dict[Node, Node] = {}
    inputs = _lift_constants(program, graph, mapping)
    inputs += _user_inputs(program, graph, mapping)
    submodules: dict[str, Any] = {}
    for node in program.graph.nodes:
        if node in mapping or node.op == "output":
            continue
        mapping[node] = graph.node_copy(node, lambda n: mapping[n])
        mapping[node].meta = _meta(node)
        if node.op == "get_attr":
            # A copy, since torch's constructor tidies up the bodies of branches in place.
            submodules[str(node.target)] = copy.deepcopy(program.constants[str(node.target)])
    results = map_arg(program.results, lambda n: mapping[n])
    graph.output(results)
    outputs = [OutputSpec(OutputKind.USER_OUTPUT, _argument(value), None) for value in results]
    try:
        return ExportedProgram(
            root=submodules,
            graph=graph,
            graph_signature=ExportGraphSignature(inputs, outputs),
            state_dict=_state(program, inputs),
            range_constraints=_range_constraints(program),
            module_call_graph=[_call_entry(program)],
            example_inputs=_example(program),
            verifiers=[TrainingIRVerifier],
        )
    except SpecViolationError as error:
        raise UnsupportedError(
            f"torch's exported program cannot hold this graph: {str(error).splitlines()[0]}",
            hint="a graph may call operators and arithmetic on sizes, nothing else",
        ) from error


def _lift_constants(program: Program, graph: Graph, mapping: dict[Node, Node]) -> list[InputSpec]:
    """One placeholder per constant that is read, before all others, as torch orders them."""
    taken = {*_public_names(program), *(node.name for node in program.graph.nodes)}
    owners: dict[str, Node] = {}
    specs = []
    for node in program.graph.find_nodes(op="get_attr"):
        name = str(node.target)
        value = program.constants[name]
        if isinstance(value, GraphModule):
            continue  # the body of a branch stays an attribute
        if name not in owners:
            public = _unused(f"b_{_identifier(name)}", taken)
            owner = graph.placeholder(public)
            owner.meta = _meta(node)
            if owner.meta.get("val") is None:
                owner.meta["val"] = fake_constant(program, value)
            owners[name] = owner
            argument = TensorArgument(name=owner.name)
            specs.append(InputSpec(InputKind.BUFFER, argument, name, persistent=True))
        mapping[node] = owners[name]
    return specs


def _state(program: Program, inputs: list[InputSpec]) -> dict[str, Tensor]:
    names = [str(spec.target) for spec in inputs if spec.kind is InputKind.BUFFER]
    return {n: value for n in names if isinstance(value := program.constants[n], Tensor)}


def _user_inputs(program: Program, graph: Graph, mapping: dict[Node, Node]) -> list[InputSpec]:
    """One placeholder per input leaf, those that are Python constants included."""
    signature = program.signature
    nodes = iter(program.placeholders)
    specs = []
    for position, name in enumerate(_public_names(program)):
        placeholder = graph.placeholder(name)
        placeholder.name = name  # fx would call an argument named `input` something else
        argument: Argument
        if position in signature.fixed:
            value = signature.fixed[position]
            placeholder.meta["val"] = value
            argument = ConstantArgument(name=placeholder.name, value=value)  # type: ignore[arg-type]
        else:
            node = next(nodes)
            placeholder.meta = _meta(node)
            mapping[node] = placeholder
            argument = _argument(placeholder)
        specs.append(InputSpec(InputKind.USER_INPUT, argument, None))
    return specs


def _public_names(program: Program) -> list[str]:
    """The names of the input leaves as distinct identifiers."""
    taken: set[str] = set()
    return [_unused(_identifier(name), taken) for name in program.signature.input_names]


def _identifier(name: str) -> str:
    name = re.sub(r"\W", "_", name, flags=re.ASCII)
    return f"_{name}" if name[:1].isdigit() or not name else name


def _unused(name: str, taken: set[str]) -> str:
    candidate, count = name, 0
    while candidate in taken:
        count += 1
        candidate = f"{name}_{count}"
    taken.add(candidate)
    return candidate


def _meta(node: Node) -> dict[str, Any]:
    return {key: node.meta[key] for key in _CARRIED if key in node.meta}


def _argument(value: object) -> Argument:
    """How a signature names a value: a node by its type, anything else as a constant."""
    if not isinstance(value, Node):
        return ConstantArgument(name="", value=value)  # type: ignore[arg-type]
    kind = value.meta.get("val")
    if isinstance(kind, Tensor):
        return TensorArgument(name=value.name)
    if isinstance(kind, (bool, SymBool)):
        return SymBoolArgument(name=value.name)
    if isinstance(kind, (int, SymInt)):
        return SymIntArgument(name=value.name)
    if isinstance(kind, (float, SymFloat)):
        return SymFloatArgument(name=value.name)
    raise UnsupportedError(
        f"an exported program cannot pass a {type(kind).__name__} in or out",
        where=value,
        hint="return its tensors one by one",
    )


def _range_constraints(program: Program) -> dict[sympy.Expr, ValueRanges[Any]]:
    """The legal sizes of every symbol and every derived size of the inputs."""
    expressions: dict[sympy.Expr, None] = {}
    for node in program.graph.nodes:
        for size in _symbolic_sizes(node.meta.get("val")):
            expr = size.node.expr
            if node.op == "placeholder":
                expressions[expr] = None
            expressions.update(dict.fromkeys(sorted(expr.free_symbols, key=str)))
    shape_env = program.fake_mode.shape_env
    known = shape_env.var_to_range if shape_env is not None else {}
    ranges: dict[sympy.Expr, ValueRanges[Any]] = {}
    for expr in expressions:
        bounds = program.signature.ranges.get(str(expr))
        if bounds is not None:
            lower, upper = bounds
            ranges[expr] = ValueRanges(lower, int_oo if upper is None else upper)
        elif expr in known:
            ranges[expr] = known[expr]
    return ranges


def _symbolic_sizes(value: object) -> list[SymInt]:
    """The symbolic numbers in a value's type."""
    if isinstance(value, Tensor):
        sizes: tuple[object, ...] = tuple(value.shape)  # declared as ints, but symbolic ones occur
        return [size for size in sizes if isinstance(size, SymInt)]
    if isinstance(value, (list, tuple)):
        return [size for item in value for size in _symbolic_sizes(item)]
    return [value] if isinstance(value, SymInt) else []


def _call_entry(program: Program) -> ModuleCallEntry:
    """The root's pytrees; its inputs and outputs are those of the graph, so torch lists none."""
    signature = program.signature
    return ModuleCallEntry(
        "",
        ModuleCallSignature(
            inputs=[],
            outputs=[],
            in_spec=signature.in_spec,
            out_spec=signature.out_spec,
            forward_arg_names=list(signature.parameters) or None,
        ),
    )


def _example(program: Program) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    if not program.samples:
        return None
    signature = program.signature
    tensors = iter(program.samples[0])
    leaves = [
        signature.fixed[i] if i in signature.fixed else next(tensors)
        for i in range(len(signature.input_names))
    ]
    args, kwargs = pytree.tree_unflatten(leaves, signature.in_spec)
    return tuple(args), dict(kwargs)
