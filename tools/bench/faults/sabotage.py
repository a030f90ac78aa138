"""Ways to spoil a rewrite, out of which the catalogue is made. All are deterministic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node

from planish.ir.execute import run
from planish.ir.ops import is_op
from planish.ir.program import Program
from planish.ir.rederive import same_type
from planish.tools.bench.faults.spec import (
    Call,
    NotPlantedError,
    Plant,
    named_arguments,
    written_arguments,
)

aten = torch.ops.aten

CallHook = Callable[[Plant, Any, tuple[Any, ...], dict[str, Any]], Call | None]
ConstantHook = Callable[[Plant, Tensor, str], Tensor | None]
Candidates = Callable[[Program], list[Node]]
Edit = Callable[[Plant, dict[str, Any]], dict[str, Any]]  # named arguments to the changed ones


# -- calls ----------------------------------------------------------------------------------------


def in_call(*targets: OpOverload, edit: Edit) -> CallHook:
    """Alter the named arguments of the calls of some operators; ``edit`` returns the new ones."""

    def hook(
        plant: Plant,
        target: Any,  # noqa: ANN401
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Call | None:
        if target not in targets:
            return None
        named = named_arguments(target, args, kwargs)
        changed = named | edit(plant, dict(named))
        if changed == named:
            raise NotPlantedError(f"the arguments of {target} are such already")
        return written_arguments(target, changed)

    return hook


def instead_of(old: OpOverload, new: OpOverload, edit: Edit = lambda _, named: named) -> CallHook:
    """Call another operator; ``edit`` turns the arguments of the old one into those of the new."""

    def hook(
        plant: Plant,
        target: Any,  # noqa: ANN401
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Call | None:
        if target is not old:
            return None
        return written_arguments(new, edit(plant, named_arguments(target, args, kwargs)))

    return hook


def put(**values: Any) -> Edit:  # noqa: ANN401 - whatever an operator takes
    """Set arguments."""
    return lambda plant, named: values


def through(name: str, target: OpOverload, *args: Any) -> Edit:  # noqa: ANN401
    """Pass an argument through one more operator."""

    def edit(plant: Plant, named: dict[str, Any]) -> dict[str, Any]:
        return {name: plant.rewriter.call(target, (named[name], *args), like=plant.root)}

    return edit


def swap(a: str, b: str) -> Edit:
    """Exchange two arguments."""
    return lambda plant, named: {a: named[b], b: named[a]}


# -- constants ------------------------------------------------------------------------------------


def in_constant(change: Callable[[Tensor], Tensor], ends: str = "") -> ConstantHook:
    """Alter the values of the new constants whose name ends so."""

    def hook(plant: Plant, tensor: Tensor, name: str) -> Tensor | None:
        return change(tensor) if name.endswith(ends) else None

    return hook


BatchNorm = Callable[[Tensor, Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]


def batch_norm(formula: BatchNorm) -> ConstantHook:
    """Fold a batch norm by a wrong formula.

    Args:
        formula: ``(gamma, beta, mean, var, eps)`` to the scale and shift ``(s, t)``, in float64.
    """

    def hook(plant: Plant, tensor: Tensor, name: str) -> Tensor | None:
        gamma, beta, mean, var = (
            plant.tensor(role).double()
            for role in ("weight", "bias", "running_mean", "running_var")
        )
        eps = float(plant.given["eps"])
        scale = gamma / (var + eps).sqrt()
        wrong_scale, wrong_shift = formula(gamma, beta, mean, var, eps)
        # The rule wrote s W and s b + t; recover W and b, and do it wrong.
        ratio = torch.where(scale == 0, torch.ones_like(scale), wrong_scale / scale)
        if tensor.dim() > 1:
            changed = tensor.double() * ratio.reshape(-1, *[1] * (tensor.dim() - 1))
        else:
            changed = (tensor.double() - (beta - scale * mean)) * ratio + wrong_shift
        return changed.to(tensor.dtype)

    return hook


def noise(share: float) -> Callable[[Tensor], Tensor]:
    """Add other random numbers at every call, as large as a share of the tensor's own."""

    def change(tensor: Tensor) -> Tensor:
        # A generator without a seed is the fault: whoever runs the pass again gets other numbers.
        generator = torch.Generator()
        generator.seed()
        drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        return tensor + (drawn * float(tensor.abs().mean()) * share).to(tensor.dtype)

    return change


def poisoned(number: float) -> Callable[[Tensor], Tensor]:
    """Set the middle element."""

    def change(tensor: Tensor) -> Tensor:
        changed = tensor.clone()
        changed.view(-1)[changed.numel() // 2] = number
        return changed

    return change


# -- replacements ---------------------------------------------------------------------------------


def replace_by(
    make: Callable[[Plant, Any], Any],
) -> Callable[[Plant, Node, Any], Any]:
    """Let the users of the root, and only of it, read what ``make`` gives for the right value."""

    def hook(plant: Plant, old: Node, new: Any) -> Any:  # noqa: ANN401 - a node or a number
        return make(plant, new) if old is plant.root else None

    return hook


def then(target: OpOverload, *args: Any) -> Callable[[Plant, Any], Any]:  # noqa: ANN401
    """Put one more operator behind the right value."""
    return lambda plant, new: plant.rewriter.call(target, (new, *args), like=plant.root)


# -- rewrites that no rule should do --------------------------------------------------------------


def nodes_of(*targets: Any, where: Callable[[Node, Program], bool] | None = None) -> Candidates:  # noqa: ANN401
    """The operators of some kinds, in order."""
    return lambda program: [
        n for n in program.operators if is_op(n, *targets) and (where is None or where(n, program))
    ]


def drop(name: str = "") -> Callable[[Plant], None]:
    """Replace the root by its first tensor argument, or a named one."""

    def extra(plant: Plant) -> None:
        chosen = plant.given[name] if name else plant.root.args[0]
        plant.rewriter.replace(plant.root, chosen)

    return extra


def edited(edit: Edit) -> Callable[[Plant], None]:
    """Set other arguments of the root."""

    def extra(plant: Plant) -> None:
        assert isinstance(plant.root.target, OpOverload)
        named = dict(plant.given)
        _, args, kwargs = written_arguments(plant.root.target, named | edit(plant, named))
        plant.rewriter.set_args(plant.root, args, kwargs)

    return extra


def recalled(target: OpOverload, edit: Edit = lambda _, named: named) -> Callable[[Plant], None]:
    """Replace the root by a call of another operator with arguments made from its own."""

    def extra(plant: Plant) -> None:
        _, args, kwargs = written_arguments(target, edit(plant, dict(plant.given)))
        new = plant.rewriter.call(target, args, kwargs, like=plant.root)
        plant.rewriter.replace(plant.root, new)

    return extra


def recomputed(argument: str, change: Callable[[Tensor], Tensor]) -> Callable[[Plant], None]:
    """Let the root read a new constant, made from the one it reads."""

    def extra(plant: Plant) -> None:
        assert isinstance(plant.root.target, OpOverload)
        source = plant.given[argument]
        values = change(plant.tensor(argument))
        new = plant.rewriter.constant(values, str(source.target), like=plant.root)
        named = dict(plant.given) | {argument: new}
        _, args, kwargs = written_arguments(plant.root.target, named)
        plant.rewriter.set_args(plant.root, args, kwargs)

    return extra


def followed_by(target: OpOverload, *args: Any) -> Callable[[Plant], None]:  # noqa: ANN401
    """Let the users of the root read one more operator applied to it."""

    def extra(plant: Plant) -> None:
        plant.rewriter.insert_before(plant.root.next)
        new = plant.rewriter.call(target, (plant.root, *args), like=plant.root)
        plant.rewriter.replace(plant.root, new)

    return extra


def like_earlier(node: Node, program: Program) -> Node | None:
    """An earlier node of the same operator, first operand and type, though not of the same value.

    Of constants: an earlier one of the same type.
    """
    for other in program.nodes:
        if other is node:
            return None
        if other.op != node.op or (node.op != "get_attr" and other.target is not node.target):
            continue
        if node.op == "get_attr":
            same = other.target != node.target and bool(other.users)
        else:
            same = other.args[:1] == node.args[:1]
        if same and "val" in node.meta and same_type(other.meta.get("val"), node.meta["val"]):
            return other
    return None


def merged_with_earlier(plant: Plant) -> None:
    """Replace the root by the earlier node that looks like it."""
    equal = like_earlier(plant.root, plant.program)
    if equal is None:
        raise NotPlantedError(f"nothing looks like {plant.root.name}")
    plant.rewriter.replace(plant.root, equal)


def alike(*targets: Any) -> Candidates:  # noqa: ANN401
    """Operators of some kinds that look like an earlier one."""
    return nodes_of(*targets, where=lambda node, program: like_earlier(node, program) is not None)


def constants_named(ends: str) -> Candidates:
    """Reads of constants whose names end so, and that look like an earlier one."""
    return lambda program: [
        node
        for node in program.graph.find_nodes(op="get_attr")
        if str(node.target).endswith(ends) and like_earlier(node, program) is not None
    ]


def sample_value(node: Node, program: Program) -> Any:  # noqa: ANN401
    """What a node computes on the first sample."""
    found: dict[str, Any] = {}

    def observe(seen: Node, value: Any) -> None:  # noqa: ANN401
        if seen.name == node.name:
            found[node.name] = value

    run(program, program.samples[0], observe=observe)
    return found[node.name]


def folded_at_sample(plant: Plant) -> None:
    """Replace the root by the constant, or the number, that it is on the sample."""
    value = sample_value(plant.root, plant.program)
    new = value
    if isinstance(value, Tensor):
        new = plant.rewriter.constant(value.clone(), "folded.sample", like=plant.root)
    plant.rewriter.replace(plant.root, new)
