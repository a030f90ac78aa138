"""What the wheel holds is what the folders hold, under one import name, with pins that fit."""

import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.repository import FOLDERS, ROOT, files, name_of, pyproject, python_files

SETUPTOOLS: dict[str, Any] = pyproject()["tool"]["setuptools"]


def package_of(folder: Path) -> str:
    top, *rest = folder.relative_to(ROOT).parts
    return ".".join([FOLDERS[top], *rest])


def found_packages() -> dict[str, str]:
    parents = {path.parent for folder in FOLDERS for path in python_files(folder)}
    return {package_of(parent): name_of(parent) for parent in parents}


def test_every_folder_with_python_files_is_a_listed_package() -> None:
    # An editable install finds unlisted folders on disk, so only this test and the wheel notice.
    assert sorted(SETUPTOOLS["packages"]) == sorted(found_packages())
    assert len(set(SETUPTOOLS["packages"])) == len(SETUPTOOLS["packages"])


def test_every_package_is_mapped_to_its_folder() -> None:
    assert SETUPTOOLS["package-dir"] == found_packages()


def test_every_package_has_an_init_file() -> None:
    missing = [
        folder
        for folder in found_packages().values()
        if not (ROOT / folder / "__init__.py").exists()
    ]
    assert missing == []


def test_every_other_file_is_package_data() -> None:
    patterns: dict[str, list[str]] = SETUPTOOLS["package-data"]
    stray = []
    for folder in FOLDERS:
        for path in files(folder):
            if path.suffix == ".py":
                continue
            wanted = patterns.get(package_of(path.parent), [])
            if not any(fnmatch(path.name, pattern) for pattern in wanted):
                stray.append(name_of(path))
    assert stray == []


def test_package_is_marked_as_typed() -> None:
    assert (ROOT / "planish" / "py.typed").is_file()
    assert "py.typed" in SETUPTOOLS["package-data"]["planish"]


@pytest.mark.parametrize("folder", [folder for folder in FOLDERS if folder != "planish"])
def test_importing_a_folder_by_its_own_name_is_refused(folder: str) -> None:
    # From the root of the checkout `import ir` would work, and make second copies of all classes.
    found = subprocess.run(
        [sys.executable, "-c", f"import {folder}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 1
    last = found.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ")
    assert f"planish.{folder}" in last


def requirements() -> list[str]:
    project = pyproject()["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    return sorted({text for texts in lists for text in texts})


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = [line.split("==") for line in lines if line and not line.startswith("#")]
    names = [canonicalize_name(name) for name, _ in found]
    assert len(set(names)) == len(names), "a package is pinned twice"
    return {canonicalize_name(name): version for name, version in found}


@pytest.mark.parametrize("text", requirements())
def test_every_requirement_has_a_pin_it_allows(text: str) -> None:
    requirement = Requirement(text)
    assert requirement.specifier.contains(pins()[canonicalize_name(requirement.name)])


def test_core_requirements_are_the_agreed_ones() -> None:
    core = {Requirement(text).name for text in pyproject()["project"]["dependencies"]}
    assert core == {
        "click",
        "networkx",
        "numpy",
        "onnx",
        "onnx-ir",
        "onnxruntime",
        "onnxscript",
        "pyyaml",
        "rich",
        "safetensors",
        "torch",
    }


def test_no_pass_of_ours_is_an_entry_point() -> None:
    # That group is for third parties; two registries for one fact would drift apart.
    assert "entry-points" not in pyproject()["project"]
