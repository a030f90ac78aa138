"""``Planted``: a copy of a real pass that does one of its rewrites wrong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from types import FunctionType
from typing import Any, ClassVar

from torch import Tensor
from torch.fx import Node
from torch.fx.node import Argument, Target

from planish.ir.changes import SiteCounter, site_key
from planish.ir.errors import RecipeError
from planish.ir.program import Program
from planish.ir.rewriter import Rewriter
from planish.ir.tensortype import SparseLayout
from planish.passes.base import Contract, Pass, PassContext, PassResult
from planish.passes.recipe import Recipe
from planish.passes.spec import suggestion
from planish.tools.bench.faults.catalogue import FAULTS
from planish.tools.bench.faults.spec import Fault, NotPlantedError, Plant, named_arguments

__all__ = ["MARK", "Planted", "PlantingRewriter"]

MARK = "planted "  # how the remark, and the detail of the change, of a planted site begin


@dataclass(frozen=True, kw_only=True)
class Planted(Pass):
    """A copy of a pass in which one rewrite goes wrong; all others are the real ones.

    Where the program has no such site, or the site is denied, it is the real pass. Otherwise it
    remarks ``planted FAULT at site N: RULE@NODE``, and the detail of the site's change says so.

    Attributes:
        inner: the real pass, as a recipe writes it.
        fault: a name in the catalogue.
        site: where, as ``rule@node``.
    """

    name: ClassVar[str] = "planted"
    contract: ClassVar[Contract] = Contract.EXACT

    inner: str
    fault: str
    site: str

    def __post_init__(self) -> None:
        if self.fault not in FAULTS:
            raise RecipeError(
                f"{self.name}: there is no fault {self.fault!r}",
                hint=suggestion(self.fault, FAULTS, "faults"),
            )
        if len(Recipe.parse(self.inner).passes) != 1:
            raise RecipeError(f"{self.name}: inner={self.inner!r} is not one pass")

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Run the copy.

        Raises:
            NotPlantedError: the site was there, and the fault found nothing to spoil.
        """
        fault = FAULTS[self.fault]
        planting = _Planting(fault, self.site, context)
        inner = Recipe.parse(self.inner).passes[0]
        changes = _do_extra(program, inner, planting)
        result = copy_of(inner, planting).run(program, context)
        if planting.plant is not None and not planting.plant.done:
            raise NotPlantedError(
                f"the fault {self.fault} changed nothing at {self.site}",
                hint="this is a mistake in the catalogue of faults",
            )
        return PassResult(result.program, (*changes, *result.changes), result.refusals)


class _Planting:
    """One fault on its way into one run of a pass."""

    def __init__(self, fault: Fault, site: str, context: PassContext):
        self.fault = fault
        self.site = site
        self.context = context
        self.plant: Plant | None = None

    def open(self, rewriter: PlantingRewriter, root: Node, number: int) -> Plant:
        """Begin to spoil a site."""
        given = named_arguments(root.target, root.args, root.kwargs)
        self.plant = Plant(rewriter, root, given, tuple(root.users))
        self.context.remark(f"{MARK}{self.fault.name} at site {number}: {self.site}")
        return self.plant


def copy_of(inner: Pass, planting: _Planting) -> Pass:
    """A pass of the same options and code, whose rewriter is one that spoils a site.

    The code that makes the rewriter, ``run`` or ``apply_rules``, looks it up among the globals of
    its module; the copy gets the same code with other globals.
    """
    cls = type(inner)
    methods: dict[str, Any] = {"__module__": __name__}
    for name in ("run", "apply_rules"):
        real: FunctionType = getattr(cls, name)
        known = {**real.__globals__, "Rewriter": partial(PlantingRewriter, planting=planting)}
        methods[name] = FunctionType(
            real.__code__, known, name, real.__defaults__, real.__closure__
        )
        methods[name].__kwdefaults__ = real.__kwdefaults__
    made: type[Pass] = type(f"Planted{cls.__name__}", (cls,), methods)
    return made(**{field.name: getattr(inner, field.name) for field in fields(inner)})


def _do_extra(program: Program, inner: Pass, planting: _Planting) -> tuple[Any, ...]:
    """Do the rewrite that no rule should do, if the fault is one."""
    fault = planting.fault
    if fault.extra is None or fault.candidates is None:
        return ()
    for root in fault.candidates(program):
        if site_key(fault.rule, root.name) == planting.site:
            context = planting.context
            rewriter = PlantingRewriter(program, inner.name, context.sites, planting=planting)
            with rewriter.site(fault.rule, root):
                pass  # the rewriter does it when the site closes
            rewriter.finish()
            return tuple(rewriter.changes)
    return ()


class PlantingRewriter(Rewriter):
    """A rewriter that lets one fault alter what goes through it at one site."""

    def __init__(
        self,
        program: Program,
        pass_name: str,
        sites: SiteCounter | None = None,
        *,
        planting: _Planting,
    ):
        super().__init__(program, pass_name, sites)
        self._planting = planting
        self._plant: Plant | None = None  # while the chosen site is open
        self._spoiled: Plant | None = None  # once it was

    @contextmanager
    def site(self, rule: str, root: Node) -> Iterator[bool]:
        """Open a site, and spoil it if it is the chosen one."""
        planting = self._planting
        chosen = planting.plant is None and site_key(rule, root.name) == planting.site
        with super().site(rule, root) as allowed:
            if not allowed or not chosen:
                yield allowed
                return
            assert self._site is not None
            plant = self._plant = self._spoiled = planting.open(self, root, self._site.number)
            try:
                yield True
                self._close(plant)
                said = self._site.detail
                self.note(f"{MARK}{planting.fault.name}" + (f"; {said}" if said else ""))
            finally:
                self._plant = None

    def _close(self, plant: Plant) -> None:
        # What an altered call no longer reads must not give the fault away.
        made = set(self._opened().added)
        for node in [n for n in self.program.nodes if n.name in made and not n.users]:
            self.erase_if_dead(node)
        for hook in (self._planting.fault.extra, self._planting.fault.at_close):
            if hook is not None:
                with self._honest():
                    hook(plant)
                plant.done = True

    @contextmanager
    def _honest(self) -> Iterator[None]:
        """While a hook works, nothing that it does is altered."""
        plant, self._plant = self._plant, None
        try:
            yield
        finally:
            self._plant = plant

    def call(
        self,
        target: Target,
        args: Sequence[Argument] = (),
        kwargs: Mapping[str, Argument] | None = None,
        *,
        like: Node | Sequence[Node],
    ) -> Node:
        """Insert an operator call, altered at the chosen site."""
        plant, hook = self._plant, self._planting.fault.on_call
        if plant is not None and hook is not None:
            with self._honest():
                altered = hook(plant, target, tuple(args), dict(kwargs or {}))
            if altered is not None:
                target, args, kwargs = altered
                plant.done = True
        return self._remember(super().call(target, args, kwargs, like=like))

    def constant(
        self,
        tensor: Tensor,
        name: str,
        *,
        like: Node | None = None,
        layout: SparseLayout | None = None,
    ) -> Node:
        """Insert a constant, altered at the chosen site."""
        plant, hook = self._plant, self._planting.fault.on_constant
        if plant is not None and hook is not None:
            with self._honest():
                altered = hook(plant, tensor, name)
            if altered is not None:
                tensor, plant.done = altered, True
        return self._remember(super().constant(tensor, name, like=like, layout=layout))

    def replace(self, old: Node, new: Argument) -> None:
        """Replace a node, by another one than the rule wished at the chosen site."""
        plant, hook = self._plant, self._planting.fault.on_replace
        if plant is not None and hook is not None:
            with self._honest():
                altered = hook(plant, old, new)
            if altered is not None:
                new, plant.done = altered, True
        super().replace(old, new)
        if isinstance(new, Node):
            self._remember(new)

    def set_args(
        self, node: Node, args: Sequence[Argument], kwargs: Mapping[str, Argument] | None = None
    ) -> None:
        """Change a node's arguments, to others than the rule wished at the chosen site."""
        plant, hook = self._plant, self._planting.fault.on_set_args
        if plant is not None and hook is not None:
            whole = dict(node.kwargs if kwargs is None else kwargs)
            with self._honest():
                altered = hook(plant, node, (node.target, tuple(args), whole))
            if altered is not None:
                _, args, kwargs = altered
                plant.done = True
        super().set_args(node, args, kwargs)
        self._remember(node)

    def _remember(self, node: Node) -> Node:
        if self._plant is not None:
            self._plant.last = node
        return node

    def finish(self) -> Program:
        """End the pass, and edit behind the rewriter's back if that is the fault."""
        program = super().finish()
        plant, hook = self._spoiled, self._planting.fault.at_finish
        if plant is not None and hook is not None:
            self._spoiled = None
            hook(plant)
            plant.done = True
            program.touch()
        return program
