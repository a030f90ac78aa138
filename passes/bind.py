"""From text to typed values: the fields of a dataclass give meaning to what a recipe says.

``planish.passes.unbind`` is the way back; ``bind(unbind(v, T), T) == v`` for every value of every
type that ``planish.passes.spec`` lists.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
from collections.abc import Mapping
from enum import Enum
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from planish.ir.errors import PlanishError, RecipeError
from planish.passes.spec import Entries, Items, Scalar, Tree, suggestion, write_text

_TRUE = frozenset({"true", "yes", "on"})
_FALSE = frozenset({"false", "no", "off"})
_NULL = frozenset({"null", "none", "~", ""})
_INT = re.compile(r"[+-]?[0-9]+")
_FLOAT = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?|[+-]?inf")
# The order in which the members of a union claim a bare scalar; a quoted one goes to strings first.
_CLAIM = (type(None), bool, int, float)


@dataclasses.dataclass(frozen=True)
class Option:
    """One option of a pass, or one field of a nested dataclass."""

    name: str
    hint: Any
    default: Any  # dataclasses.MISSING where it must be given

    @property
    def required(self) -> bool:
        """Whether there is no default."""
        return self.default is dataclasses.MISSING


@cache
def options_of(cls: type) -> tuple[Option, ...]:
    """The options of a frozen dataclass, in order.

    Raises:
        RecipeError: it is no frozen dataclass, or its annotations cannot be resolved.
    """
    if not dataclasses.is_dataclass(cls) or not cls.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        raise RecipeError(
            f"{cls.__qualname__} is no frozen dataclass",
            hint="decorate the class with @dataclass(frozen=True, kw_only=True)",
        )
    try:
        hints = get_type_hints(cls)
    except Exception as error:  # resolving annotations evaluates arbitrary expressions
        raise RecipeError(
            f"the annotations of {cls.__qualname__} cannot be resolved: {error}",
            hint="define the types of its options at the top level of its module",
        ) from error
    found = []
    for item in dataclasses.fields(cls):
        if item.init:
            default = item.default
            if item.default_factory is not dataclasses.MISSING:
                default = item.default_factory()
            found.append(Option(item.name, hints[item.name], default))
    return tuple(found)


def type_name(hint: Any) -> str:  # noqa: ANN401
    """A type as an error message or a help page shows it."""
    if hint is type(None):
        return "null"
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(type_name(member) for member in get_args(hint))
    if get_origin(hint) is Literal:
        return " or ".join(literal_text(value) for value in get_args(hint))
    if isinstance(hint, type) and issubclass(hint, Enum):
        return " or ".join(members_of(hint))
    if get_origin(hint) is None and isinstance(hint, type):
        return hint.__name__
    return str(hint).replace("typing.", "")


# -- text to value --------------------------------------------------------------------------------


def bind(tree: Tree, hint: Any, where: str) -> Any:  # noqa: ANN401
    """Give a tree of text the meaning of a type.

    Args:
        tree: what was written.
        hint: a type as ``typing.get_type_hints`` gives it.
        where: names the option, for messages.

    Raises:
        RecipeError: the text is no value of that type, or no recipe can hold that type.
    """
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return _bind_union(tree, get_args(hint), where)
    if origin is tuple:
        return _bind_tuple(tree, get_args(hint), where)
    if origin is dict or origin is Mapping:
        return _bind_dict(tree, get_args(hint), where)
    if origin is None and isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if not isinstance(tree, Entries):
            raise _wrong(tree, hint, where)
        return build(hint, tree, where)
    if not _is_scalar(hint):
        raise RecipeError(
            f"a recipe cannot hold a value of type {type_name(hint)}",
            where=where,
            hint="give the option a type that planish.passes.spec lists",
        )
    if not isinstance(tree, Scalar):
        raise _wrong(tree, hint, where)
    return _bind_scalar(tree, hint, where)


def build(cls: type, entries: Entries, where: str) -> Any:  # noqa: ANN401
    """Make a frozen dataclass from named values.

    Raises:
        RecipeError: an option is unknown, missing, malformed, or refused by the class itself.
    """
    options = {option.name: option for option in options_of(cls)}
    values: dict[str, Any] = {}
    for name, tree in entries.entries:
        if name not in options:
            raise RecipeError(
                f"there is no option {name!r}",
                where=_at(where, tree),
                hint=suggestion(name, options, "options"),
            )
        values[name] = bind(tree, options[name].hint, f"{where}.{name}")
    for option in options.values():
        if option.required and option.name not in values:
            raise RecipeError(
                f"option {option.name!r} is missing",
                where=_at(where, entries),
                hint=f"give it a value: {type_name(option.hint)}",
            )
    try:
        return cls(**values)
    except PlanishError as error:
        raise RecipeError(error.what, where=_at(where, entries), hint=error.hint) from error
    except (TypeError, ValueError) as error:  # what __post_init__ raises for bad values
        raise RecipeError(str(error), where=_at(where, entries)) from error


def _bind_scalar(scalar: Scalar, hint: Any, where: str) -> Any:  # noqa: ANN401
    text = scalar.text
    lower = text.lower()
    if hint is str:
        return text
    if hint is bool and lower in _TRUE | _FALSE:
        return lower in _TRUE
    if hint is int and _INT.fullmatch(text):
        return int(text)
    if hint is float and _FLOAT.fullmatch(lower):
        number = float(text)
        if math.isfinite(number) or lower.endswith("inf"):  # 1e999 is a slip, not infinity
            return number
    if hint is type(None) and not scalar.quoted and lower in _NULL:
        return None
    if get_origin(hint) is Literal:
        found = [value for value in get_args(hint) if literal_text(value) == text]
        # Literal["1", 1]: quotes tell the string from the number.
        found.sort(key=lambda value: isinstance(value, str) is not scalar.quoted)
        if found:
            return found[0]
    if isinstance(hint, type) and issubclass(hint, Enum):
        members = members_of(hint)
        if text in members:
            return members[text]
    raise _wrong(scalar, hint, where)


def _bind_union(tree: Tree, members: tuple[Any, ...], where: str) -> Any:  # noqa: ANN401
    order = sorted(members, key=lambda hint: _claim(hint, tree))
    failures = []
    for hint in order:
        try:
            return bind(tree, hint, where)
        except RecipeError as error:
            failures.append((hint, error))
    real = [error for hint, error in failures if hint is not type(None)]
    if len(real) == 1:
        raise real[0]
    raise _wrong(tree, Union[members], where)  # noqa: UP007 - built from a tuple


def _claim(hint: Any, tree: Tree) -> int:  # noqa: ANN401
    """Earlier members of a union get the first try at a value."""
    stringy = hint is str or get_origin(hint) is Literal or is_enum(hint)
    if isinstance(tree, Scalar) and tree.quoted:
        return -1 if stringy else 0
    if hint in _CLAIM:
        return _CLAIM.index(hint)
    return len(_CLAIM) + (2 if hint is str else 1 if stringy else 0)


def _bind_tuple(tree: Tree, members: tuple[Any, ...], where: str) -> tuple[Any, ...]:
    if not isinstance(tree, Items):
        raise RecipeError(
            f"{_shown(tree)} is no list",
            where=_at(where, tree),
            hint="write [a,b] or, in YAML, - a",
        )
    items = tree.items
    if len(members) == 2 and members[1] is Ellipsis:
        return tuple(bind(v, members[0], f"{where}[{i}]") for i, v in enumerate(items))
    if len(items) != len(members):
        raise RecipeError(
            f"the list has {len(items)} entries, not {len(members)}", where=_at(where, tree)
        )
    pairs = zip(items, members, strict=True)
    return tuple(bind(v, hint, f"{where}[{i}]") for i, (v, hint) in enumerate(pairs))


def _bind_dict(tree: Tree, members: tuple[Any, ...], where: str) -> dict[str, Any]:
    check_keys(members, where)
    if not isinstance(tree, Entries):
        raise RecipeError(
            f"{_shown(tree)} is no set of named values",
            where=_at(where, tree),
            hint="write {name=value}",
        )
    return {name: bind(v, members[1], f"{where}.{name}") for name, v in tree.entries}


def check_keys(members: tuple[Any, ...], where: str) -> None:
    """Raise a ``RecipeError`` where the keys of a dictionary type are not strings."""
    if len(members) != 2 or members[0] is not str:
        raise RecipeError("a recipe holds only dictionaries whose keys are strings", where=where)


def _wrong(tree: Tree, hint: Any, where: str) -> RecipeError:  # noqa: ANN401
    words = list(members_of(hint)) if is_enum(hint) else []
    if get_origin(hint) is Literal:
        words = [literal_text(value) for value in get_args(hint)]
    advice = f"give {type_name(hint)}"
    if words and isinstance(tree, Scalar):
        advice = suggestion(tree.text, words, "values")
    return RecipeError(
        f"{_shown(tree)} is not {type_name(hint)}", where=_at(where, tree), hint=advice
    )


def _shown(tree: Tree) -> str:
    return repr(tree.text) if isinstance(tree, Scalar) else write_text(tree)


def _at(where: str, tree: Tree) -> str:
    return f"{where} ({tree.at})" if tree.at else where


# -- kinds of types -------------------------------------------------------------------------------


def is_enum(hint: Any) -> bool:  # noqa: ANN401
    """Whether a type is an enumeration."""
    return isinstance(hint, type) and issubclass(hint, Enum)


def _is_scalar(hint: Any) -> bool:  # noqa: ANN401
    return (
        hint in (str, bool, int, float, type(None)) or get_origin(hint) is Literal or is_enum(hint)
    )


@cache
def members_of(hint: Any) -> Mapping[str, Enum]:  # noqa: ANN401
    """An enum's members by the text they are written as: their value, if all values are strings."""
    members = list(hint)
    if all(isinstance(member.value, str) for member in members):
        return {member.value: member for member in members}
    return {member.name: member for member in members}


def literal_text(value: object) -> str:
    """The text of one choice of a ``Literal``."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "null"
    return value.name if isinstance(value, Enum) else str(value)
