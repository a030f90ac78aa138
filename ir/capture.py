"""From ``nn.Module`` or ``ExportedProgram`` to ``Program``.

``torch.export`` traces the model; what it returns is unlifted (parameters become constants),
made functional, and stripped of assertions. The caller's model is never changed.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from planish.ir.calling import Call, bind, input_names, output_names
from planish.ir.capture_errors import (
    check_model,
    check_sample,
    explain,
    fails_itself,
    quiet,
    uncompiled,
)
from planish.ir.compare import difference
from planish.ir.dims import (
    Axis,
    dynamic_axes,
    enlarge_singletons,
    explicit_shapes,
    legal_ranges,
    named_symbols,
)
from planish.ir.errors import CaptureError, PlanishError, UnsupportedError, describe
from planish.ir.execute import run
from planish.ir.functionalize import (
    drop_assertions,
    is_functional,
    make_functional,
    written_inputs,
)
from planish.ir.ops import is_pure_call
from planish.ir.program import Constant, Program, Signature
from planish.ir.regions import drop_aliases, has_autocast, inline_regions
from planish.ir.rehearse import register_dataclasses, rehearse, untouched


def capture(
    model: nn.Module | ExportedProgram,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,  # noqa: ANN401 - exactly as torch.export takes it
) -> Program:
    """Trace a model into a program.

    Args:
        model: in evaluation mode; it is not changed. An ``ExportedProgram`` is taken as it is.
        args: positional example inputs.
        kwargs: keyword example inputs.
        dynamic_shapes: as ``torch.export.export`` takes it. A sample of size 1 in a dynamic
            dimension is traced at size 2, since torch would make the size a constant.

    Raises:
        CaptureError: the model cannot be traced; says why, and at which line of the user's code.
    """
    if isinstance(model, ExportedProgram):
        return from_exported(model)
    model = uncompiled(model)
    check_model(model)
    call = bind(model, args, dict(kwargs or {}))
    check_sample(model, call)
    register_dataclasses((call.args, call.kwargs))
    shapes = explicit_shapes(model, call, dynamic_shapes)
    axes = dynamic_axes(model, call, shapes)
    exported, remarks = _export_enlarged(model, call, shapes, axes)
    symbols, smallest = named_symbols(exported, axes, call)
    program = _build(exported, call, symbols, legal_ranges(exported, smallest), remarks)
    _compare_with_model(model, call, program)
    return program


def from_exported(exported: ExportedProgram) -> Program:
    """A program from an ``ExportedProgram``, whose own example inputs become the sample."""
    if exported.example_inputs is None:
        raise CaptureError(
            "the exported program carries no example inputs",
            hint="export it again with torch.export.export, which records them",
        )
    args, kwargs = exported.example_inputs
    spec_args, spec_kwargs = tuple(args), dict(kwargs or {})
    names = exported.module_call_graph[0].signature
    forward = getattr(names, "forward_arg_names", None) if names is not None else None
    call = Call(spec_args, spec_kwargs, tuple(forward or ()), {})
    program = _build(exported, call, {}, legal_ranges(exported, {}), [])
    program.remarks += _mistaken_inputs(program)
    return program


def _mistaken_inputs(program: Program) -> tuple[str, ...]:
    """Remarks on inputs that torch took for others; see ``_told_apart``, which comes too late."""
    inputs = list(zip(program.signature.tensor_names, program.placeholders, strict=True))
    given = [id(value) for value in program.samples[0]]
    return tuple(
        f"input {name!r} is not read, and its example is another input's, too: torch takes inputs "
        "that are one tensor for one input; export again with an example of its own"
        for (name, node), own in zip(inputs, given, strict=True)
        if not node.users and given.count(own) > 1
    )


def _export_enlarged(
    model: nn.Module,
    call: Call,
    dynamic_shapes: Any,  # noqa: ANN401 - as torch.export takes it
    axes: list[Axis],
) -> tuple[ExportedProgram, list[str]]:
    """Trace with samples of size 1 enlarged; returns remarks, too."""
    traced = enlarge_singletons(call, axes)
    try:
        return _export(model, traced, dynamic_shapes), []
    except CaptureError as error:
        if traced is call:
            raise
        # Where torch may choose, a sample of size 1 that only fits as it is becomes static.
        required = [axis for axis in axes if not axis.optional]
        if len(required) == len(axes):
            enlarged = (
                "an example of size 1 in a dynamic dimension was traced at a larger size; if the "
                "model needs 1 there, leave the dimension static"
            )
            raise CaptureError(
                error.what,
                where=error.where,
                hint=enlarged
                if "dynamic_shapes" not in error.what
                else f"{error.hint}; {enlarged}",
            ) from error
    exported = _export(model, enlarge_singletons(call, required), dynamic_shapes)
    return exported, ["a dimension of size 1 became static: the model needs it to be 1"]


def _export(model: nn.Module, call: Call, dynamic_shapes: Any) -> ExportedProgram:  # noqa: ANN401
    try:
        return _torch_export(model, call, dynamic_shapes)
    except Exception as error:  # torch.export raises dozens of kinds; each is explained
        # Perhaps the model fails on these inputs, traced or not; perhaps torch only lacks to know
        # the dataclasses of the result.
        try:
            result = rehearse(model, call, copy_parameters=True)
        except Exception as own:  # the caller's model may fail in any way
            raise fails_itself(own) from own
        if not register_dataclasses(result):
            raise explain(error) from error
    try:
        return _torch_export(model, call, dynamic_shapes)
    except Exception as error:  # as above
        raise explain(error) from error


def _torch_export(model: nn.Module, call: Call, dynamic_shapes: Any) -> ExportedProgram:  # noqa: ANN401
    call = _told_apart(model, call)
    # Under no_grad, torch.no_grad blocks of the model leave no operators behind.
    with untouched(model), torch.no_grad(), warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")
        return torch.export.export(
            model, call.args, call.kwargs, dynamic_shapes=dynamic_shapes, strict=False
        )


def _told_apart(model: nn.Module, call: Call) -> Call:
    """The call with copies of tensors that are given twice, or are the model's own.

    Torch tells inputs apart by their identity: of one tensor given for two inputs it would read
    only one of the two, whatever the caller gives later.
    """
    seen = {id(t) for t in (*model.parameters(), *model.buffers())}

    def own(leaf: Any) -> Any:  # noqa: ANN401 - whatever the caller passes
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) in seen:
            return leaf.detach().clone()
        seen.add(id(leaf))
        return leaf

    args, kwargs = pytree.tree_map(own, (call.args, call.kwargs))
    return replace(call, args=args, kwargs=kwargs)


def _compare_with_model(model: nn.Module, call: Call, program: Program) -> None:
    """Hold the program to what the model returns for the example inputs.

    Raises:
        CaptureError: the model fails, or they differ. A sample of size 1 is smaller than what was
            traced, and a model may treat size 1 specially.
    """
    try:
        expected = rehearse(model, call)  # a write into a parameter was refused by now
    except Exception as error:  # the caller's model may fail in any way
        raise fails_itself(error) from error
    with torch.random.fork_rng(devices=[]):
        try:
            outputs = run(program, program.samples[0])
            problem = difference(pytree.tree_leaves(expected), outputs)
        except PlanishError as error:
            problem = error.what
    if problem is not None:
        raise CaptureError(
            f"the traced graph is not the model: on the example inputs, {problem}",
            hint="if a dynamic dimension has size 1 there, leave it static or pass a larger "
            "example; otherwise forward depends on state that a graph cannot hold",
        )


def _build(
    exported: ExportedProgram,
    call: Call,
    symbols: dict[str, str],
    ranges: dict[str, tuple[int, int | None]],
    remarks: list[str],
) -> Program:
    needs_casts = has_autocast(exported.graph_module)
    if not needs_casts:
        exported = inline_regions(exported)
    remarks = [*remarks, *_side_effects(exported)]
    if needs_casts or not is_functional(exported.graph):
        # Writes into views: torch's own functionalization knows every aliasing rule.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exported = drop_aliases(exported).run_decompositions({})
        _side_effects(exported)
    graph, constants, fixed = _unlift(exported)
    make_functional(graph)
    _drop_invented_modules(graph)
    remarks += [
        f"forward draws random numbers even in evaluation mode: {describe(node)}"
        for node in graph.nodes
        if isinstance(node.target, OpOverload)
        and torch.Tag.nondeterministic_seeded in node.target.tags
        and not is_pure_call(node)
    ]
    dropped = drop_assertions(graph)
    if dropped:
        remarks.append(f"{dropped} run-time assertions of the traced model were dropped")
    names = input_names(exported.call_spec.in_spec, call.parameters)
    signature = Signature(
        parameters=call.parameters,
        positional=len(call.args),
        input_names=names,
        fixed=fixed,
        in_spec=exported.call_spec.in_spec,
        out_spec=exported.call_spec.out_spec,
        output_names=output_names(exported.call_spec.out_spec, taken=names),
        symbols=symbols,
        ranges=ranges,
        defaults=call.defaults,
    )
    program = Program(graph, constants, signature, remarks=tuple(remarks))
    program.samples = (signature.flatten(call.args, call.kwargs),)
    program.drop_dead_constants()
    return program


def _drop_invented_modules(graph: Graph) -> None:
    """Forget the module that torch names for nodes of no module, after the hook that does so."""
    for node in graph.nodes:
        stack = node.meta.get("nn_module_stack") or {}
        if any(key.startswith("_empty_nn_module_stack") for key in stack):
            del node.meta["nn_module_stack"]


def _side_effects(exported: ExportedProgram) -> list[str]:
    """Refuse writes into buffers; return remarks on writes into inputs."""
    lifted = {
        spec.arg.name: str(spec.target)
        for spec in exported.graph_signature.input_specs
        if spec.kind is not InputKind.USER_INPUT
    }
    buffers: list[tuple[str, Node | None]] = [
        (str(spec.target), None)
        for spec in exported.graph_signature.output_specs
        if spec.kind is OutputKind.BUFFER_MUTATION
    ]
    remarks = []
    for written, operator in written_inputs(exported.graph).items():
        if written.name in lifted:
            buffers.append((lifted[written.name], operator))
        else:
            remarks.append(
                f"forward writes into its input {written.name!r}; the optimized program leaves "
                "the caller's tensor alone"
            )
    for name, writer in buffers:
        raise CaptureError(
            f"forward writes into the buffer {name!r}",
            where=writer,
            hint="a deployed graph has no state: return the new value as an output, or do not "
            "update it in evaluation mode",
        )
    return remarks


def _unlift(
    exported: ExportedProgram,
) -> tuple[Graph, dict[str, Constant], dict[int, object]]:
    """Copy the graph with parameters as ``get_attr`` and user inputs as placeholders."""
    lifted, fixed = _inputs(exported)
    graph = Graph()
    mapping: dict[Node, Any] = {}
    constants: dict[str, Constant] = {}
    owners: dict[int, Node] = {}  # tied weights are one constant
    for node in exported.graph.nodes:
        if node.op == "placeholder" and node.name in lifted:
            if not node.users:
                continue
            name, value = lifted[node.name]
            if id(value) not in owners:
                constants[name] = value.detach()
                owners[id(value)] = graph.create_node("get_attr", name, name=node.name)
                owners[id(value)].meta = {"val": node.meta.get("val")}
            mapping[node] = owners[id(value)]
        elif node.op == "placeholder" and isinstance(node.meta.get("val"), (Tensor, torch.SymInt)):
            mapping[node] = graph.node_copy(node)
        elif node.op == "get_attr":
            constants[str(node.target)] = _attribute(exported.graph_module, str(node.target))
            mapping[node] = graph.node_copy(node)
        elif node.op == "call_function":
            mapping[node] = graph.node_copy(node, lambda n: mapping[n])
        elif node.op == "output":
            graph.output(map_arg(_user_outputs(exported, node), lambda n: mapping[n]))
    return graph, constants, fixed


def _inputs(
    exported: ExportedProgram,
) -> tuple[dict[str, tuple[str, Tensor]], dict[int, object]]:
    """Lifted inputs by placeholder name, and constant leaves by position among user inputs."""
    lifted: dict[str, tuple[str, Tensor]] = {}
    fixed: dict[int, object] = {}
    state = {**exported.constants, **exported.state_dict}
    position = 0
    for spec in exported.graph_signature.input_specs:
        if spec.kind is InputKind.USER_INPUT:
            if isinstance(spec.arg, ConstantArgument):
                fixed[position] = spec.arg.value
            position += 1
        elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            assert spec.target is not None
            value = state.get(spec.target)
            if not isinstance(value, Tensor):
                raise CaptureError(f"the exported program lacks the value of {spec.target!r}")
            lifted[spec.arg.name] = (spec.target, value)
        else:
            raise UnsupportedError(
                f"the model uses {spec.target!r}, a {spec.kind.name.lower()} input",
                hint="script objects and tokens cannot be deployed; compute this outside",
            )
    return lifted, fixed


def _user_outputs(exported: ExportedProgram, output: Node) -> tuple[Any, ...]:
    """The output arguments that the user sees, without those that report mutated inputs."""
    specs = exported.graph_signature.output_specs
    kept = []
    for spec, value in zip(specs, output.args[0], strict=True):  # type: ignore[arg-type]
        if spec.kind is OutputKind.USER_OUTPUT:
            kept.append(spec.arg.value if isinstance(spec.arg, ConstantArgument) else value)
    return tuple(kept)


def _attribute(module: GraphModule, target: str) -> Constant:
    value: Any = module
    for part in target.split("."):
        value = getattr(value, part)
    if isinstance(value, GraphModule):
        return value
    if isinstance(value, Tensor):
        return value.detach()
    raise UnsupportedError(f"the traced graph holds {target!r}, a {type(value).__name__}")
