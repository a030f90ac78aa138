"""Set options in recipes that somebody else wrote: the padding mask, and the bound on the error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

from planish.passes.base import Contract, Pass
from planish.passes.quantize.keep_float import KeepFloat
from planish.passes.recipe import Recipe


def with_padding_mask(recipe: Recipe, name: str) -> Recipe | None:
    """A recipe whose passes leave padding out, by this input; None where no pass can.

    A pass that names a mask of its own keeps it.
    """
    seen: list[Pass] = []

    def change(pass_: Pass) -> Pass:
        options = {f.name: f.default for f in fields(pass_)}
        if "padding_mask" not in options:
            return pass_
        changes: dict[str, Any] = {"padding_mask": name}
        changed = pass_
        if getattr(pass_, "padding_mask", None) == options["padding_mask"]:
            try:
                changed = replace(pass_, **changes)
            except ValueError:  # its other options leave nothing to mask
                return pass_
        seen.append(pass_)
        return changed

    changed = _each(recipe, change)
    return changed if seen else None


def with_bound(recipe: Recipe, **bounds: float | None) -> Recipe:
    """A recipe that keeps a bound on the error: in its ``keep-float``, else in one more pass.

    Args:
        recipe: which.
        bounds: options of ``keep-float``; None leaves one as it is.
    """
    given: dict[str, Any] = {name: value for name, value in bounds.items() if value is not None}
    if not given:
        return recipe

    def change(pass_: Pass) -> Pass:
        return replace(pass_, **given) if isinstance(pass_, KeepFloat) else pass_

    changed = _each(recipe, change)

    def bounded(one: Recipe) -> Recipe:
        lossy = any(p.contract is Contract.LOSSY for p in one.passes)
        if not lossy or any(isinstance(p, KeepFloat) for p in one.passes):
            return one
        return replace(one, passes=(*one.passes, KeepFloat(**given)))

    texts = {n: str(bounded(Recipe.parse(text))) for n, text in changed.alternatives.items()}
    return replace(bounded(changed), alternatives=texts)


def with_choice(recipe: Recipe, include: tuple[str, ...], exclude: tuple[str, ...]) -> Recipe:
    """A recipe that quantizes only the operators that match, on top of what it says itself.

    Args:
        recipe: which.
        include: patterns of ``Where``; they take the place of those of the recipe.
        exclude: likewise; they are added to those of the recipe.
    """

    def change(pass_: Pass) -> Pass:
        if all(f.name != "where" for f in fields(pass_)):
            return pass_
        where: Any = getattr(pass_, "where", None)
        chosen = replace(
            where, include=include or where.include, exclude=(*where.exclude, *exclude)
        )
        changes: dict[str, Any] = {"where": chosen}
        return replace(pass_, **changes)

    return _each(recipe, change) if include or exclude else recipe


def _each(recipe: Recipe, change: Callable[[Pass], Pass]) -> Recipe:
    """A recipe with every pass exchanged, those of its alternatives too."""
    texts = {
        name: str(_each(Recipe.parse(text), change)) for name, text in recipe.alternatives.items()
    }
    return replace(recipe, passes=tuple(map(change, recipe.passes)), alternatives=texts)
