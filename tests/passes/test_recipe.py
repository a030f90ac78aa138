"""Recipes: every value survives text and YAML, and every mistake is named with what is near it."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from planish.ir.errors import RecipeError
from planish.passes.base import Pass
from planish.passes.recipe import RECIPES, Recipe, resolve, step_text
from planish.passes.registry import REGISTRY, all_passes, pass_names
from tests.support import example_passes as ex

HERE = "tests.support.example_passes:"

# -- round trips ----------------------------------------------------------------------------------

NASTY = [
    "",
    " ",
    "null",
    "None",
    "~",
    "true",
    "off",
    "2:4",
    "1e-3",
    "3",
    "0.5",
    "-inf",
    ".5",
    "-",
    "- a",
    "---",
    "...",
    "#",
    "a#b",
    "a: b",
    "a:",
    "?",
    "*x",
    "&x",
    "!x",
    "%",
    "@",
    "`",
    "{",
    "}",
    "[",
    "]",
    ",",
    "=",
    '"',
    "'",
    "\\",
    '\\"',
    "\n",
    "a\n\nb ",
    "\t",
    "\r\n",
    "\x00",
    "\x85",
    "\u2028",
    "\ufeff",
    "größe",
    "🙂",
    "x" * 300,
    " lead",
    "a.yaml",
    "exact",
]
TEXTS = st.one_of(st.sampled_from(NASTY), st.text(max_size=12))
FLOATS = st.floats(allow_nan=False)
INTS = st.integers()
WHERES = st.builds(
    ex.Where,
    include=st.lists(TEXTS, max_size=3).map(tuple),
    depth=st.none() | INTS,
    inner=st.none() | st.builds(ex.Where, include=st.lists(TEXTS, max_size=2).map(tuple)),
)
EVERYTHING = st.builds(
    ex.Everything,
    text=TEXTS,
    maybe_text=st.none() | TEXTS,
    count=INTS,
    ratio=FLOATS,
    maybe_ratio=st.none() | FLOATS,
    flag=st.booleans(),
    number=INTS | FLOATS,
    anything=st.none() | TEXTS | INTS | FLOATS | st.booleans(),
    pattern=st.sampled_from(["2:4", "1:2", "off", 4, True]),
    score=st.sampled_from(ex.Score),
    order=st.none() | st.sampled_from(ex.Order),
    names=st.lists(TEXTS, max_size=3).map(tuple),
    pair=st.tuples(INTS, TEXTS),
    nested=st.lists(st.lists(FLOATS, max_size=2).map(tuple), max_size=2).map(tuple),
    where=WHERES,
    table=st.lists(WHERES | TEXTS, max_size=2).map(tuple),
)
WITH_DICT = st.builds(
    ex.WithDict, bits=st.integers(max_value=8), ratios=st.dictionaries(TEXTS, FLOATS, max_size=3)
)
PLAIN = st.sampled_from(list(REGISTRY)).map(lambda name: all_passes()[name]())
RECIPE = st.builds(
    Recipe,
    passes=st.lists(EVERYTHING | WITH_DICT | PLAIN, max_size=3).map(tuple),
    target=st.none() | TEXTS,
    seed=INTS,
    choices=st.dictionaries(TEXTS, TEXTS, max_size=2),
)


def identical(a: Any, b: Any) -> bool:
    """Equal, and of the same types all the way down: 1, 1.0 and True are not identical."""
    if type(a) is not type(b):
        return False
    if dataclasses.is_dataclass(a):
        return all(identical(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(identical, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(identical(a[k], b[k]) for k in a)
    return repr(a) == repr(b)


@given(RECIPE)
@example(Recipe())
@example(Recipe(seed=3))
@example(Recipe(target="a.yaml"))
def test_text_reads_back_as_the_same_recipe(recipe: Recipe) -> None:
    text = str(recipe)
    again = Recipe.parse(text)
    assert again == recipe
    assert identical(again, recipe)
    assert str(again) == text
    assert text.isascii()
    assert text.isprintable()


@given(RECIPE)
@example(Recipe())
@example(Recipe(seed=3, target="null"))
def test_yaml_reads_back_as_the_same_recipe(recipe: Recipe) -> None:
    text = recipe.to_yaml()
    again = Recipe.from_yaml(text)
    assert again == recipe
    assert identical(again, recipe)
    assert again.to_yaml() == text


@pytest.mark.parametrize("value", NASTY)
def test_every_nasty_string_survives_in_every_place(value: str) -> None:
    pass_ = ex.Everything(
        text=value, maybe_text=value, anything=value, names=(value, value), pair=(1, value)
    )
    other = ex.WithDict(bits=1, ratios={value: 1.0})
    recipe = Recipe((pass_, other), target=value, choices={value: value})
    assert identical(Recipe.parse(str(recipe)), recipe)
    assert identical(Recipe.from_yaml(recipe.to_yaml()), recipe)


# -- reading --------------------------------------------------------------------------------------


def test_the_text_of_the_documentation_is_read() -> None:
    text = (
        f"seed=7, target=onnx, {HERE}Everything{{ pattern=2:4, ratio=1e-3, flag=off,\n"
        f'where={{include=[a, "b c",], depth=null}}, }}, {HERE}WithDict{{bits=8,ratios={{}}}},'
    )
    first = ex.Everything(ratio=1e-3, where=ex.Where(include=("a", "b c")))
    expected = Recipe((first, ex.WithDict(bits=8, ratios={})), target="onnx", seed=7)
    assert Recipe.parse(text) == expected


def test_yaml_scalars_are_text_until_a_field_types_them() -> None:
    recipe = Recipe.from_yaml(
        f"""
        target: off           # a string, whatever YAML 1.1 thinks
        seed: 0010
        passes:
          - {HERE}Everything:
              text: yes
              pattern: 2:4
              ratio: 1e-3
              maybe_text: "null"
              names: [2:4, 012, null]
              flag: on
          - {HERE}Everything
          - {HERE}Everything:
        """
    )
    typed = ex.Everything(
        text="yes", ratio=1e-3, maybe_text="null", names=("2:4", "012", "null"), flag=True
    )
    assert recipe == Recipe((typed, ex.Everything(), ex.Everything()), target="off", seed=10)


def test_yaml_writes_every_option_and_text_only_the_unusual() -> None:
    recipe = Recipe((ex.Everything(count=3),))
    assert str(recipe) == f"{HERE}Everything{{count=3}}"
    assert "pattern: 2:4" in recipe.to_yaml()
    assert "ratio: 0.5" in recipe.to_yaml()


def test_quotes_tell_a_string_from_what_it_looks_like() -> None:
    def read(value: str) -> Any:
        (pass_,) = Recipe.parse(f"{HERE}Everything{{anything={value}}}").passes
        return pass_.anything  # type: ignore[attr-defined]

    assert [read(v) for v in ("null", "on", "3", "3.0", "3x")] == [None, True, 3, 3.0, "3x"]
    assert [read(f'"{v}"') for v in ("null", "on", "3", "3.0")] == ["null", "on", "3", "3.0"]


def test_registered_recipes_are_read_by_name_and_expand_inside_a_text() -> None:
    exact = Recipe.parse("exact")
    assert len(exact.passes) >= 1
    assert Recipe.parse("none") == Recipe()
    assert Recipe.parse(f"exact,{HERE}Everything").passes == (*exact.passes, ex.Everything())
    assert Recipe.parse(str(exact)) == exact
    assert Recipe.from_yaml("passes: [exact]") == exact


def test_every_named_recipe_but_none_contains_exact_and_no_name_means_two_things() -> None:
    exact = set(Recipe.parse("exact").passes)
    assert not set(RECIPES) & set(pass_names())
    assert [n for n in RECIPES if n != "none" and not exact <= set(Recipe.parse(n).passes)] == []


def test_a_text_runs_exactly_what_it_names() -> None:
    assert Recipe.parse(f"{HERE}Everything").passes == (ex.Everything(),)


def test_a_path_is_read_as_yaml(tmp_path: Path) -> None:
    recipe = Recipe((ex.Everything(count=2),), target="onnx", seed=5)
    for suffix in (".yaml", ".yml"):
        path = tmp_path / f"mine{suffix}"
        path.write_text(recipe.to_yaml(), encoding="utf-8")
        assert Recipe.parse(str(path)) == recipe
        assert resolve(path) == recipe


def test_resolve_takes_all_that_a_caller_may_give() -> None:
    passes = [ex.Everything(), ex.WithDict(bits=1, ratios={})]
    assert resolve(passes, target="onnx", seed=2) == Recipe(tuple(passes), "onnx", 2)
    assert resolve("none", target="onnx") == Recipe(target="onnx")
    assert resolve(Recipe(target="mine", seed=4), target="onnx", seed=2) == Recipe((), "mine", 4)


# -- mistakes -------------------------------------------------------------------------------------

E = HERE + "Everything"
MISTAKES = [
    ("exat", "there is no pass 'exat'", "did you mean 'exact'?"),
    ("fold-constant", "there is no pass", "did you mean 'fold-constants'?"),
    ("qqqqqq", "there is no pass 'qqqqqq'", "known passes and recipes: "),
    ("", "the recipe is empty", "'none'"),
    ("  ", "the recipe is empty", "'none'"),
    (",", "name of a pass is missing", "column 1"),
    (f"{E},,{E}", "name of a pass is missing", "column "),
    (f"{E} {E}", "expected ',' between passes", "column "),
    (f"{E}{{", "name of an option is missing", "the end"),
    (f"{E}{{count", "'=' is missing after option 'count'", "the end"),
    (f"{E}{{count=", "a value is missing", "the end"),
    (f"{E}{{count=1", "expected ',' or '}'", "the end"),
    (f"{E}{{names=[a", "expected ',' or ']'", "the end"),
    (f"{E}{{count=1,count=2}}", "option 'count' is given twice", "column"),
    (f'{E}{{text="a}}', "a quote is not closed", "column"),
    (f'{E}{{text="\\q"}}', "no JSON string", "column"),
    (f"{E}{{names={'[' * 60}", "nested more than", "column"),
    (f"{E}{{coutn=1}}", "there is no option 'coutn'", "did you mean 'count'?"),
    (f"{E}{{where={{inclde=[]}}}}", "there is no option 'inclde'", "did you mean 'include'?"),
    (f"{E}{{count=x}}", "'x' is not int", f"pass 1, {E}.count (column"),
    (f"{E}{{count=1.5}}", "'1.5' is not int", "give int"),
    (f"{E}{{ratio=nan}}", "'nan' is not float", "give float"),
    (f"{E}{{ratio=1e999}}", "'1e999' is not float", "give float"),
    (f"{E}{{flag=maybe}}", "'maybe' is not bool", "give bool"),
    (f"{E}{{pattern=2:3}}", "'2:3' is not 2:4 or 1:2", "did you mean '2:4'?"),
    (f"{E}{{score=magnitud}}", "'magnitud' is not magnitude or", "did you mean 'magnitude'?"),
    (f"{E}{{order=first}}", "'first' is not FIRST or LAST", "known values: FIRST, LAST"),
    (f"{E}{{names=a}}", "'a' is no list", "write [a,b]"),
    (f"{E}{{pair=[1]}}", "the list has 1 entries, not 2", "pair"),
    (f"{E}{{where=[1]}}", "[1] is not Where", "where"),
    (f"{E}{{text=[a]}}", "[a] is not str", "text"),
    (f"{E}{{where={{depth=x}}}}", "'x' is not int", "where.depth"),
    (f"{HERE}WithDict{{bits=1,ratios=[1]}}", "[1] is no set of named values", "write {name=value}"),
    (f"{HERE}WithDict{{bits=1,ratios={{a=x}}}}", "'x' is not float", "ratios.a"),
    (f"{HERE}WithDict{{bits=1}}", "option 'ratios' is missing", "give it a value"),
    (f"{HERE}WithDict{{bits=9,ratios={{}}}}", "more than 8 bits save nothing", "pass 1"),
    (f"{HERE}Unwritable{{weight=1}}", "cannot hold a value of type Tensor", "weight"),
    (f"{HERE}Nameless", "lacks a name or a contract", "ClassVar"),
    (f"{HERE}Missing", "cannot be imported: AttributeError", "PYTHONPATH"),
    ("no_such_module_x:Y", "cannot be imported: ModuleNotFoundError", "install its package"),
    ("pathlib:Path", "'pathlib:Path' is no pass", "subclass"),
    ("os:getcwd", "'os:getcwd' is no pass", "subclass"),
    ('"a:f.<locals>.P"', "defined inside a function", "top level"),
    (":x", "names no class", "package.module:Class"),
    ("exact{a=1}", "the recipe 'exact' takes no options", "pass 1"),
    ("sed=3,none", "a recipe has no setting 'sed'", "did you mean 'seed'?"),
    ("seed=x,none", "'x' is not int", "seed"),
    ("seed=1,seed=2,none", "seed is given twice", "column"),
    ("no/such/file.yaml", "the recipe file cannot be read", "exact"),
]


@pytest.mark.parametrize(("text", "what", "also"), MISTAKES)
def test_a_mistake_in_a_text_is_named(text: str, what: str, also: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(text)
    assert what in str(caught.value)
    assert also in str(caught.value)


YAML_MISTAKES = [
    ("", "the recipe is empty", "passes:"),
    ("[a]", "a recipe in YAML is a mapping", "passes:"),
    ("passes: a", "'passes' is no list", "line 1"),
    ("target: onnx", "the recipe lists no passes", "passes:"),
    ("pases: []", "a recipe has no entry 'pases'", "did you mean 'passes'?"),
    ("passes: []\nseed: x", "'x' is not int", "line 2"),
    ("passes:\n- exact\n- fold-constant", "there is no pass 'fold-constant'", "line 3"),
    ("passes:\n- a:\n  b: c", "entry 1 of 'passes' is not one pass", "indented"),
    ("passes:\n- [a]", "entry 1 of 'passes' is not one pass", "line 2"),
    (f"passes:\n- {E}: 3", "entry 1 of 'passes' is not one pass", "line 2"),
    (f"passes:\n- {E}:\n    coutn: 1", "there is no option 'coutn'", "line 3"),
    ("passes: [", "this is not YAML", "line"),
    ("passes: []\npasses: []", "'passes' is given twice", "line 2"),
    ("a: &x [1]\nb: *x", "YAML aliases are not read", "line 2"),
    ("a: &x [*x]", "YAML aliases are not read", "line 1"),
    ("passes: !!python/object/apply:os.getcwd []", "YAML tag", "line 1"),
    ("passes: !mine []", "YAML tag", "line 1"),
    ("? [a]\n: b", "a name in YAML must be a scalar", "line 1"),
    ("passes: " + "[" * 60 + "]" * 60, "nested more than", "line 1"),
    ("passes: " + "[" * 20000, "nested more than", ""),
]


@pytest.mark.parametrize(("text", "what", "also"), YAML_MISTAKES)
def test_a_mistake_in_yaml_is_named(text: str, what: str, also: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_yaml(text)
    assert what in str(caught.value)
    assert also in str(caught.value)


def test_a_mistake_in_a_file_names_the_file_and_the_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("passes:\n- exat\n")
    with pytest.raises(RecipeError, match=r"mine\.yaml, pass 1, exat \(line 2\)"):
        Recipe.parse(str(path))


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (ex.Everything(), "the recipe is a single pass"),
        ([ex.Everything], "make an instance: Everything()"),
        (["exact"], "a list holds instances of passes"),
        (3, "the recipe is a int"),
    ],
)
def test_what_is_no_recipe_is_refused(value: Any, what: str) -> None:
    with pytest.raises(RecipeError) as caught:
        resolve(value)
    assert what in str(caught.value)


@pytest.mark.parametrize(
    "pass_",
    [
        ex.Unwritable(weight=torch.ones(1)),
        ex.Everything(ratio=float("nan")),
        ex.Everything(count="x"),  # type: ignore[arg-type]
        ex.Everything(count=True),
        ex.Everything(names=["a"]),  # type: ignore[arg-type]
        ex.Everything(text="\ud800"),
        ex.Everything(pattern="3:4"),  # type: ignore[arg-type]
    ],
)
def test_an_option_that_cannot_be_written_is_named(pass_: Pass) -> None:
    with pytest.raises(RecipeError, match=r"pass 1, tests.support.example_passes:\w+\.\w+"):
        str(Recipe((pass_,)))


def test_a_pass_of_a_function_can_be_written_but_not_read() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Local(ex.Everything):
        pass

    text = step_text(Local())
    assert "<locals>.Local" in text
    with pytest.raises(RecipeError, match="defined inside a function"):
        Recipe.parse(text)
