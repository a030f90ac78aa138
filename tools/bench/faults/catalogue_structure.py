"""Faults that break what a program is, rather than what it computes: types, names, memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import SymInt, Tensor
from torch.fx import Node

from planish.ir.infer import infer
from planish.ir.program import Program
from planish.ir.tensortype import SparseLayout
from planish.tools.bench.faults.sabotage import followed_by, nodes_of, recalled
from planish.tools.bench.faults.spec import Fault, NotPlantedError, Plant

aten = torch.ops.aten

# -- stale metadata -------------------------------------------------------------------------------

_stale = partial(Fault, kind="stale metadata", inner="simplify-layout")


def _claim(make: Callable[[Program, Node], Any]) -> Callable[[Plant], None]:
    """Let the node that was written last claim another type."""

    def finish(plant: Plant) -> None:
        node = plant.node()
        node.meta["val"] = make(plant.program, node)

    return finish


def _static(program: Program, node: Node) -> Any:  # noqa: ANN401
    """The type with the sample's size for every symbol."""
    sample = program.samples[0][0].shape
    declared = program.placeholders[0].meta["val"].shape
    known = dict(zip(map(str, declared), sample, strict=True))
    shape = [known.get(str(s), s) if isinstance(s, SymInt) else s for s in node.meta["val"].shape]
    with program.fake_mode:
        return torch.empty(shape, dtype=node.meta["val"].dtype)


def _edited_behind(plant: Plant) -> None:
    """Other sizes for a reshape, and the old type."""
    node = plant.node()
    sizes: Any = node.args[1]
    node.args = (node.args[0], [*sizes[:2], sizes[2] // 2, sizes[3] * 2])


_METADATA: tuple[Fault, ...] = (
    _stale(
        name="type-of-another-shape",
        model="dinov2-s",
        rule="NumberSizes",
        nth=3,
        at_finish=_claim(lambda program, node: infer(program, aten.transpose.int, (node, -1, -2))),
    ),
    _stale(
        name="type-of-another-element",
        model="minilm",
        inner="remove-identities",
        rule="DropExpand",
        nth=2,
        at_finish=_claim(
            lambda program, node: infer(program, aten.to.dtype, (node, torch.float16))
        ),
    ),
    _stale(
        name="type-of-the-sample",
        model="dinov2-s",
        rule="NumberSizes",
        nth=8,
        at_finish=_claim(_static),
    ),
    _stale(
        name="type-not-updated",
        model="dinov2-s",
        rule="NumberSizes",
        nth=5,
        at_finish=_edited_behind,
    ),
    _stale(
        name="type-of-a-real-tensor",
        model="minilm",
        inner="remove-identities",
        rule="DropExpand",
        nth=4,
        at_finish=_claim(lambda program, node: torch.zeros(2, 12, 128, 32)),
    ),
    _stale(
        name="type-of-a-constant",
        model="efficientnet-lite0",
        inner="fold-batch-norm",
        rule="batch-norm-into-producer",
        nth=12,
        at_finish=lambda plant: _mistyped_constant(plant),
    ),
)


def _mistyped_constant(plant: Plant) -> None:
    """A bias that claims to be longer than it is."""
    bias = next(n for n in reversed(plant.node().all_input_nodes) if n.op == "get_attr")
    bias.meta["val"] = infer(plant.program, aten.cat.default, ([bias, bias],))


# -- structure ------------------------------------------------------------------------------------

_identity = partial(Fault, inner="remove-identities", rule="DropIdentity", model="minilm")


def _later(plant: Plant) -> None:
    """Put a value behind the first node that reads it."""
    node = next(n for n in plant.program.operators if len(n.users) > 1)
    next(iter(node.users)).append(node)


def _unread(plant: Plant) -> None:
    """Compute something for nobody."""
    x = next(value for value in plant.given.values() if isinstance(value, Node))
    plant.rewriter.call(aten.relu.default, (x,), like=x)


def _constant_read_by(plant: Plant, target: Any = aten.linear.default) -> Node:  # noqa: ANN401
    """A weight that the root of a linear reads."""
    for node in plant.program.graph.find_nodes(op="call_function", target=target):
        if isinstance(node.args[1], Node) and node.args[1].op == "get_attr":
            return node.args[1]
    raise NotPlantedError("there is no linear")


def _rename(plant: Plant) -> None:
    _constant_read_by(plant).target = "no.such.weight"


def _read_another(plant: Plant) -> None:
    """Read the next constant of the same shape."""
    reader = _constant_read_by(plant)
    own = plant.program.constants[str(reader.target)]
    assert isinstance(own, Tensor)
    reader.target = next(
        name
        for name, value in plant.program.constants.items()
        if isinstance(value, Tensor) and value is not own and value.shape == own.shape
    )
    plant.program.drop_dead_constants()


def _orphan(plant: Plant) -> None:
    plant.program.constants["orphan"] = torch.ones(3)


def _without_data(plant: Plant) -> None:
    name = str(_constant_read_by(plant).target)
    held = plant.program.constants[name]
    assert isinstance(held, Tensor)
    plant.program.constants[name] = torch.empty_like(held, device="meta")


def _with_gradient(plant: Plant) -> None:
    name = str(_constant_read_by(plant).target)
    held = plant.program.constants[name]
    assert isinstance(held, Tensor)
    plant.program.constants[name] = held.clone().requires_grad_()


def _sparse(plant: Plant) -> None:
    name = str(_constant_read_by(plant).target)
    plant.program.layouts[name] = SparseLayout(2, 4, axis=1)


_STRUCTURE: tuple[Fault, ...] = (
    _identity(name="value-after-its-reader", kind="wrong order", nth=5, at_finish=_later),
    _identity(name="dead-operator-left", kind="dead node", nth=2, at_close=_unread),
    _identity(name="constant-of-no-such-name", kind="wrong constant", nth=6, at_finish=_rename),
    _identity(
        name="constant-of-another-layer", kind="wrong constant", nth=6, at_finish=_read_another
    ),
    _identity(name="constant-nobody-reads", kind="dead node", nth=1, at_finish=_orphan),
    _identity(name="constant-without-data", kind="wrong constant", nth=4, at_finish=_without_data),
    _identity(
        name="constant-with-gradient", kind="wrong constant", nth=4, at_finish=_with_gradient
    ),
    _identity(name="layout-not-so", kind="wrong constant", nth=3, at_finish=_sparse),
    Fault(
        name="relu-in-place",
        kind="in-place operator",
        model="crnn-english-g2",
        inner="eliminate-common-subexpressions",
        rule="MergeEqual",
        nth=1,
        candidates=nodes_of(aten.relu.default),
        extra=recalled(aten.relu_.default),
    ),
    Fault(
        name="input-written",
        kind="in-place operator",
        model="dinov2-s",
        inner="fold-scale-shift",
        rule="scale-shift-into-consumers",
        candidates=nodes_of(aten.conv2d.default),
        extra=lambda plant: _written_input(plant),
    ),
)


def _written_input(plant: Plant) -> None:
    """Scale the caller's pictures where they are, and back."""
    x = plant.program.placeholders[0]
    twice = plant.rewriter.call(aten.mul_.Tensor, (x, 2.0), like=plant.root)
    half = plant.rewriter.call(aten.mul.Tensor, (twice, 0.5), like=plant.root)
    plant.rewriter.set_args(plant.root, (half, *plant.root.args[1:]), dict(plant.root.kwargs))


# -- the contract with the caller -----------------------------------------------------------------

_contract = partial(
    Fault, inner="remove-identities", rule="DropIdentity", model="transformers/bert-qa"
)


def _outputs(change: Callable[[tuple[Any, ...]], tuple[Any, ...]]) -> Callable[[Plant], None]:
    def finish(plant: Plant) -> None:
        output = plant.program.output
        output.args = (change(plant.program.results),)

    return finish


def _signature(**changed: Any) -> Callable[[Plant], None]:  # noqa: ANN401
    def finish(plant: Plant) -> None:
        plant.program.signature = replace(plant.program.signature, **changed)

    return finish


def _another_input(plant: Plant) -> None:
    """One more placeholder, which is given the first one's type."""
    first = plant.program.placeholders[0]
    with plant.program.graph.inserting_before(first):
        added = plant.program.graph.placeholder("extra")
    added.meta["val"] = first.meta["val"]


def _samples(change: Callable[[Tensor], Tensor] | None) -> Callable[[Plant], None]:
    def finish(plant: Plant) -> None:
        samples = plant.program.samples
        plant.program.samples = (
            tuple(tuple(change(value) for value in sample) for sample in samples) if change else ()
        )

    return finish


_CONTRACT: tuple[Fault, ...] = (
    _contract(
        name="output-dropped", kind="dropped output", nth=2, at_finish=_outputs(lambda r: r[:1])
    ),
    _contract(
        name="outputs-swapped",
        kind="wrong output order",
        nth=3,
        at_finish=_outputs(lambda r: (r[1], r[0])),
    ),
    _contract(
        name="output-twice",
        kind="wrong output order",
        nth=4,
        at_finish=_outputs(lambda r: (r[0], r[0])),
    ),
    _contract(
        name="output-of-another-type",
        kind="lost dtype",
        nth=1,
        rule="DropIdentity",
        candidates=lambda program: [program.results[1]],
        extra=followed_by(aten.to.dtype, torch.float16),
    ),
    _contract(
        name="output-renamed",
        kind="changed signature",
        nth=5,
        at_finish=_signature(output_names=("end_logits", "start_logits")),
    ),
    _contract(
        name="sizes-narrowed",
        kind="changed signature",
        nth=6,
        at_finish=lambda plant: _signature(
            ranges={name: (low, 8) for name, (low, _) in plant.program.signature.ranges.items()}
        )(plant),
    ),
    _contract(name="input-added", kind="changed signature", nth=2, at_finish=_another_input),
    _contract(name="samples-dropped", kind="changed signature", nth=1, at_finish=_samples(None)),
    _contract(
        name="samples-replaced",
        kind="changed signature",
        nth=7,
        at_finish=_samples(torch.ones_like),
    ),
)

# -- the caller's memory --------------------------------------------------------------------------

_write = partial(
    Fault,
    kind="aliased weight edited",
    model="efficientnet-lite0",
    inner="fold-batch-norm",
    rule="batch-norm-into-producer",
    writes=True,
)


def _weight_of(plant: Plant) -> Tensor:
    """The weight of the convolution in front of the batch norm."""
    held = plant.program.constant(plant.given["input"].args[1])
    if held is None:
        raise NotPlantedError("the convolution reads no constant")
    return held


def _numpy_write(plant: Plant, tensor: Tensor, name: str) -> Tensor:
    _weight_of(plant).numpy().reshape(-1)[0] *= 2.0
    return tensor


def _whole_numpy_write(plant: Plant, tensor: Tensor, name: str) -> Tensor:
    _weight_of(plant).numpy()[...] *= 2.0
    return tensor


def _torch_write(plant: Plant, tensor: Tensor, name: str) -> Tensor:
    _weight_of(plant).mul_(2.0)
    return tensor


def _data_write(plant: Plant, tensor: Tensor, name: str) -> Tensor:
    _weight_of(plant).data.mul_(2.0)
    return tensor


_MEMORY: tuple[Fault, ...] = (
    _write(name="weight-scaled-in-place", nth=5, on_constant=_torch_write),
    # Where earlier passes changed something, the answers to compare with are from before the write.
    _write(
        name="weight-scaled-through-data",
        model="crnn-english-g2",
        nth=1,
        on_constant=_data_write,
    ),
    _write(
        name="weight-scaled-through-numpy",
        model="crnn-english-g2",
        nth=2,
        on_constant=_whole_numpy_write,
    ),
    _write(
        name="element-written-through-numpy",
        model="crnn-english-g2",
        nth=2,
        on_constant=_numpy_write,
        silent="torch does not count writes through NumPy, and of each tensor only 64 bytes are "
        "looked at after a pass; reading all of them would cost more than the pass",
    ),
    _write(
        name="sample-written-in-place",
        kind="write into the caller's tensor",
        nth=2,
        at_close=lambda plant: _write_sample(plant),
    ),
    _write(
        name="statistics-written-in-place",
        nth=10,
        at_close=lambda plant: _write_statistics(plant),
    ),
)


def _write_sample(plant: Plant) -> None:
    plant.program.samples[0][0].mul_(0.5)


def _write_statistics(plant: Plant) -> None:
    """Reset a running mean that was folded and is not needed any more."""
    node = next(
        n
        for n in plant.program.graph.find_nodes(op="call_function", target=aten.batch_norm.default)
    )
    held = plant.program.constant(node.args[3])
    assert held is not None
    held.zero_()


FAULTS: tuple[Fault, ...] = (*_METADATA, *_STRUCTURE, *_CONTRACT, *_MEMORY)
