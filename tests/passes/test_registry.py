"""The registry: a literal table, other packages' entry points, and names for classes."""

import dataclasses
import importlib
import importlib.metadata
import subprocess
import sys
from collections.abc import Iterator
from typing import ClassVar

import pytest

from planish.ir.errors import RecipeError
from planish.passes import registry
from planish.passes.base import Contract, Pass
from planish.passes.bind import options_of
from planish.passes.recipe import Recipe, step_text
from planish.passes.registry import REGISTRY, all_passes, load_class, load_pass, pass_names
from tests.support import example_passes as ex
from tests.support.repository import name_of, python_files

EXAMPLES = "tests.support.example_passes"


def test_every_registered_pass_is_what_its_name_says() -> None:
    for name, cls in all_passes().items():
        assert cls.name == name
        assert isinstance(cls.contract, Contract)
        assert f"{cls.__module__}:{cls.__qualname__}" == REGISTRY[name]
        assert cls.__doc__
        assert sys.modules[cls.__module__].__doc__


def test_every_pass_in_the_family_folders_is_registered() -> None:
    found = set()
    for path in python_files("passes"):
        parts = name_of(path).removesuffix(".py").split("/")
        if len(parts) < 3 or parts[-1] == "__init__":
            continue
        module = importlib.import_module(".".join(("planish", *parts)))
        for cls in vars(module).values():
            if (
                isinstance(cls, type)
                and issubclass(cls, Pass)
                and cls.__module__ == module.__name__
            ):
                found.add(f"{cls.__module__}:{cls.__qualname__}")
    assert found == set(REGISTRY.values())


def test_every_pass_is_frozen_hashable_and_prints_with_its_options() -> None:
    for name, cls in all_passes().items():
        if any(option.required for option in options_of(cls)):
            continue
        pass_ = cls()
        assert hash(pass_) == hash(cls())
        assert step_text(pass_) == name
        assert Recipe.parse(name).passes == (pass_,)


def test_looking_at_the_names_imports_no_pass() -> None:
    program = (
        "import sys\nfrom planish.passes.registry import pass_names\nassert len(pass_names()) > 1\n"
        "print([m for m in sys.modules if m.startswith('planish.passes.') and m.count('.') > 2])"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"


def test_an_unknown_pass_is_met_with_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"no pass 'fold-batchnorm'\n.*'fold-batch-norm'"):
        load_pass("fold-batchnorm")


def test_a_class_no_registry_knows_is_named_by_its_module() -> None:
    assert registry.name_of(ex.Everything) == f"{EXAMPLES}:Everything"
    assert load_class(f"{EXAMPLES}:Everything") is ex.Everything


# -- entry points ---------------------------------------------------------------------------------


def entry(name: str, value: str) -> importlib.metadata.EntryPoint:
    return importlib.metadata.EntryPoint(name, value, registry.GROUP)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[importlib.metadata.EntryPoint]]:
    """Entry points that some other package is said to have."""
    entries: list[importlib.metadata.EntryPoint] = []
    monkeypatch.setattr(registry, "entry_points", lambda group: entries)
    registry._foreign.cache_clear()
    yield entries
    registry._foreign.cache_clear()


def test_a_pass_of_another_package_is_used_by_its_name(
    installed: list[importlib.metadata.EntryPoint],
) -> None:
    installed.append(entry("everything", f"{EXAMPLES}:Everything"))
    assert "everything" in pass_names()
    assert load_pass("everything") is ex.Everything
    recipe = Recipe.parse("everything{count=3}")
    assert recipe.passes == (ex.Everything(count=3),)
    assert str(recipe) == "everything{count=3}"


@pytest.mark.parametrize("taken", ["fold-constants", "everything"])
def test_a_name_that_two_claim_is_refused_but_the_class_can_still_be_named(
    installed: list[importlib.metadata.EntryPoint], taken: str
) -> None:
    installed.append(entry(taken, f"{EXAMPLES}:Everything"))
    installed.append(entry(taken, f"{EXAMPLES}:WithDict"))
    with pytest.raises(RecipeError, match=rf"'{taken}' is claimed . times: .*{EXAMPLES}"):
        load_pass(taken)
    assert str(Recipe((ex.Everything(),))) == f"{EXAMPLES}:Everything"


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("a", "no_such_module_x:Y", "cannot be imported: ModuleNotFoundError"),
        ("b", f"{EXAMPLES}:Nothing", "cannot be imported: AttributeError"),
        ("c", "pathlib:Path", "is no pass"),
        ("d", f"{EXAMPLES}:Nameless", "lacks a name or a contract"),
        ("e", f"{EXAMPLES}:Everything", "calls itself 'everything' but is registered as 'e'"),
    ],
)
def test_a_broken_entry_point_is_named(
    installed: list[importlib.metadata.EntryPoint], name: str, value: str, what: str
) -> None:
    installed.append(entry(name, value))
    with pytest.raises(RecipeError, match=what):
        load_pass(name)


def test_a_pass_that_is_no_frozen_dataclass_is_refused() -> None:
    class Thawed:
        name: ClassVar[str] = "thawed"

    @dataclasses.dataclass
    class Soft(Thawed):
        pass

    for cls in (Thawed, Soft):
        with pytest.raises(RecipeError, match="no frozen dataclass"):
            options_of(cls)
