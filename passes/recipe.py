"""A recipe: which passes run, with which options, for which target, under which seed.

A string is the name of a registered recipe, else a path that ends in ``.yaml`` or ``.yml``, else
text in the grammar of ``planish.passes.spec``::

    exact
    my_recipe.yaml
    seed=3,fold-batch-norm,sparsify{pattern=2:4},my_package.module:MyPass

A text runs exactly the passes it names, in that order; the name of a registered recipe among them
stands for that recipe's passes (but for ``int8``, which chooses among others and stands alone). The
same as YAML::

    target: onnxruntime-cpu
    seed: 3
    passes:
      - fold-batch-norm
      - sparsify:
          pattern: 2:4
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from planish.ir.errors import RecipeError
from planish.passes import yamlform
from planish.passes.base import Pass
from planish.passes.bind import bind, build
from planish.passes.recipe_table import RECIPES as RECIPES  # also from here
from planish.passes.registry import load_class, load_pass, name_of, pass_names
from planish.passes.spec import (
    Entries,
    Item,
    Items,
    Scalar,
    Tree,
    quote,
    read_text,
    suggestion,
    write_name,
    write_text,
)
from planish.passes.unbind import entries_of, unbind

_SETTINGS: Mapping[str, object] = {
    "target": str | None,
    "seed": int,
    "choices": dict[str, str],
    "alternatives": dict[str, str],
}
_SUFFIXES = (".yaml", ".yml")
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Recipe:
    """An ordered list of passes and what else decides the result.

    Attributes:
        passes: in the order in which they run.
        target: what to lower for; None leaves it to the caller.
        seed: of everything random.
        choices: decisions that were measured on some machine, by their name; replaying a recipe
            takes them as they are instead of measuring again.
        alternatives: recipes as text, by their names, one of which may take the place of the
            passes: the one whose file runs fastest, if that is faster than the file that the
            passes make. What came out of it has no alternatives, so replaying it measures nothing.
    """

    passes: tuple[Pass, ...] = ()
    target: str | None = None
    seed: int = 0
    choices: Mapping[str, str] = field(default_factory=dict, hash=False)
    alternatives: Mapping[str, str] = field(default_factory=dict, hash=False)

    @classmethod
    def parse(cls, text: str) -> Recipe:
        """Read a recipe's name, path or text.

        Raises:
            RecipeError: no such pass or option, a bad value, a malformed or missing file.
        """
        if text.strip() in RECIPES:
            items = _items(text.strip())
            return _assemble(items, _settings_of(items))
        if text.endswith(_SUFFIXES):
            return cls.load(text)
        items = read_text(text)
        if not items:
            raise RecipeError("the recipe is empty", hint="write 'none' to run no passes")
        return _assemble(items, _settings_of(items))

    @classmethod
    def from_yaml(cls, text: str) -> Recipe:
        """Read a recipe from YAML.

        Raises:
            RecipeError: as ``parse``, or the text is not YAML; says at which line.
        """
        tree = yamlform.read(text)
        if not isinstance(tree, Entries):
            raise RecipeError(
                "a recipe in YAML is a mapping", where=tree.at, hint="write 'passes:' and a list"
            )
        entries = dict(tree.entries)
        for name in entries:
            if name not in (*_SETTINGS, "passes"):
                raise RecipeError(
                    f"a recipe has no entry {name!r}",
                    where=entries[name].at,
                    hint=suggestion(name, (*_SETTINGS, "passes"), "entries"),
                )
        if "passes" not in entries:
            raise RecipeError("the recipe lists no passes", hint="write 'passes:' and a list")
        listed = entries.pop("passes")
        if not isinstance(listed, Items):
            raise RecipeError(
                "'passes' is no list", where=listed.at, hint="begin entries with '- '"
            )
        items = [_yaml_item(tree, number) for number, tree in enumerate(listed.items, 1)]
        return _assemble(items, entries)

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a recipe from a YAML file."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(
                f"the recipe file cannot be read: {error}",
                where=str(path),
                hint=f"give a readable file, or a registered recipe: {', '.join(RECIPES)}",
            ) from error
        try:
            return cls.from_yaml(text)
        except RecipeError as error:
            where = f"{path}, {error.where}" if error.where else str(path)
            raise RecipeError(error.what, where=where, hint=error.hint) from error

    def to_yaml(self) -> str:
        """The recipe as YAML, every option written out, so that no later default changes it.

        Raises:
            RecipeError: an option holds what a recipe cannot; names it.
        """
        entries = list(self._settings())
        steps: list[Tree] = []
        for position, pass_ in enumerate(self.passes):
            name = name_of(type(pass_))
            options = entries_of(pass_, _where(name, position + 1), defaults=True)
            steps.append(Entries(((name, options),)) if options.entries else Scalar(name))
        return yamlform.write(Entries((*entries, ("passes", Items(tuple(steps))))))

    def __str__(self) -> str:
        """The recipe as text, without options at their default; ``Recipe.parse`` reads it back.

        Raises:
            RecipeError: an option holds what a recipe cannot; names it.
        """
        parts = [f"{name}={write_text(tree)}" for name, tree in self._settings()]
        parts += [step_text(pass_, position) for position, pass_ in enumerate(self.passes, 1)]
        return ",".join(parts if self.passes else [*parts, "none"])

    def _settings(self) -> Iterable[tuple[str, Tree]]:
        plain = Recipe()
        for name, hint in _SETTINGS.items():
            value = getattr(self, name)
            if value != getattr(plain, name):
                yield name, unbind(value, hint, name)


def step_text(pass_: Pass, number: int | None = None) -> str:
    """One pass as a recipe writes it: ``sparsify{pattern=2:4}``.

    Raises:
        RecipeError: an option holds what a recipe cannot; names it.
    """
    name = name_of(type(pass_))
    # A text that ends in .yaml would be taken for a path.
    written = quote(name) if name.endswith(_SUFFIXES) else write_name(name)
    return written + options_text(pass_, number)


def options_text(pass_: Pass, number: int | None = None) -> str:
    """The options of a pass that differ from their defaults: ``{pattern=2:4}``, or nothing."""
    options = entries_of(pass_, _where(name_of(type(pass_)), number))
    return write_text(options) if options.entries else ""


def resolve(
    recipe: str | os.PathLike[str] | Recipe | Iterable[Pass],
    *,
    target: str | None = None,
    seed: int = 0,
) -> Recipe:
    """Turn whatever a caller may pass as a recipe into one.

    Args:
        recipe: a name, a path, text, a recipe, or passes.
        target: taken where the recipe itself names none.
        seed: taken where the recipe's own is 0.

    Raises:
        RecipeError: it is none of these, or malformed.
    """
    if isinstance(recipe, str):
        found = Recipe.parse(recipe)
    elif isinstance(recipe, os.PathLike):
        found = Recipe.load(Path(recipe))
    elif isinstance(recipe, Recipe):
        found = recipe
    else:
        found = Recipe(_instances(recipe))
    return replace(found, target=found.target or target, seed=found.seed or seed)


def _instances(passes: object) -> tuple[Pass, ...]:
    if isinstance(passes, Pass):
        raise RecipeError("the recipe is a single pass", hint="put it into a list: [pass]")
    if not isinstance(passes, Iterable):
        raise RecipeError(
            f"the recipe is a {type(passes).__name__}",
            hint="give a recipe's name, a path, text, a Recipe, or a list of passes",
        )
    found = []
    for position, item in enumerate(passes):
        if not isinstance(item, Pass):
            is_class = isinstance(item, type) and issubclass(item, Pass)
            raise RecipeError(
                f"entry {position} of the recipe is {item!r}, which is no pass",
                hint=f"make an instance: {item.__name__}()"
                if is_class
                else "a list holds instances of passes; names go into a string, with commas",
            )
        found.append(item)
    return tuple(found)


def _items(name: str) -> tuple[Item, ...]:
    return tuple(item for text in RECIPES[name] for item in read_text(text))


def _named(name: str, where: str) -> tuple[Pass, ...]:
    items = _items(name)
    if any(item.kind == "=" for item in items):
        raise RecipeError(
            f"the recipe {name!r} chooses among others by measurement, and stands alone",
            where=where,
            hint="name one of those it chooses from: "
            + ", ".join(known for known in RECIPES if known.startswith(f"{name}-")),
        )
    return tuple(pass_ for number, item in enumerate(items, 1) for pass_ in _passes(item, number))


def _assemble(items: Iterable[Item], settings: Mapping[str, Tree]) -> Recipe:
    """Build the passes of a recipe; ``items`` may also hold settings, already taken out."""
    passes: list[Pass] = []
    steps = [item for item in items if item.kind == "{"]
    for number, item in enumerate(steps, 1):
        passes.extend(_passes(item, number))
    values = {name: bind(tree, _SETTINGS[name], name) for name, tree in settings.items()}
    return Recipe(tuple(passes), **values)


def _passes(item: Item, number: int) -> tuple[Pass, ...]:
    """The pass an item names, or the passes of the recipe it names."""
    where = _where(item.name, number)
    assert isinstance(item.value, Entries)
    if item.name in RECIPES:
        if item.value.entries:
            raise RecipeError(f"the recipe {item.name!r} takes no options", where=where)
        return _named(item.name, where)
    return (_pass(item.name, item.value, f"{where} ({item.at})" if item.at else where, where),)


def _pass(name: str, options: Entries, place: str, where: str) -> Pass:
    try:
        cls = load_class(name) if ":" in name else load_pass(name)
    except RecipeError as error:
        hint = error.hint
        if ":" not in name and name not in pass_names():
            hint = suggestion(name, (*RECIPES, *pass_names()), "passes and recipes")
        raise RecipeError(error.what, where=place, hint=hint) from error
    found = build(cls, options, where)
    assert isinstance(found, Pass)
    return found


def _settings_of(items: Iterable[Item]) -> dict[str, Tree]:
    settings: dict[str, Tree] = {}
    for item in items:
        if item.kind != "=":
            continue
        if item.name not in _SETTINGS:
            raise RecipeError(
                f"a recipe has no setting {item.name!r}",
                where=item.at,
                hint=suggestion(item.name, _SETTINGS, "settings")
                + "; options of a pass go into braces: pass{option=value}",
            )
        if item.name in settings:
            raise RecipeError(f"{item.name} is given twice", where=item.at)
        settings[item.name] = item.value
    return settings


def _yaml_item(tree: Tree, number: int) -> Item:
    if isinstance(tree, Scalar):
        return Item(tree.text, "{", Entries(()), tree.at)
    if isinstance(tree, Entries) and len(tree.entries) == 1:
        name, options = tree.entries[0]
        if isinstance(options, Scalar) and not options.quoted and options.text == "":
            options = Entries((), options.at)
        if isinstance(options, Entries):
            return Item(name, "{", options, tree.at)
    raise RecipeError(
        f"entry {number} of 'passes' is not one pass",
        where=tree.at,
        hint="write '- name', or '- name:' with its options indented below the name",
    )


def _where(name: str, number: int | None) -> str:
    return f"pass {number}, {name}" if number is not None else name
