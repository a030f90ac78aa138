"""The verifier's rules on structure; ``planish.ir.verify`` holds the tables.

A rule is a generator of ``Fault``s: it looks, and never changes what it looks at.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node

from planish.ir.ops import is_pure, op_name, written_argument
from planish.ir.program import Program
from planish.ir.snapshot import Snapshot
from planish.ir.tensortype import dtype_name


@dataclass(frozen=True)
class Fault:
    """One broken invariant.

    Attributes:
        what: a sentence.
        node: where, if it is about a node.
    """

    what: str
    node: Node | None = None


@dataclass
class Subject:
    """What is verified: a program, and what is known of the one it came from.

    Attributes:
        program: what to look at.
        since: the program before the pass; None where there was none.
        snapshot: taken before the pass, of ``since``.
    """

    program: Program
    since: Program | None = None
    snapshot: Snapshot | None = None

    @cached_property
    def new_constants(self) -> dict[str, Tensor]:
        """Tensors that ``since`` does not hold, by name."""
        held = {id(c) for c in self.since.constants.values()} if self.since else set()
        constants = self.program.constants.items()
        return {k: c for k, c in constants if isinstance(c, Tensor) and id(c) not in held}


def lint(subject: Subject) -> Iterator[Fault]:
    """Names are unique, values come before their uses, and all nodes are of known kinds."""
    graph = subject.program.graph
    names: set[str] = set()
    seen: set[Node] = set()
    for node in graph.nodes:
        if node.op not in ("placeholder", "get_attr", "call_function", "output"):
            yield Fault(f"a program holds no {node.op} nodes", node)
        if node.graph is not graph:
            yield Fault("the node belongs to another graph", node)
        if node.name in names:
            yield Fault(f"the name {node.name!r} is taken twice", node)
        for operand in node.all_input_nodes:
            if operand not in seen:
                foreign = operand.graph is not graph or operand._erased
                how = "belongs to another graph" if foreign else "comes after it"
                yield Fault(f"it reads {operand.name}, which {how}", node)
            elif node not in operand.users:
                yield Fault(f"{operand.name} does not know this user", node)
        names.add(node.name)
        seen.add(node)


def one_output(subject: Subject) -> Iterator[Fault]:
    """The last node, and only it, is the output; it takes one flat tuple."""
    nodes = list(subject.program.nodes)
    outputs = [n for n in nodes if n.op == "output"]
    if len(outputs) != 1 or nodes[-1] is not outputs[0]:
        yield Fault(f"there are {len(outputs)} output nodes; one must end the graph")
        return
    output = outputs[0]
    if len(output.args) != 1 or not isinstance(output.args[0], (tuple, list)):
        yield Fault("the output node does not take one tuple", output)
    elif any(isinstance(v, (tuple, list, dict)) for v in output.args[0]):
        yield Fault("the outputs are nested; the structure belongs to the signature", output)


def no_dead_nodes(subject: Subject) -> Iterator[Fault]:
    """A pass leaves no operator without effect, and no constant, that nobody reads.

    What was dead before it is not its concern: traced models carry dead values along.
    """
    if subject.since is None:
        return
    dead_before = {n.name for n in subject.since.nodes if not n.users}
    for node in subject.program.nodes:
        if node.users or node.name in dead_before or node.op not in ("call_function", "get_attr"):
            continue
        if node.op == "get_attr" or is_pure(node.target):
            yield Fault("nobody reads this value", node)


def functional(subject: Subject) -> Iterator[Fault]:
    """No operator writes into its arguments."""
    for node in subject.program.operators:
        if written_argument(node.target) is not None:
            yield Fault(f"{op_name(node.target)} writes into its argument", node)


def typed(subject: Subject) -> Iterator[Fault]:
    """Every node says what it returns, in fake tensors."""
    program = subject.program
    for node in program.nodes:
        if node.op == "output" or _is_body(program, node):
            continue
        if "val" not in node.meta:
            yield Fault("the node has no type (meta['val'])", node)
        elif any(_is_real(v) for v in _leaves(node.meta["val"])):
            yield Fault("its type holds a real tensor, not a fake one", node)


def _is_body(program: Program, node: Node) -> bool:
    held = program.constants.get(str(node.target)) if node.op == "get_attr" else None
    return isinstance(held, GraphModule)


def _leaves(value: object) -> list[object]:
    return list(value) if isinstance(value, (tuple, list)) else [value]


def _is_real(value: object) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, FakeTensor)


def constants_present(subject: Subject) -> Iterator[Fault]:
    """Every constant that is read exists, every one that exists is read, and so for layouts."""
    program = subject.program
    read: dict[str, Node] = {}
    for node in program.graph.find_nodes(op="get_attr"):
        read.setdefault(str(node.target), node)
    for name, node in read.items():
        if name not in program.constants:
            yield Fault(f"there is no constant {name!r}", node)
    for name in program.constants:
        if name not in read:
            yield Fault(f"nobody reads the constant {name!r}")
    for name in program.layouts:
        if name not in program.constants:
            yield Fault(f"a sparse layout is claimed for {name!r}, which does not exist")


def constant_names(subject: Subject) -> Iterator[Fault]:
    """Names of constants make a module tree: none lies inside another."""
    names = subject.program.constants
    for name in names:
        parts = name.split(".")
        if not all(parts):
            yield Fault(f"the constant {name!r} has an empty part in its name")
        for end in range(1, len(parts)):
            outer = ".".join(parts[:end])
            if outer in names:
                yield Fault(f"the constant {name!r} lies inside the constant {outer!r}")


def constants_plain(subject: Subject) -> Iterator[Fault]:
    """Constants hold data, every element of it, and carry no gradient."""
    for name, value in subject.program.constants.items():
        if not isinstance(value, Tensor):
            continue
        if value.requires_grad:
            yield Fault(f"the constant {name!r} requires a gradient")
        if isinstance(value, FakeTensor) or value.is_meta:
            yield Fault(f"the constant {name!r} holds no data")
        elif value.layout is not torch.strided:
            yield Fault(f"the constant {name!r} is stored as {value.layout}, not densely")


def constants_not_nan(subject: Subject) -> Iterator[Fault]:
    """A new constant holds no NaN, unless the program before held some."""
    if subject.since is None:
        return
    bad = [name for name, value in subject.new_constants.items() if _has_nan(value)]
    if not bad or any(_has_nan(c) for c in subject.since.constants.values()):
        return
    for name in bad:
        yield Fault(f"the new constant {name!r} holds NaN, which no constant did before")


def _has_nan(value: object) -> bool:
    if not isinstance(value, Tensor) or not value.numel():
        return False
    if value.is_complex():
        value = torch.view_as_real(value)
    if not value.is_floating_point():
        return False
    if value.element_size() == 1:  # 8-bit floats have no reductions
        value = value.to(torch.float32)
    return bool(value.amin().isnan())  # amin hands NaN on, and makes no copy


def constants_unwritten(subject: Subject) -> Iterator[Fault]:
    """Nobody wrote into a tensor that the program before holds."""
    if subject.snapshot is not None:
        for name in subject.snapshot.written():
            yield Fault(f"{name} was written in place; a pass makes a new tensor instead")


def inputs_match(subject: Subject) -> Iterator[Fault]:
    """There is one plain placeholder for each tensor input of the signature."""
    program = subject.program
    names = program.signature.tensor_names
    if len(program.placeholders) != len(names):
        yield Fault(f"{len(program.placeholders)} placeholders for {len(names)} inputs")
    for node in program.placeholders:
        if node.args or node.kwargs:
            yield Fault("a placeholder has no default value", node)


def outputs_match(subject: Subject) -> Iterator[Fault]:
    """There are as many outputs as the caller's structure has leaves and names."""
    program = subject.program
    count, signature = len(program.results), program.signature
    for declared, what in (
        (signature.out_spec.num_leaves, "leaves in the output structure"),
        (len(signature.output_names), "output names"),
    ):
        if count != declared:
            yield Fault(f"{count} outputs for {declared} {what}", program.output)


def samples_match(subject: Subject) -> Iterator[Fault]:
    """Every sample fits the placeholders: count, element types, ranks, and sizes."""
    program = subject.program
    for number, sample in enumerate(program.samples):
        if len(sample) != len(program.placeholders):
            yield Fault(f"sample {number} has {len(sample)} of {len(program.placeholders)} inputs")
            continue
        sizes: dict[Any, int] = {}
        for node, value in zip(program.placeholders, sample, strict=True):
            problem = _misfit(node.meta.get("val"), value, sizes)
            if problem:
                yield Fault(f"sample {number} {problem}", node)


def _misfit(declared: object, value: object, sizes: dict[Any, int]) -> str | None:
    """Say how a sample's value contradicts its placeholder; ``sizes`` collects the symbols'."""
    if isinstance(declared, Tensor) != isinstance(value, Tensor):
        return f"is a {type(value).__name__}"
    if not isinstance(declared, Tensor) or not isinstance(value, Tensor):
        return None
    if declared.dtype != value.dtype:
        return f"is {dtype_name(value.dtype)}, not {dtype_name(declared.dtype)}"
    if declared.dim() != value.dim():
        return f"has {value.dim()} axes, not {declared.dim()}"
    for axis, (dim, size) in enumerate(zip(declared.shape, value.shape, strict=True)):
        if isinstance(dim, int):
            known: int | None = dim
        else:
            known = sizes.setdefault(dim.node.expr, size)
        if size != known:
            return f"has size {size} on axis {axis}, not {known}"
    return None
