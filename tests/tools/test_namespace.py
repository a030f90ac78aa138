"""The link farm for type checkers: complete, repeatable, and careful with others' files."""

import os
from pathlib import Path

import pytest

from planish.tools.namespace import build, planned_links
from tests.support.repository import FOLDERS, ROOT

CONFIG = """
[tool.setuptools.package-dir]
"planish" = "planish"
"planish.ir" = "ir"
"planish.passes" = "passes"
"planish.passes.fuse" = "passes/fuse"
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "pyproject.toml").write_text(CONFIG)
    for folder in ("planish", "ir", "passes/fuse"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "planish" / "__init__.py").write_text("")
    (tmp_path / "passes" / "fuse" / "conv_bn.py").write_text("WIDTH = 1\n")
    return tmp_path


def contents(folder: Path) -> dict[str, str]:
    return {path.name: os.readlink(path) for path in folder.iterdir()}


def test_shows_the_package_as_it_is_imported(checkout: Path) -> None:
    assert build(checkout) == checkout / "build" / "ns"
    assert contents(checkout / "build/ns/planish") == {
        "__init__.py": "../../../planish/__init__.py",
        "ir": "../../../ir",
        "passes": "../../../passes",
    }
    assert (checkout / "build/ns/planish/passes/fuse/conv_bn.py").read_text() == "WIDTH = 1\n"


def test_running_again_changes_nothing(checkout: Path) -> None:
    build(checkout)
    farm = checkout / "build/ns/planish"
    before = {path.name: path.lstat().st_ino for path in farm.iterdir()}
    build(checkout)
    assert {path.name: path.lstat().st_ino for path in farm.iterdir()} == before


def test_follows_changes_of_the_sources(checkout: Path) -> None:
    build(checkout)
    farm = checkout / "build/ns/planish"
    (farm / "passes").unlink()
    (farm / "passes").symlink_to("../elsewhere")
    (checkout / "planish" / "__init__.py").rename(checkout / "planish" / "report.py")
    build(checkout)
    assert contents(farm) == {
        "ir": "../../../ir",
        "passes": "../../../passes",
        "report.py": "../../../planish/report.py",
    }


def test_leaves_files_it_did_not_write_alone(checkout: Path) -> None:
    farm = checkout / "build/ns/planish"
    farm.mkdir(parents=True)
    (farm / "ir").write_text("mine")
    with pytest.raises(FileExistsError, match="not a link made by this tool"):
        build(checkout)
    assert (farm / "ir").read_text() == "mine"


def test_covers_every_folder_of_this_checkout() -> None:
    links = planned_links(ROOT)
    assert {name: links[name].name for name in FOLDERS if name != "planish"} == {
        name: name for name in FOLDERS if name != "planish"
    }
    assert "py.typed" in links
