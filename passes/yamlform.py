"""YAML as plain text trees: no scalar is given a meaning, no tag is obeyed, no alias followed."""

from __future__ import annotations

import math
from typing import Any

import yaml

from planish.ir.errors import RecipeError
from planish.passes.spec import DEEPEST, Entries, Items, Scalar, Tree, is_bare

_STR, _SEQ, _MAP = (f"tag:yaml.org,2002:{kind}" for kind in ("str", "seq", "map"))


class _Loader(yaml.SafeLoader):
    """Without resolvers every scalar is a string: ``2:4`` is not 124, ``off`` is not False."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - the base class declares it so


class _Dumper(yaml.SafeDumper):
    """As the loader: a string needs no quotes for looking like a number."""

    yaml_implicit_resolvers = {}  # noqa: RUF012


def read(text: str) -> Tree:
    """Read YAML into a tree.

    Raises:
        RecipeError: the text is not YAML, or uses tags, aliases or keys that are no scalars.
    """
    try:
        # Composing stops before any object is made, so no tag can run anything.
        _check_events(text)
        node = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        problem = getattr(error, "problem", None) or str(error)
        raise _error(f"this is not YAML: {problem}", mark) from error
    if node is None:
        raise RecipeError("the recipe is empty", hint="write 'passes:' and a list")
    return _tree(node)


def _check_events(text: str) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.AliasEvent):
            raise _error("YAML aliases are not read", event.start_mark)
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise _error(f"the YAML is nested more than {DEEPEST} deep", event.start_mark)


def _error(what: str, mark: Any) -> RecipeError:  # noqa: ANN401 - PyYAML has two kinds of marks
    where = f"line {mark.line + 1}, column {mark.column + 1}" if mark is not None else None
    return RecipeError(what, where=where)


def _tree(node: yaml.Node) -> Tree:
    if node.tag not in (_STR, _SEQ, _MAP):
        # `!!str`, `!!seq` and `!!map` say nothing new; anything else asks for what is not done.
        raise _error(f"the YAML tag {node.tag!r} is not read", node.start_mark)
    at = f"line {node.start_mark.line + 1}"
    if isinstance(node, yaml.ScalarNode):
        return Scalar(node.value, node.style is not None, at)
    if isinstance(node, yaml.SequenceNode):
        return Items(tuple(_tree(item) for item in node.value), at)
    entries: dict[str, Tree] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise _error("a name in YAML must be a scalar", key.start_mark)
        if key.value in entries:
            raise _error(f"{key.value!r} is given twice", key.start_mark)
        entries[key.value] = _tree(value)
    return Entries(tuple(entries.items()), at)


def write(tree: Tree) -> str:
    """Write a tree as YAML, in ASCII, one entry a line."""
    text = yaml.serialize(_node(tree), Dumper=_Dumper, width=math.inf, allow_unicode=False)
    assert isinstance(text, str)
    return text


def _node(tree: Tree) -> yaml.Node:
    if isinstance(tree, Scalar):
        return yaml.ScalarNode(_STR, tree.text, style='"' if tree.quoted else None)
    if isinstance(tree, Items):
        return yaml.SequenceNode(_SEQ, [_node(v) for v in tree.items], flow_style=not tree.items)
    pairs = [(_node(Scalar(k, not is_bare(k))), _node(v)) for k, v in tree.entries]
    return yaml.MappingNode(_MAP, pairs, flow_style=not pairs)
