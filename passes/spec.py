"""How the options of a pass are written: the published grammar, YAML, and typed values.

The grammar (white space between tokens means nothing)::

    recipe  = item, { ",", item }, [ "," ] ;
    item    = setting | step ;
    setting = ( "target" | "seed" | "choices" | "alternatives" ), "=", value ;
    step    = name, [ options ] ;           (* a pass, module:Class, or a registered recipe *)
    options = "{", [ option, { ",", option }, [ "," ] ], "}" ;
    option  = name, "=", value ;
    value   = scalar | list | options ;
    list    = "[", [ value, { ",", value }, [ "," ] ], "]" ;
    scalar  = word | quoted ;
    name    = word | quoted ;
    word    = character, { character } ;    (* not white space and none of  , = { } [ ] "  *)
    quoted  = a JSON string ;

For example ``fold-batch-norm,sparsify{pattern=2:4,where={include=[encoder, "my layer"]}}``.

Both notations are first read into a tree of plain text (``Scalar``, ``Items``, ``Entries``); only
the type of the dataclass field that takes a value gives it a meaning. So ``2:4`` and ``off`` are
strings where a string is wanted, whatever YAML thinks of them. Types an option may have: ``str``,
``int``, ``float``, ``bool``, ``None``, ``Literal``, ``Enum``, ``tuple``, ``dict[str, ...]``,
frozen dataclasses, and unions of these. Where a union leaves room for doubt, a quoted scalar is a
string and a bare one is not, if it can be something else.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from planish.ir.errors import RecipeError


@dataclass(frozen=True)
class Scalar:
    """A single piece of text; ``quoted`` if it was written in quotes, ``at`` says where."""

    text: str
    quoted: bool = False
    at: str = field(default="", compare=False)


@dataclass(frozen=True)
class Items:
    """A list."""

    items: tuple[Tree, ...]
    at: str = field(default="", compare=False)


@dataclass(frozen=True)
class Entries:
    """Named values, in order; the names are distinct."""

    entries: tuple[tuple[str, Tree], ...]
    at: str = field(default="", compare=False)


Tree = Scalar | Items | Entries


@dataclass(frozen=True)
class Item:
    """One top-level item of a recipe: a setting (``kind="="``) or a step (``kind="{"``)."""

    name: str
    kind: str
    value: Tree
    at: str = field(default="", compare=False)


NO_OPTIONS = Entries(())
DEEPEST = 40  # nesting beyond this is a mistake, and must not overflow the stack
_BARE = re.compile(r"[A-Za-z0-9_.+-][A-Za-z0-9_.+:/-]*")
_TOKEN = re.compile(
    r'\s*(?:(?P<mark>[,={}\[\]])|(?P<quoted>"(?:[^"\\]|\\.)*")|(?P<word>[^\s,={}\[\]"]+))'
)


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word most like this one, or None where nothing is near."""
    found = difflib.get_close_matches(word, sorted(known), n=1, cutoff=0.5)
    return found[0] if found else None


def suggestion(word: str, known: Iterable[str], kind: str) -> str:
    """The hint of an error about an unknown name."""
    names = sorted(known)
    near = nearest(word, names)
    if near is not None:
        return f"did you mean {near!r}?"
    return f"known {kind}: {', '.join(names)}" if names else f"there are no {kind} here"


def is_bare(text: str) -> bool:
    """Whether a string can be printed without quotes."""
    return _BARE.fullmatch(text) is not None


def quote(text: str) -> str:
    """A string as a JSON string; ASCII only, so that every terminal and file can hold it."""
    return json.dumps(text)


# -- text -----------------------------------------------------------------------------------------


class _Reader:
    """Tokens of a recipe's text, one ahead."""

    def __init__(self, text: str):
        self.text = text
        self.position = 0
        self.kind = ""
        self.token = ""
        self.start = 0
        self.advance()

    def advance(self) -> None:
        rest = self.text[self.position :]
        found = _TOKEN.match(self.text, self.position)
        if found is None:
            self.start = self.position + len(rest) - len(rest.lstrip())
            if rest.strip():
                raise self.error("a quote is not closed")
            self.kind = self.token = ""
            return
        self.kind = str(found.lastgroup)
        self.token = found[self.kind]
        self.start = found.start(self.kind)
        self.position = found.end()

    @property
    def at(self) -> str:
        return f"column {self.start + 1}"

    def error(self, what: str) -> RecipeError:
        shown = self.text[self.start : self.start + 20]
        rest = f"{shown!r}" if shown else "the end"
        return RecipeError(
            f"the recipe cannot be read: {what}",
            where=f"{self.at}, at {rest}",
            hint="write pass{option=value,...}, with commas between passes and between options",
        )

    def take(self, mark: str) -> bool:
        """Skip a punctuation mark if it is next."""
        if self.kind == "mark" and self.token == mark:
            self.advance()
            return True
        return False

    def scalar(self, what: str) -> Scalar:
        if self.kind not in ("word", "quoted"):
            raise self.error(f"{what} is missing")
        at, text, quoted = self.at, self.token, self.kind == "quoted"
        if quoted:
            try:
                text = json.loads(text, strict=False)
            except ValueError as error:
                raise self.error(f"the quoted text is no JSON string ({error})") from None
        self.advance()
        return Scalar(text, quoted, at)

    def series(self, closing: str, each: Callable[[], None]) -> None:
        """``each`` between commas up to a closing mark; a comma may trail."""
        while not self.take(closing):
            each()
            if not self.take(","):
                if not self.take(closing):
                    raise self.error(f"expected ',' or {closing!r}")
                return

    def value(self, depth: int) -> Tree:
        if depth > DEEPEST:
            raise self.error(f"it is nested more than {DEEPEST} deep")
        at = self.at
        if self.take("["):
            items: list[Tree] = []
            self.series("]", lambda: items.append(self.value(depth + 1)))
            return Items(tuple(items), at)
        if self.kind == "mark" and self.token == "{":
            return self.options(depth)
        return self.scalar("a value")

    def options(self, depth: int) -> Entries:
        at = self.at
        self.advance()
        entries: dict[str, Tree] = {}

        def entry() -> None:
            name = self.scalar("the name of an option")
            if name.text in entries:
                raise self.error(f"option {name.text!r} is given twice")
            if not self.take("="):
                raise self.error(f"'=' is missing after option {name.text!r}")
            entries[name.text] = self.value(depth + 1)

        self.series("}", entry)
        return Entries(tuple(entries.items()), at)


def read_text(text: str) -> tuple[Item, ...]:
    """Read the text of a recipe into its items.

    Raises:
        RecipeError: it does not follow the grammar; says at which column.
    """
    reader = _Reader(text)
    items: list[Item] = []
    while reader.kind:
        name = reader.scalar("the name of a pass")
        if reader.take("="):
            items.append(Item(name.text, "=", reader.value(0), name.at))
        elif reader.kind == "mark" and reader.token == "{":
            items.append(Item(name.text, "{", reader.options(0), name.at))
        else:
            items.append(Item(name.text, "{", NO_OPTIONS, name.at))
        if reader.kind and not reader.take(","):
            raise reader.error("expected ',' between passes")
    return tuple(items)


def write_text(tree: Tree) -> str:
    """A tree in the grammar, without white space."""
    if isinstance(tree, Scalar):
        return quote(tree.text) if tree.quoted else tree.text
    if isinstance(tree, Items):
        return "[" + ",".join(write_text(v) for v in tree.items) + "]"
    return "{" + ",".join(f"{write_name(k)}={write_text(v)}" for k, v in tree.entries) + "}"


def write_name(name: str) -> str:
    """A name, quoted where it must be."""
    return name if is_bare(name) else quote(name)
