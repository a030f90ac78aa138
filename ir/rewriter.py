"""``Rewriter``: the only thing that edits a graph.

It gives each new node a type and a provenance, numbers the rewrite sites so that one of them can
be found by bisection, and tells listeners what happened.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.fx import Node
from torch.fx.node import Argument, Target, map_arg

from planish.ir.changes import Change, Listener, SiteCounter
from planish.ir.errors import PassError, PlanishError, source_line
from planish.ir.infer import fake_constant, infer_node
from planish.ir.ops import is_pure_call
from planish.ir.program import Program
from planish.ir.tensortype import SparseLayout, type_text
from planish.ir.typememo import TypeMemo

__all__ = ["Change", "Listener", "Rewriter", "SiteCounter", "rule_failed"]

# What a replacement inherits from the node it stands for.
_INHERITED = ("stack_trace", "nn_module_stack", "torch_fn")


@dataclass
class _Open:
    number: int
    rule: str
    root: str
    source: str | None
    anchor: Node
    added: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    replaced: list[tuple[str, str]] = field(default_factory=list)
    detail: str = ""
    edited: bool = False


class Rewriter:
    """Edits one program on behalf of one pass.

    Args:
        program: edited in place; the pipeline hands every pass a private clone.
        pass_name: stamped on new nodes.
        sites: the site counter of the pipeline run.
    """

    def __init__(self, program: Program, pass_name: str, sites: SiteCounter | None = None):
        self.program = program
        self.pass_name = pass_name
        self.sites = sites or SiteCounter()
        self.listeners: list[Listener] = []
        self.changes: list[Change] = []
        self._site: _Open | None = None
        self._stale: dict[Node, None] = {}
        self._wanted_names: dict[str, str] = {}
        self._types = TypeMemo(program)

    # -- sites --------------------------------------------------------------------------------

    @contextmanager
    def site(self, rule: str, root: Node) -> Iterator[bool]:
        """Open one rewrite site; yields whether the rewrite may be done.

        New nodes go right before ``root``. A site in which nothing was edited is not a change.

        Raises:
            PassError: the rewrite failed; names the rule and the node.
        """
        if self._site is not None:
            raise PassError(f"rule {rule} opened a site inside the site of {self._site.rule}")
        number = self.sites.take(rule, root.name)
        if number is None:
            yield False
            return
        opened = _Open(number, rule, root.name, source_line(root), root)
        self._site = opened
        try:
            yield True
        except PlanishError as error:
            error.within(f"rule {rule}", root)
            raise
        except Exception as error:  # whatever a rule may raise; all are reported alike
            raise rule_failed(rule, root, error) from error
        finally:
            self._site = None
        if not opened.edited:
            return
        self.changes.append(
            Change(
                opened.number,
                rule,
                opened.root,
                tuple(opened.removed),
                tuple(opened.added),
                opened.source,
                opened.detail,
                replaced=tuple(opened.replaced),
            )
        )

    def note(self, detail: str) -> None:
        """Add a sentence to the change of the open site."""
        self._opened().detail = detail

    def insert_before(self, node: Node) -> None:
        """Put the following new nodes before another node than the root."""
        self._opened().anchor = node

    def _opened(self) -> _Open:
        if self._site is None:
            raise PassError(f"pass {self.pass_name} edited the graph outside of a rewrite site")
        return self._site

    def _edit(self) -> _Open:
        site = self._opened()
        site.edited = True
        return site

    # -- edits --------------------------------------------------------------------------------

    def call(
        self,
        target: Target,
        args: Sequence[Argument] = (),
        kwargs: Mapping[str, Argument] | None = None,
        *,
        like: Node | Sequence[Node],
    ) -> Node:
        """Insert an operator call.

        Args:
            target: the operator.
            args: its arguments; nodes must come before the insertion point.
            kwargs: likewise.
            like: the node(s) it stands for; the first gives the source line and module path.

        Raises:
            PassError: the operator rejects the operands' types.
        """
        site = self._opened()
        sources = [like] if isinstance(like, Node) else list(like)
        value = self._types.of(target, tuple(args), dict(kwargs or {}))
        with self.program.graph.inserting_before(site.anchor):
            node = self.program.graph.call_function(
                target,  # type: ignore[arg-type]  # fx declares callables, operators are
                tuple(args),
                dict(kwargs or {}),
            )
        self._stamp(node, value, sources)
        return node

    def constant(
        self,
        tensor: Tensor,
        name: str,
        *,
        like: Node | None = None,
        layout: SparseLayout | None = None,
    ) -> Node:
        """Insert a new constant.

        Args:
            tensor: its value; must be new memory, or a constant of this program.
            name: the wished name; it is taken if free once the pass is done, so that a folded
                ``conv.weight`` is still called that.
            like: a node to take source information from.
            layout: sparse layout the values have.
        """
        site = self._opened()
        name = self._wanted_names.get(name, name)  # replaced again: the first name is still wished
        unique, count = name, 0
        while unique in self.program.constants:
            count += 1
            unique = f"{name}_{count}"
        tensor = tensor.detach()
        self.program.constants[unique] = tensor
        if layout is not None:
            self.program.layouts[unique] = layout
        if unique != name:
            self._wanted_names[unique] = name
        with self.program.graph.inserting_before(site.anchor):
            node = self.program.graph.create_node("get_attr", unique)
        self._stamp(node, fake_constant(self.program, tensor), [like] if like else [])
        return node

    def _stamp(self, node: Node, value: Any, sources: list[Node]) -> None:  # noqa: ANN401
        site = self._edit()
        for key in _INHERITED:
            if sources and key in sources[0].meta:
                node.meta[key] = sources[0].meta[key]
        node.meta["val"] = value
        node.meta["from"] = (self.pass_name, site.rule, tuple(s.name for s in sources))
        site.added.append(node.name)
        self.program.touch()
        for listener in self.listeners:
            listener.inserted(node)

    def replace(self, old: Node, new: Argument) -> None:
        """Let all users of ``old`` but what makes ``new`` read ``new``; erase what is dead then."""
        if new is old:
            return
        site = self._edit()
        if isinstance(new, Node):
            site.replaced.append((old.name, new.name))
        between = _made_from(new, set(site.added)) if isinstance(new, Node) else set()
        users = [user for user in old.users if user not in between]
        if not isinstance(new, Node) or not self._same_type(old, new):
            self._stale.update(dict.fromkeys(users))
        for user in users:
            _replace_in(user, old, new)
        self.program.touch()
        for listener in self.listeners:
            listener.replaced(old, new)
            for user in users:
                listener.modified(user)
        self.erase_if_dead(old)

    def set_args(
        self, node: Node, args: Sequence[Argument], kwargs: Mapping[str, Argument] | None = None
    ) -> None:
        """Change a node's arguments in place; its type is derived anew."""
        site = self._edit()
        before = list(node.all_input_nodes)
        node.args = tuple(args)
        if kwargs is not None:
            node.kwargs = dict(kwargs)
        node.meta["from"] = (self.pass_name, site.rule, (node.name,))
        site.replaced.append((node.name, node.name))
        self._stale[node] = None
        self.program.touch()
        for listener in self.listeners:
            listener.modified(node)
        for value in before:
            self.erase_if_dead(value)

    def erase_if_dead(self, node: Node) -> None:
        """Erase a node that nobody reads, and what it alone kept alive. Inputs stay."""
        pending = [node]
        while pending:
            dead = pending.pop()
            if dead.users or dead._erased or dead.op not in ("call_function", "get_attr"):
                continue
            if dead.op == "call_function" and not is_pure_call(dead):
                continue
            inputs = dead.all_input_nodes
            for listener in self.listeners:
                listener.erased(dead)
            self._leave_anchor(dead)
            self._stale.pop(dead, None)
            self._edit().removed.append(dead.name)
            self.program.graph.erase_node(dead)
            self.program.touch()
            pending.extend(inputs)

    def erase(self, node: Node) -> None:
        """Erase a node without users, pure or not (assertions, dead effects)."""
        for listener in self.listeners:
            listener.erased(node)
        inputs = node.all_input_nodes
        self._leave_anchor(node)
        self._stale.pop(node, None)
        self._edit().removed.append(node.name)
        self.program.graph.erase_node(node)
        self.program.touch()
        for value in inputs:
            self.erase_if_dead(value)

    def _leave_anchor(self, node: Node) -> None:
        site = self._opened()
        if site.anchor is node:
            site.anchor = node.next

    def _same_type(self, a: Node, b: Node) -> bool:
        symbols = self.program.signature.symbols
        return type_text(a.meta.get("val"), symbols) == type_text(b.meta.get("val"), symbols)

    # -- ending -------------------------------------------------------------------------------

    def finish(self) -> Program:
        """Bring types and names up to date after the last edit and return the program."""
        self._retype()
        self.program.drop_dead_constants()
        self._rename_constants()
        self.program.touch()
        return self.program

    def _retype(self) -> None:
        """Derive anew the types of edited nodes, and of what follows where a type changed."""
        if not self._stale:
            return
        pending = set(self._stale)
        symbols = self.program.signature.symbols
        for node in self.program.graph.nodes:
            if node not in pending or node.op != "call_function":
                continue
            before = type_text(node.meta.get("val"), symbols)
            node.meta["val"] = infer_node(self.program, node)
            if type_text(node.meta["val"], symbols) != before:
                pending.update(node.users)
        self._stale.clear()

    def _rename_constants(self) -> None:
        """Give new constants the names they wish for, where those have become free."""
        program = self.program
        renamed = {}
        for old, new in self._wanted_names.items():
            if old in program.constants and new not in program.constants:
                program.constants[new] = program.constants.pop(old)
                if old in program.layouts:
                    program.layouts[new] = program.layouts.pop(old)
                renamed[old] = new
        if renamed:
            for node in program.graph.find_nodes(op="get_attr"):
                node.target = renamed.get(str(node.target), node.target)


def rule_failed(rule: str, node: Node, error: Exception) -> PassError:
    """The error for a rule that raised something it should not."""
    return PassError(f"rule {rule} failed: {type(error).__name__}: {error}", where=node)


def _made_from(node: Node, names: set[str]) -> set[Node]:
    """A node and what it was computed from, as far as it is among the named ones."""
    found: set[Node] = set()
    pending = [node]
    while pending:
        current = pending.pop()
        if current.name in names and current not in found:
            found.add(current)
            pending.extend(current.all_input_nodes)
    return found


def _replace_in(user: Node, old: Node, new: Argument) -> None:
    """Replace a node by another, or by a plain value, in one user's arguments."""
    swapped = map_arg((user.args, user.kwargs), lambda n: new if n is old else n)
    user.args, user.kwargs = swapped
