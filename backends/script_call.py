"""The caller's signature and output structure in the types that TorchScript has.

    tensors, tuples of anything                 as they are
    lists of tensors                            List[Tensor]; any other list a tuple
    dicts of tensors                            Dict[str, Tensor]
    other dicts, dataclasses, ModelOutputs      a named tuple of the same fields; where a key is no
                                                identifier, a plain tuple
    None, numbers and strings that were
    constants at capture                        parameters with that default

What had to change its form is told in a remark.
"""

from __future__ import annotations

import hashlib
import keyword
import re
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Dict, List, NamedTuple, Optional, Tuple  # noqa: UP035 - TorchScript's own

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils import _pytree as pytree

from planish.backends.script_text import Names
from planish.ir.program import Program
from planish.ir.trees import leaf_paths

_MAPPINGS = (dict, OrderedDict, defaultdict)
_IDENTIFIER = re.compile(r"[A-Za-z]\w*$")
TENSOR = "Tensor"
_TYPING: Mapping[str, Any] = {
    "Tensor": Tensor,
    "Dict": Dict,  # noqa: UP006
    "List": List,  # noqa: UP006
    "Optional": Optional,
    "Tuple": Tuple,  # noqa: UP006
}


@dataclass
class Types:
    """Named tuples that the source mentions.

    Attributes:
        names: of everything in the source; a variable must not hide a named tuple.
        named: name -> ((field, type), ...).
    """

    names: Names
    named: dict[str, tuple[tuple[str, str], ...]] = field(default_factory=dict)
    _chosen: dict[tuple[Any, ...], str] = field(default_factory=dict)

    def name(self, wanted: str, fields: tuple[tuple[str, str], ...]) -> str:
        """The name of a named tuple with these fields."""
        if (wanted, fields) not in self._chosen:
            name = self.names.new(wanted.lstrip("_") or "Output")
            self._chosen[wanted, fields] = name
            self.named[name] = fields
        return self._chosen[wanted, fields]

    def classes(self) -> dict[str, type]:
        """The named tuples as Python classes, for the compiler to find.

        torch keeps every class it has compiled for as long as the process lives, under its full
        name. So the module's part of that name stands for all the fields.
        """
        space: dict[str, Any] = dict(_TYPING)
        digest = hashlib.sha256(repr(sorted(self.named.items())).encode()).hexdigest()[:16]
        for name, fields in self.named.items():
            typed = [(f, eval(kind, space)) for f, kind in fields]  # texts made in this file alone
            space[name] = NamedTuple(name, typed)
            space[name].__module__ = f"planish_file.types_{digest}"
        return {name: space[name] for name in self.named}


@dataclass(frozen=True)
class Shown:
    """One node of a structure: its type, and how to write or take it apart."""

    type: str
    build: Callable[[list[str]], str]  # texts of its leaves -> an expression
    leaves: Callable[[str], list[str]]  # text of the whole -> expressions of its leaves
    tree: Any  # how flat inputs fill it, as JSON; see script_run


def structure(
    spec: pytree.TreeSpec,
    kinds: list[tuple[str, Any]],
    types: Types,
    remark: Callable[[str], None],
    what: str,
) -> Shown:
    """A pytree in TorchScript's types.

    Args:
        spec: the structure.
        kinds: for each leaf its type and what stands for it in JSON; consumed from the front.
        types: takes the named tuples.
        remark: told what changed its form.
        what: how remarks call it: "the output".
    """
    if spec.is_leaf():
        kind, tree = kinds.pop(0)
        return Shown(kind, lambda texts: texts[0], lambda whole: [whole], tree)
    part = what if what.startswith("a part of ") else f"a part of {what}"
    children = [structure(c, kinds, types, remark, part) for c in spec.children()]
    same = {child.type for child in children}
    if spec.type is list and len(same) == 1 and children:
        return _list(children)
    if spec.type in _MAPPINGS and len(same) == 1 and all(isinstance(k, str) for k in _keys(spec)):
        return _dict(children, _keys(spec))
    names = _fields(spec)
    if spec.type is tuple or names is None:
        if spec.type is not tuple:
            remark(f"{what} is a {spec.type.__name__}; TorchScript makes it a tuple")
        return _tuple(children)
    own: str = (spec.context if isinstance(spec.context, type) else spec.type).__name__
    if not _is_namedtuple(spec):
        remark(f"{what} is a {own}; TorchScript makes it a named tuple of the same fields")
    wanted = "Output" if spec.type in _MAPPINGS else own
    fields = tuple(zip(names, (c.type for c in children), strict=True))
    return _named(children, types.name(wanted, fields), names)


def _is_namedtuple(spec: pytree.TreeSpec) -> bool:
    return hasattr(spec.context, "_fields") or hasattr(spec.type, "_fields")


def _keys(spec: pytree.TreeSpec) -> list[Any]:
    context = spec.context
    return list(context[1] if spec.type is defaultdict else context)


def _fields(spec: pytree.TreeSpec) -> list[str] | None:
    """Names for the children that a named tuple can have; None where there are none."""
    if spec.type in (tuple, list):
        return None
    paths = [path[0] for path in leaf_paths(_shallow(spec))] if spec.num_children else []
    good = all(_IDENTIFIER.match(p) and not _taken_field(p) for p in paths)
    return paths if paths and good else None


def _taken_field(name: str) -> bool:
    return keyword.iskeyword(name) or hasattr(tuple, name)  # "count" and "index"


def _shallow(spec: pytree.TreeSpec) -> pytree.TreeSpec:
    leaf = pytree.tree_structure(0)
    return pytree.TreeSpec(spec.type, spec.context, [leaf] * spec.num_children)


def _split(children: list[Shown], texts: list[str]) -> Iterator[str]:
    rest = list(texts)
    for child in children:
        count = len(child.leaves(""))
        yield child.build(rest[:count])
        rest = rest[count:]


def _each(children: list[Shown], access: Callable[[int], str]) -> list[str]:
    return [leaf for i, c in enumerate(children) for leaf in c.leaves(access(i))]


def _list(children: list[Shown]) -> Shown:
    return Shown(
        f"List[{children[0].type}]",
        lambda texts: f"[{', '.join(_split(children, texts))}]",
        lambda whole: _each(children, lambda i: f"{whole}[{i}]"),
        {"list": [c.tree for c in children]},
    )


def _dict(children: list[Shown], keys: list[str]) -> Shown:
    def build(texts: list[str]) -> str:
        pairs = zip(keys, _split(children, texts), strict=True)
        return "{" + ", ".join(f"{k!r}: {v}" for k, v in pairs) + "}"

    return Shown(
        f"Dict[str, {children[0].type}]",
        build,
        lambda whole: _each(children, lambda i: f"{whole}[{keys[i]!r}]"),
        {"dict": {k: c.tree for k, c in zip(keys, children, strict=True)}},
    )


def _tuple(children: list[Shown]) -> Shown:
    inner = ", ".join(c.type for c in children)
    return Shown(
        f"Tuple[{inner}]" if children else "Tuple[()]",
        lambda texts: "(" + "".join(f"{t}, " for t in _split(children, texts)).rstrip() + ")",
        lambda whole: _each(children, lambda i: f"{whole}[{i}]"),
        {"tuple": [c.tree for c in children]},
    )


def _named(children: list[Shown], name: str, fields: list[str]) -> Shown:
    return Shown(
        name,
        lambda texts: f"{name}({', '.join(_split(children, texts))})",
        lambda whole: _each(children, lambda i: f"{whole}.{fields[i]}"),
        {"tuple": [c.tree for c in children]},
    )


def constant_type(value: object) -> str:
    """The type of a parameter that was a constant at capture."""
    if value is None:
        return "Optional[Tensor]"
    return type(value).__name__ if isinstance(value, (bool, int, float, str)) else "Any"


def kind_of(node: object, program: Program) -> str:
    """The type of a flat value: a tensor or a number."""
    if not isinstance(node, Node):
        return constant_type(node)
    value = node.meta["val"]
    if isinstance(value, Tensor):
        return TENSOR
    pairs: Mapping[type, str] = {
        torch.SymInt: "int",
        torch.SymFloat: "float",
        torch.SymBool: "bool",
    }
    return pairs.get(type(value), type(value).__name__)
