"""Options and arguments that several commands share."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from planish.ir.errors import UsageError

if TYPE_CHECKING:
    from planish.optimized import Optimized
    from planish.passes.base import Pass
    from planish.passes.recipe import Recipe
    from planish.passes.steps import Instrument
    from planish.tools.console import Stages
    from planish.tools.loading import Loaded
    from planish.tools.watching import Watching

CALIBRATION_BATCH = 8  # samples of a file in one batch, where nothing says how many

F = TypeVar("F", bound=Callable[..., Any])


def common(function: F) -> F:
    """``--seed``, ``--json`` and ``--quiet``."""
    for option in (
        click.option("--quiet", is_flag=True, help="No progress output."),
        click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
        click.option("--seed", default=0, show_default=True, help="Of everything random."),
    ):
        function = option(function)
    return function


model_argument = click.argument("model", metavar="MODEL")

target_option = click.option(
    "--target", default=None, help="onnx (portable), onnxruntime-cpu or torchscript."
)

verify_option = click.option(
    "--verify",
    type=click.Choice(["each", "end", "off"]),
    default="each",
    show_default=True,
    help="When to check the program: after each pass, at the end, never.",
)

calibration_option = click.option(
    "--calibration",
    metavar="DATA",
    help="Inputs: FILE.npz, a folder of such files, or package.module:callable.",
)

opset_option = click.option("--opset", type=int, default=None, help="ONNX operator set version.")


def optimize_loaded(
    loaded: Loaded,
    stages: Stages,
    *,
    recipe: str | Recipe | list[Pass],
    target: str,
    verify: str = "each",
    seed: int = 0,
    extra: Mapping[str, Any] | None = None,
    watching: Watching | None = None,
    instruments: Sequence[Instrument] = (),
) -> Optimized:
    """``planish.optimize`` on a loaded model, with progress.

    Raises:
        UsageError: as ``optimize``, or an option of ``watching`` had no effect.
    """
    import planish
    from planish.passes.instruments import Event, Progress

    def tell(event: Event) -> None:
        if event.kind == "pass":
            stages(f"pass: {event.name}", event.index - 1, event.total)
        elif event.kind == "batch":
            stages(f"pass: {event.name}", event.batch, event.batches)
        elif event.kind == "end":
            stages("comparing")

    named = dict(extra or {})
    if watching is not None and watching.dump_dir is not None:
        named["dump_dir"] = watching.dump_dir
    stages("capturing")
    return planish.optimize(
        loaded.model,
        loaded.example_inputs,
        dynamic_shapes=loaded.dynamic_shapes,
        recipe=recipe,
        target=target,
        verify=verify,  # type: ignore[arg-type]  # click has checked the choice
        seed=seed,
        instruments=(*(watching.instruments() if watching else ()), *instruments, Progress(tell)),
        **named,
    )


WRITTEN = (".onnx", ".pt", ".pt2")  # suffixes of artifacts
_BY_SUFFIX = {".pt": "torchscript", ".pt2": "torch-export"}

trust_code_option = click.option(
    "--trust-code",
    is_flag=True,
    help="Run the machine code that packages of AOTInductor hold.",
)


def target_for(target: str | None, suffix: str, onnx: str) -> str:
    """The target asked for, or the one that a suffix stands for.

    Args:
        target: as the user gave it.
        suffix: of the file to write; empty where none is.
        onnx: which of the two to take for ``.onnx``, or for no file.

    Raises:
        UsageError: the target's files have another suffix.
    """
    from planish.backends.registry import load_target

    if target is None:
        return _BY_SUFFIX.get(suffix, onnx)
    wanted = load_target(target).suffix
    if suffix and wanted != suffix:
        raise UsageError(
            f"target {target!r} writes {wanted} files, and the output is *{suffix}",
            hint=f"name the output *{wanted}, or leave --target out",
        )
    return target


def check_target(target: str, opset: int | None) -> str:
    """Refuse an unknown target or opset before any long work is done.

    Raises:
        UsageError: says which there are.
    """
    from planish.backends.registry import load_target
    from planish.ir.errors import ExportError

    try:
        load_target(target).check_opset(opset)
    except ExportError as error:
        raise UsageError(error.what, hint=error.hint) from None
    return target


def check_output(path: str, suffixes: tuple[str, ...] = (".onnx",)) -> Path:
    """Refuse an output path that cannot work, before any long work is done.

    Raises:
        UsageError: wrong suffix, missing or unwritable folder, or a folder.
    """
    out = Path(path)
    if out.suffix not in suffixes:
        raise UsageError(
            f"cannot write {path!r}: no target writes {out.suffix or 'a file without a suffix'}",
            hint="name it " + " or ".join(f"*{s}" for s in suffixes),
        )
    if out.is_dir():
        raise UsageError(f"{path!r} is a folder", hint="give a file name")
    folder = out.parent
    if not folder.is_dir():
        raise UsageError(f"the folder {str(folder)!r} does not exist", hint=f"mkdir -p {folder}")
    try:  # asking for permission is not enough: root has all, and /proc takes no files
        handle, trial = tempfile.mkstemp(dir=folder, prefix=f".{out.name}.")
    except OSError as error:
        raise UsageError(
            f"the folder {str(folder)!r} cannot be written: {error.strerror}",
            hint="give a folder of your own",
        ) from None
    os.close(handle)
    os.unlink(trial)
    return out
