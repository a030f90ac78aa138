"""Build `build/ns/planish`, a folder of links that shows type checkers the package as imported.

The folders `ir/`, `passes/`, `backends/` and `tools/` are mapped into the package by setuptools. An
editable install does that with an import hook, which static tools cannot see. Running this file
again is harmless: it writes only under `build/ns`, and replaces only links.

Run by `make types`: `python -P tools/namespace.py` (`-P` keeps the modules of `tools/` from
shadowing others).
"""

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path


def planned_links(root: Path) -> dict[str, Path]:
    """Say what `build/ns/planish` must hold.

    Args:
        root: the checkout, which holds `pyproject.toml`.

    Returns:
        Name in the farm -> file or folder it leads to: every file of the face `planish/`, and the
        folder of every package directly below it. Deeper packages come with their folders.

    Raises:
        FileNotFoundError: `root` holds no `pyproject.toml`.
    """
    with (root / "pyproject.toml").open("rb") as file:
        folders: Mapping[str, str] = tomllib.load(file)["tool"]["setuptools"]["package-dir"]
    links = {path.name: path for path in (root / folders["planish"]).iterdir() if path.is_file()}
    for package, folder in folders.items():
        if package.count(".") == 1:
            links[package.removeprefix("planish.")] = root / folder
    return links


def build(root: Path) -> Path:
    """Bring `build/ns/planish` up to date with the checkout at `root` and return `build/ns`.

    Raises:
        FileExistsError: something that is no link lies where a link must go, and is left alone.
    """
    farm = root / "build" / "ns" / "planish"
    farm.mkdir(parents=True, exist_ok=True)
    links = planned_links(root)
    for path in farm.iterdir():
        if path.is_symlink() and path.name not in links:
            path.unlink()
    for name, source in links.items():
        link = farm / name
        goal = Path(os.path.relpath(source, farm))
        if link.is_symlink() and link.readlink() == goal:
            continue
        if link.is_symlink():
            link.unlink()
        elif link.exists():
            raise FileExistsError(f"{link} is not a link made by this tool; move it away")
        link.symlink_to(goal)
    return farm.parent


def main() -> None:
    """Build the link farm of the checkout this file lies in, and print where it is."""
    print(build(Path(__file__).resolve().parents[1]))


if __name__ == "__main__":
    main()
