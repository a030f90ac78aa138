"""``repro.json``: everything about a failure that is neither a program nor a tensor."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from planish.ir.errors import UsageError
from planish.passes.debug.bundle_failure import Failure, Kind

FORMAT = "planish repro"
VERSION = 1
NAME = "repro.json"

Stage = Literal["pass", "recipe", "export"]

_VOLATILE = ("versions", "platform", "left_out")
_PACKAGES = ("planish", "torch", "numpy", "sympy", "onnx", "onnxruntime", "onnx-ir", "onnxscript")


@dataclass(frozen=True)
class Sites:
    """How rewrite sites were counted when the bundled part of the run began.

    Attributes:
        count: sites that asked before.
        limit: the last number that was granted; None grants all.
        excluded: sites that were left out, as ``rule@node``.
    """

    count: int = 0
    limit: int | None = None
    excluded: tuple[str, ...] = ()


@dataclass(frozen=True)
class Export:
    """How an artifact was to be written.

    Attributes:
        target: name of the target.
        opset: ONNX operator set version; None for the target's default.
        choices: lowering choices that were made before it failed; None where none were.
        verify: whether the artifact was to be run and compared.
    """

    target: str
    opset: int | None = None
    choices: Mapping[str, str] | None = None
    verify: bool = True


@dataclass(frozen=True)
class Facts:
    """What a bundle says about a failure.

    Attributes:
        stage: ``"pass"`` where the first pass of the recipe fails on the program, ``"recipe"``
            where the recipe as a whole does, ``"export"`` where the program cannot be written.
        failure: what went wrong.
        verify: ``"each"``, ``"end"`` or ``"off"``.
        seed: of the second probe.
        sites: where the numbering of rewrite sites stood.
        bounds: what each output of the original program may differ by; None where not needed.
        sizes: dimension name -> size at the second probe.
        passes: the bundled recipe, step by step, as text.
        export: how the artifact was to be written; None for the other stages.
        left_out: sentences on what a bundle could not hold.
        versions: of what a result depends on.
        platform: the machine and the settings of torch.
    """

    stage: Stage
    failure: Failure
    verify: Literal["each", "end", "off"] = "each"
    seed: int = 0
    sites: Sites = Sites()
    bounds: tuple[float, ...] | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)
    passes: tuple[str, ...] = ()
    export: Export | None = None
    left_out: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=lambda: versions())
    platform: Mapping[str, str] = field(default_factory=lambda: machine())

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"format": FORMAT, "version": VERSION, **asdict(self)}

    def identity(self) -> dict[str, Any]:
        """The part that is the same whenever and wherever the same failure happens."""
        kept = {k: v for k, v in self.to_dict().items() if k not in _VOLATILE}
        return {**kept, "failure": self.failure.signature}


def read_facts(folder: Path) -> Facts:
    """Read ``repro.json`` of a bundle; nothing else is looked at.

    Raises:
        UsageError: it is missing, damaged, or of a version that this planish does not read.
    """
    path = folder / NAME
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(
            f"{folder} is no bundle: it has no {NAME}",
            hint="give the folder planish-repro-... that the error named",
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, error) from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise UsageError(f"{path} is not that of a bundle", hint="is it a folder of planish?")
    if data.get("version") != VERSION:
        raise UsageError(
            f"{folder} has format version {data.get('version')}; this planish reads {VERSION}",
            hint="replay it with the planish that wrote it, or update this one",
        )
    try:
        return _facts(data)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise _damaged(path, error) from error


def versions() -> dict[str, str]:
    """Versions of what a run depends on, as far as it is installed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def machine() -> dict[str, str]:
    """The machine, and settings of torch that numbers may depend on."""
    return {
        "system": platform.platform(),
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "default dtype": str(torch.get_default_dtype()),
        "deterministic algorithms": str(torch.are_deterministic_algorithms_enabled()),
        "float32 precision": torch.get_float32_matmul_precision(),
    }


def _damaged(path: Path, error: Exception) -> UsageError:
    return UsageError(
        f"{path} is damaged: {type(error).__name__}: {error}", hint="copy the bundle again"
    )


def _facts(data: Mapping[str, Any]) -> Facts:
    failure, sites, export = data["failure"], data["sites"], data["export"]
    limit, bounds = sites["limit"], data["bounds"]
    return Facts(
        stage=_one_of(data["stage"], get_args(Stage)),
        failure=Failure(
            _one_of(failure["kind"], get_args(Kind)),
            None if failure["step"] is None else str(failure["step"]),
            str(failure["signature"]),
            str(failure["message"]),
        ),
        verify=_one_of(data["verify"], ("each", "end", "off")),
        seed=int(data["seed"]),
        sites=Sites(
            int(sites["count"]),
            None if limit is None else int(limit),
            tuple(map(str, sites["excluded"])),
        ),
        bounds=None if bounds is None else tuple(map(float, bounds)),
        sizes={str(name): int(size) for name, size in data["sizes"].items()},
        passes=tuple(map(str, data["passes"])),
        export=None if export is None else _export(export),
        left_out=tuple(map(str, data["left_out"])),
        versions=_texts(data["versions"]),
        platform=_texts(data["platform"]),
    )


def _export(data: Mapping[str, Any]) -> Export:
    opset, choices = data["opset"], data["choices"]
    return Export(
        str(data["target"]),
        None if opset is None else int(opset),
        None if choices is None else _texts(choices),
        bool(data["verify"]),
    )


def _texts(data: Mapping[str, Any]) -> dict[str, str]:
    return {str(key): str(value) for key, value in data.items()}


def _one_of(value: object, allowed: tuple[Any, ...]) -> Any:  # noqa: ANN401 - one of a Literal
    if value not in allowed:
        raise ValueError(f"{value!r} is none of {', '.join(allowed)}")
    return value
