"""Pytree structures as plain JSON, and back without importing or building anything unknown.

A file may name a class (a dataclass, a ``ModelOutput``). It is used where this process already
knows it; a file never makes planish import a module. Where it is unknown, a dict with the same
keys takes its place, and a remark says so.
"""

from __future__ import annotations

import re
import sys
from collections import OrderedDict, defaultdict, deque, namedtuple
from typing import Any

from torch.utils import _pytree as pytree
from torch.utils._pytree import TreeSpec

from planish.ir.errors import UnsupportedError

_PLAIN: dict[str, type] = {
    "tuple": tuple,
    "list": list,
    "dict": dict,
    "OrderedDict": OrderedDict,
    "deque": deque,
}
_NAMES = {kind: name for name, kind in _PLAIN.items()}
_FACTORIES: dict[str, Any] = {
    "None": None,
    **{f.__name__: f for f in (list, dict, set, int, float, str, tuple)},
}


def encode(value: object, what: str) -> Any:  # noqa: ANN401 - any JSON
    """A plain Python value as JSON that tells tuples from lists and keeps every float.

    Raises:
        UnsupportedError: it is made of anything else; ``what`` names it.
    """
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return {"float": value.hex()}
    if type(value) is complex:
        return {"complex": [value.real.hex(), value.imag.hex()]}
    if type(value) is list:
        return {"list": [encode(v, what) for v in value]}
    if type(value) is tuple:
        return {"tuple": [encode(v, what) for v in value]}
    if type(value) is dict:
        return {"dict": [[encode(k, what), encode(v, what)] for k, v in value.items()]}
    raise UnsupportedError(
        f"{what} holds a {type(value).__name__}, which cannot be saved",
        hint="only numbers, strings, None, and lists, tuples and dicts of them can",
    )


def decode(data: Any) -> Any:  # noqa: ANN401 - see encode
    """The value behind ``encode``'s JSON.

    Raises:
        ValueError: it is not such JSON.
    """
    if data is None or isinstance(data, (bool, int, str)):
        return data
    if isinstance(data, dict) and len(data) == 1:
        ((kind, content),) = data.items()
        if kind == "float":
            return float.fromhex(content)
        if kind == "complex":
            return complex(*map(float.fromhex, content))
        if kind == "list":
            return [decode(v) for v in content]
        if kind == "tuple":
            return tuple(decode(v) for v in content)
        if kind == "dict":
            return {decode(k): decode(v) for k, v in content}
    raise ValueError(f"unknown value {str(data)[:40]}")


def spec_to_json(spec: TreeSpec, what: str) -> Any:  # noqa: ANN401 - any JSON
    """A pytree structure as JSON.

    Raises:
        UnsupportedError: a class in it keeps more than names and numbers about its instances.
    """
    if spec.is_leaf():
        return None
    kind, context = spec.type, spec.context
    node: dict[str, Any] = {"children": [spec_to_json(c, what) for c in spec.children()]}
    if kind in _NAMES:
        return {**node, "kind": _NAMES[kind], "context": encode(context, what)}
    if kind is defaultdict:
        factory = getattr(context[0], "__name__", "None")
        if _FACTORIES.get(factory) is not context[0]:
            raise UnsupportedError(f"{what} holds a defaultdict of {factory}; it cannot be saved")
        return {**node, "kind": "defaultdict", "context": [factory, encode(context[1], what)]}
    if kind is namedtuple or pytree.is_namedtuple_class(kind):
        cls = context if kind is namedtuple else kind
        return {**node, "kind": "namedtuple", "class": class_name(cls), "keys": list(cls._fields)}
    return {
        **node,
        "kind": "class",
        "class": class_name(kind),
        "context": encode(context, f"{what} (a {class_name(kind)})"),
        "keys": child_keys(spec),
    }


def class_name(cls: type) -> str:
    """``module:qualified.name``."""
    return f"{cls.__module__}:{cls.__qualname__}"


def child_keys(spec: TreeSpec) -> list[str]:
    """What the children of one node are called: field names, keys or positions.

    Read off the structure alone: making an instance of the caller's class, with anything but
    tensors in it, could fail.
    """
    context = spec.context
    if spec.type is namedtuple or pytree.is_namedtuple_class(spec.type):
        context = (context if spec.type is namedtuple else spec.type)._fields
    candidates = [context]
    if isinstance(context, (list, tuple)) and len(context) == 2:
        # A dataclass has [set fields, unset fields], a defaultdict [factory, keys].
        candidates += context
    for keys in candidates if spec.type not in (tuple, list, deque) else []:
        if isinstance(keys, (list, tuple)) and len(keys) == spec.num_children:
            if all(isinstance(key, (str, int)) for key in keys):
                return [str(key) for key in keys]
    return [str(position) for position in range(spec.num_children)]


def leaf_paths(spec: TreeSpec) -> list[tuple[str, ...]]:
    """For every leaf, the keys that lead to it."""
    if spec.is_leaf():
        return [()]
    return [
        (key, *path)
        for key, child in zip(child_keys(spec), spec.children(), strict=True)
        for path in leaf_paths(child)
    ]


def known_class(name: str) -> type | None:
    """The class behind ``module:qualified.name`` where this process has it already."""
    module, _, path = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        # `vars` runs no code of the module, unlike getattr.
        found = vars(found).get(part) if hasattr(found, "__dict__") else None
    return found if isinstance(found, type) else None


def spec_from_json(data: Any, remarks: list[str]) -> TreeSpec:  # noqa: ANN401 - any JSON
    """The structure behind ``spec_to_json``'s JSON.

    Args:
        data: the JSON.
        remarks: gets a sentence for each class this process does not know.

    Raises:
        ValueError: it is not such JSON.
    """
    if data is None:
        return pytree.treespec_leaf()
    children = [spec_from_json(child, remarks) for child in data["children"]]
    kind = data["kind"]
    if kind in _PLAIN:
        return _checked(TreeSpec(_PLAIN[kind], decode(data["context"]), children))
    if kind == "defaultdict":
        factory, keys = data["context"]
        return _checked(TreeSpec(defaultdict, [_FACTORIES[factory], decode(keys)], children))
    keys = [str(key) for key in data["keys"]]
    cls = known_class(data["class"])
    if kind == "namedtuple":
        if cls is None or list(getattr(cls, "_fields", ())) != keys:
            # A namedtuple is nothing but its fields, so it can be made anew.
            cls = namedtuple(re.split(r"[.:]", data["class"])[-1], keys)  # type: ignore[misc,no-redef]
        return _checked(TreeSpec(namedtuple, cls, children))
    if kind != "class":
        raise ValueError(f"unknown structure {kind!r}")
    if cls is not None and cls in pytree.SUPPORTED_NODES:
        return _checked(TreeSpec(cls, decode(data["context"]), children))
    module = re.split(r":|\.(?=\w+$)", data["class"])[0]
    remarks.append(
        f"{data['class']} is not known to this process, so a dict takes its place; import {module} "
        "before loading to have it back"
    )
    return _checked(TreeSpec(dict, keys, children))


def _checked(spec: TreeSpec) -> TreeSpec:
    """Refuse keys that do not fit the children.

    Raises:
        ValueError: they do not.
    """
    keyed = spec.type in (dict, OrderedDict, defaultdict, namedtuple)
    keys = spec.context[1] if spec.type is defaultdict else spec.context
    keys = keys._fields if spec.type is namedtuple else keys
    if keyed and (not isinstance(keys, (list, tuple)) or len(keys) != spec.num_children):
        raise ValueError(f"{spec.num_children} values for the keys {keys}")
    return spec
