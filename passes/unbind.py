"""From typed values to text: how options are printed; the way back of ``planish.passes.bind``."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin

from planish.ir.errors import RecipeError
from planish.passes.bind import (
    bind,
    check_keys,
    is_enum,
    literal_text,
    members_of,
    options_of,
    type_name,
)
from planish.passes.spec import Entries, Items, Scalar, Tree, is_bare


def unbind(value: object, hint: Any, where: str, *, defaults: bool = False) -> Tree:  # noqa: ANN401
    """Write a value as the tree from which ``bind`` reads it back.

    Args:
        value: what an option holds.
        hint: the type of the option.
        where: names the option, for messages.
        defaults: also write options of nested dataclasses that have their default value.

    Raises:
        RecipeError: the value is not of that type, or a recipe cannot hold it.
    """
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return _unbind_union(value, get_args(hint), where, defaults)
    if origin is tuple:
        return _unbind_tuple(value, get_args(hint), where, defaults)
    if origin is dict or origin is Mapping:
        check_keys(get_args(hint), where)
        if not isinstance(value, Mapping) or not all(isinstance(k, str) for k in value):
            raise _misfit(value, hint, where)
        item = get_args(hint)[1]
        return Entries(
            tuple(
                (_text(k, where), unbind(v, item, f"{where}.{k}", defaults=defaults))
                for k, v in value.items()
            )
        )
    if origin is None and isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if type(value) is not hint:
            raise _misfit(value, hint, where)
        return entries_of(value, where, defaults=defaults)
    return _unbind_scalar(value, hint, where)


def entries_of(value: Any, where: str, *, defaults: bool = False) -> Entries:  # noqa: ANN401
    """The options of a frozen dataclass as a tree; those at their default only on demand."""
    entries: list[tuple[str, Tree]] = []
    cls: type = type(value)
    for option in options_of(cls):
        place = f"{where}.{option.name}"
        tree = unbind(getattr(value, option.name), option.hint, place, defaults=defaults)
        if not defaults and not option.required:
            # Trees are compared, not values: 1, 1.0 and True are equal, their texts are not.
            if tree == unbind(option.default, option.hint, place):
                continue
        entries.append((option.name, tree))
    return Entries(tuple(entries))


def _unbind_scalar(value: object, hint: Any, where: str) -> Scalar:  # noqa: ANN401
    if hint is str and isinstance(value, str):
        return _string(value, where)
    if hint is bool and isinstance(value, bool):
        return Scalar("true" if value else "false")
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int and number and isinstance(value, int):
        return Scalar(str(int(value)))
    if hint is float and number:
        real = float(value)  # type: ignore[arg-type]  # a number, see above
        if math.isnan(real):
            raise RecipeError(
                "NaN is no option", where=where, hint="it equals nothing, itself included"
            )
        return Scalar(repr(real))
    if hint is type(None) and value is None:
        return Scalar("null")
    if get_origin(hint) is Literal:
        for choice in get_args(hint):
            if choice == value and type(choice) is type(value):
                clash = [c for c in get_args(hint) if literal_text(c) == literal_text(value)]
                text = literal_text(value)
                quoted = isinstance(value, str) and (len(clash) > 1 or not is_bare(text))
                return Scalar(text, quoted)
    if is_enum(hint) and isinstance(value, hint):
        text = next(text for text, member in members_of(hint).items() if member is value)
        return Scalar(text, not is_bare(text))
    raise _misfit(value, hint, where)


def _unbind_union(value: object, members: tuple[Any, ...], where: str, defaults: bool) -> Tree:
    exact = [hint for hint in members if hint is type(value)]
    for hint in (*exact, *(h for h in members if h not in exact)):
        try:
            tree = unbind(value, hint, where, defaults=defaults)
        except RecipeError:
            continue  # not of this member; the last resort below reports
        variants = [tree]
        if isinstance(tree, Scalar) and not tree.quoted:
            variants.append(Scalar(tree.text, quoted=True))
        for variant in variants:
            if _reads_back(variant, value, members, where):
                return variant
        if type(value) is int and hint is float:
            return tree  # 3 for an option of type float | None reads back as 3.0
    raise _misfit(value, Union[members], where)  # noqa: UP007 - built from a tuple


def _reads_back(tree: Tree, value: object, members: tuple[Any, ...], where: str) -> bool:
    try:
        again = bind(tree, Union[members], where)  # noqa: UP007 - built from a tuple
    except RecipeError:
        return False
    return bool(again == value) and type(again) is type(value)


def _unbind_tuple(value: object, members: tuple[Any, ...], where: str, defaults: bool) -> Items:
    if not isinstance(value, tuple):
        raise _misfit(value, tuple, where)
    if len(members) == 2 and members[1] is Ellipsis:
        members = (members[0],) * len(value)
    if len(members) != len(value):
        raise RecipeError(f"it has {len(value)} entries, not {len(members)}", where=where)
    return Items(
        tuple(
            unbind(v, hint, f"{where}[{i}]", defaults=defaults)
            for i, (v, hint) in enumerate(zip(value, members, strict=True))
        )
    )


def _string(value: str, where: str) -> Scalar:
    return Scalar(_text(value, where), not is_bare(value))


def _text(value: str, where: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RecipeError(f"{value!r} is not valid Unicode text", where=where) from None
    return str(value)


def _misfit(value: object, hint: Any, where: str) -> RecipeError:  # noqa: ANN401
    return RecipeError(
        f"a {type(value).__name__} cannot be written as {type_name(hint)}",
        where=where,
        hint="options hold the types that planish.passes.spec lists, and match their annotations",
    )
