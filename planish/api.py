"""``optimize``: capture, run the recipe with every step checked, report."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from planish import __version__
from planish.examples import Examples, advertised, name_dimensions, narrowed, normalize
from planish.graphdata import Graphs
from planish.ir.capture import capture
from planish.ir.compare import measure
from planish.ir.cost import cost
from planish.ir.errors import CaptureError, UsageError
from planish.ir.program import Program
from planish.optimized import Optimized
from planish.passes.base import Contract, Fact, Pass, PassContext
from planish.passes.recipe import Recipe, resolve
from planish.passes.steps import Run
from planish.report import PassEntry, Report
from planish.running import Runner
from planish.sparsity import sparse_weights

if TYPE_CHECKING:
    from planish.passes.calibrate import Spool
    from planish.passes.instruments import Instrument

Verify = Literal["each", "end", "off"]


def optimize(
    model: nn.Module | ExportedProgram | Program,
    example_inputs: Any = None,  # noqa: ANN401 - whatever the model takes
    *,
    recipe: str | Recipe | Sequence[Pass] = "exact",
    target: str = "onnxruntime-cpu",
    calibration: Iterable[Any] | None = None,
    dynamic_shapes: Any = None,  # noqa: ANN401 - exactly as torch.export takes it
    loss: Callable[[Any, Any], Tensor] | None = None,
    labeled: Iterable[Any] | None = None,
    metric: Callable[[Any, Any], float] | None = None,
    padding_mask: str | None = None,
    verify: Verify = "each",
    dump_dir: str | Path | None = None,
    instruments: Sequence[Instrument] = (),
    seed: int = 0,
) -> Optimized:
    """Optimize a model for deployment. The model itself is never changed.

    Args:
        model: a module in evaluation mode, an exported program, or a program.
        example_inputs: args tuple (a bare tensor is one argument), kwargs dict, or
            (args tuple, kwargs dict). None: what the model itself advertises.
        recipe: a recipe name, a path to YAML, recipe text, a ``Recipe``, or a sequence of passes.
        target: where the program will run.
        calibration: inputs for passes that need them; a dict is keyword arguments, a tuple or
            list positional ones. Read once. Of four batches or more, every fifth is held out: no
            pass takes ranges from it, and fidelity is measured on it.
        dynamic_shapes: as ``torch.export.export`` takes it.
        loss: ``loss(outputs, batch)``, for passes that need gradients.
        labeled: batches with labels, for ``loss`` and ``metric``; a list or a loader, since it is
            read more than once.
        metric: ``metric(outputs, reference)``, higher is better, for ``keep-float{min_metric=..}``:
            both are what the model returns for one batch, ``reference`` in floating point. With
            ``labeled`` it is called as ``metric(model, labeled)``, once for each program that is
            judged; the model takes inputs and returns outputs as the original one does.
        padding_mask: name of the input that is 0 where there is padding. Padding then counts
            neither in ranges nor in errors. None: an input called ``attention_mask``, if any.
        verify: check invariants and compare outputs after each pass, at the end, or never.
        dump_dir: a folder for the program after every pass.
        instruments: more watchers of the pipeline, outside of those that check it.
        seed: of everything random.

    Returns:
        The optimized program, as a model, as a report, and ready to export.

    Raises:
        UsageError, RecipeError: the call is malformed; says how to call.
        CaptureError: the model cannot be traced.
        RequirementError: a pass needs data that was not given.
        VerificationError: a pass broke an invariant or changed the function.
        PassError: a pass failed. Like every failure of a pass it names the bundle that replays it,
            which is in ``dump_dir``, else in the folder that ``PLANISH_REPRO_DIR`` names, else in
            the system's folder for temporary files.
    """
    from planish.backends.registry import load_target
    from planish.backends.timer import TargetTimer

    _check_call(target, verify, dump_dir, instruments, calibration, loss, labeled, seed)
    _check_judges(metric, padding_mask)
    resolved = resolve(recipe, target=target, seed=seed)
    remarks = _overruled(resolved, target, seed)
    resolved = _masked(resolved, padding_mask, remarks)
    remarks += _unused(resolved, loss, labeled, metric)
    target, seed = resolved.target or target, resolved.seed
    load_target(target)
    _check_devices(model, target)
    start = time.perf_counter()
    program = _captured(model, example_inputs, dynamic_shapes, remarks, seed)
    seconds = {"capture": time.perf_counter() - start}

    held = _spooled(calibration, program, resolved, remarks)
    shared, held_out = held.split() if held is not None else (None, None)
    context = PassContext(
        target=target,
        calibration=shared,
        held_out=held_out,
        metric=metric,
        labeled=labeled,
        loss=loss,
        generator=torch.Generator().manual_seed(seed),
        timer=TargetTimer(target),
    )
    runner = Runner(program, context, verify, dump_dir, tuple(instruments), seed)
    start = time.perf_counter()
    try:
        ended = runner.result(resolved, padding_mask)
    finally:
        if held is not None:
            held.close()
    finished = ended.run
    passes = sum(record.seconds for record in finished.records)
    seconds |= {"passes": passes, "verification": time.perf_counter() - start - passes}
    remarks += ended.remarks
    report = _report(program, finished, ended.recipe, target, seed, seconds, remarks, ended.answers)
    name = type(model).__name__
    report = replace(report, model=name, held_out=ended.held_out, race=ended.race)
    return Optimized(finished.program, ended.recipe, report, repro_dir=dump_dir)


def _spooled(
    calibration: Iterable[Any] | None, program: Program, recipe: Recipe, remarks: list[str]
) -> Spool | None:
    """The calibration inputs, where the recipe has a use for them."""
    from planish.passes.calibrate import UNUSED, needs_calibration, spool

    if calibration is None:
        return None
    if any(needs_calibration(one) for one in _all_recipes(recipe)):
        return spool(calibration, program, remark=remarks.append)
    remarks.append(UNUSED)
    return None


def _all_recipes(recipe: Recipe) -> list[Recipe]:
    """A recipe and its alternatives."""
    return [recipe, *map(Recipe.parse, recipe.alternatives.values())]


def _masked(recipe: Recipe, padding_mask: str | None, remarks: list[str]) -> Recipe:
    """The recipe with the mask in the options of its passes, so that it can be replayed."""
    if padding_mask is None:
        return recipe
    from planish.passes.recipe_options import with_padding_mask

    masked = with_padding_mask(recipe, padding_mask)
    if masked is None:
        remarks.append("padding_mask was given, but no pass of the recipe asks for it")
    return masked or recipe


def _overruled(recipe: Recipe, target: str, seed: int) -> list[str]:
    """Remarks on arguments of the call that the recipe decides otherwise."""
    pairs = (("target", recipe.target, target), ("seed", recipe.seed, seed))
    return [
        f"the recipe names its own {name}, {own!r}; it was taken instead of {given!r}"
        for name, own, given in pairs
        if own is not None and own != given
    ]


def _unused(recipe: Recipe, loss: object, labeled: object, metric: object) -> list[str]:
    """Remarks on arguments that no pass looks at."""
    passes = [pass_ for one in _all_recipes(recipe) for pass_ in one.passes]
    judged = any(pass_.holds_out or pass_.contract is Contract.LOSSY for pass_ in passes)
    wanted = frozenset().union(*(pass_.needs() for pass_ in passes))
    given = [
        (name, fact in wanted or (name == "labeled" and metric is not None and judged))
        for name, value, fact in (("loss", loss, Fact.LOSS), ("labeled", labeled, Fact.LABELS))
        if value is not None
    ]
    if metric is not None:
        given.append(("metric", judged))
    return [
        f"{name} was given, but no pass of the recipe asks for it"
        for name, used in given
        if not used
    ]


def _check_call(
    target: object,
    verify: object,
    dump_dir: object,
    instruments: object,
    calibration: object,
    loss: object,
    labeled: object,
    seed: object,
) -> None:
    """Refuse arguments of the wrong kind before any work is done."""
    from planish.passes.steps import Instrument

    if verify not in ("each", "end", "off"):
        raise UsageError(f"verify is {verify!r}", hint="use 'each', 'end' or 'off'")
    if not isinstance(target, str):
        raise UsageError(
            f"target is {target!r}", hint="give its name: 'onnx', 'onnxruntime-cpu', 'torchscript'"
        )
    if not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise UsageError(f"seed is {seed!r}", hint="give an integer from 0 to 2**63 - 1")
    if dump_dir is not None and not isinstance(dump_dir, (str, os.PathLike)):
        raise UsageError(f"dump_dir is {dump_dir!r}", hint="give the path of a folder")
    if calibration is not None and not isinstance(calibration, Iterable):
        raise UsageError(
            f"calibration is a {type(calibration).__name__}",
            hint="give an iterable of inputs: a list, a generator, a DataLoader",
        )
    if loss is not None and not callable(loss):
        raise UsageError(f"loss is a {type(loss).__name__}", hint="give loss(outputs, batch)")
    if labeled is not None and not isinstance(labeled, Iterable):
        raise UsageError(
            f"labeled is a {type(labeled).__name__}", hint="give batches for loss or metric"
        )
    if isinstance(labeled, Iterator):
        raise UsageError(
            f"labeled is a {type(labeled).__name__}, which can be read only once",
            hint="give a list or a loader: every program that is judged reads it",
        )
    watchers = instruments if isinstance(instruments, (list, tuple)) else [instruments]
    for watcher in watchers:
        if not isinstance(watcher, Instrument) or watchers is not instruments:
            raise UsageError(
                f"instruments holds {watcher!r}", hint="give a list of planish Instruments"
            )


def _check_judges(metric: object, padding_mask: object) -> None:
    if metric is not None and not callable(metric):
        raise UsageError(
            f"metric is a {type(metric).__name__}", hint="give metric(outputs, reference)"
        )
    if padding_mask is not None and not isinstance(padding_mask, str):
        raise UsageError(
            f"padding_mask is a {type(padding_mask).__name__}", hint="name an input of the model"
        )


def _check_devices(model: object, target: str) -> None:
    """All targets run on the CPU, and what is verified must be what is deployed."""
    if not isinstance(model, nn.Module):
        return
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if value.device.type not in ("cpu", "meta"):  # capture explains the meta device
            raise UsageError(
                f"{name!r} is on {value.device}, and target {target!r} runs on the CPU",
                hint="pass a copy on the CPU: copy.deepcopy(model).cpu()",
            )


def _captured(
    model: nn.Module | ExportedProgram | Program,
    example_inputs: Any,  # noqa: ANN401
    dynamic_shapes: Any,  # noqa: ANN401
    remarks: list[str],
    seed: int,
) -> Program:
    if isinstance(model, (Program, ExportedProgram)):
        kind = type(model).__name__
        if example_inputs is not None or dynamic_shapes is not None:
            raise UsageError(
                f"example_inputs and dynamic_shapes are part of the {kind} already",
                hint="leave them out, or pass the nn.Module",
            )
        program = model.clone() if isinstance(model, Program) else capture(model)
    else:
        examples = _examples(model, example_inputs, dynamic_shapes, seed)
        program = _trace(model, examples, remarks)
    if not program.operators:
        raise CaptureError(
            "the captured program has no operators: there is nothing to optimize",
            hint="does forward return its inputs, or constants?",
        )
    remarks.extend(program.remarks)
    return program


def _examples(
    model: nn.Module,
    example_inputs: Any,  # noqa: ANN401
    dynamic_shapes: Any,  # noqa: ANN401
    seed: int,
) -> Examples:
    if example_inputs is not None or not isinstance(model, nn.Module):
        return normalize(() if example_inputs is None else example_inputs, dynamic_shapes)
    found = advertised(model, seed)
    if dynamic_shapes is None:
        return found
    return Examples(found.args, found.kwargs, dynamic_shapes, origin=found.origin)


def _trace(model: nn.Module, examples: Examples, remarks: list[str]) -> Program:
    shapes = examples.dynamic_shapes
    try:
        program = capture(model, examples.args, examples.kwargs, dynamic_shapes=shapes)
    except CaptureError as error:
        if not examples.names:
            raise
        # The sizes were our guess, not the caller's wish: a model of fixed sizes is fine too.
        program, shapes = capture(model, examples.args, examples.kwargs), None
        remarks.append(f"all sizes are fixed, since dynamic ones could not be traced: {error.what}")
    name_dimensions(program, examples.names)
    remarks.extend(narrowed(program, shapes))
    if examples.origin != "given":
        remarks.append(f"example inputs were made from the {examples.origin}")
    return program


def _report(
    before: Program,
    finished: Run,
    recipe: Recipe,
    target: str,
    seed: int,
    seconds: dict[str, float],
    remarks: list[str],
    answers: tuple[tuple[Any, ...], tuple[Any, ...]],
) -> Report:
    reference, outputs = answers
    fidelity = measure(reference, outputs) if reference else None
    if before.samples and not any(_comparable(value) for value in reference):
        remarks.append(
            "nothing was compared on the example inputs: the model gives no finite number there"
        )
    entries = tuple(
        PassEntry(
            name=record.name,
            options=record.options,
            contract=record.contract.value,
            changes=record.changes,
            refusals=record.refusals,
            seconds=record.seconds,
            fidelity=record.fidelity,
            cost=record.cost,
            remarks=record.remarks,
            ran=record.ran,
            cumulative=record.cumulative,
            node_errors=record.node_errors,
            operators=record.operators,
        )
        for record in finished.records
    )
    return Report(
        passes=entries,
        before=cost(before),
        after=cost(finished.program),
        target=target,
        fidelity=fidelity,
        seconds=seconds,
        versions=versions(),
        seed=seed,
        recipe=str(recipe),
        remarks=tuple(remarks),
        recipe_yaml=recipe.to_yaml(),
        graphs=Graphs(before, finished.program),
        sparsity=sparse_weights(finished.program),
    )


def _comparable(value: object) -> bool:
    """Whether an output has any number that another one can be held against."""
    if isinstance(value, Tensor) and value.is_floating_point():
        value = value.double()  # torch does not ask 8-bit floats whether they are finite
    return not isinstance(value, Tensor) or bool(value.isfinite().any())


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    found = {"planish": __version__, "python": platform.python_version()}
    for name in ("torch", "onnx", "onnxruntime", "onnx-ir", "onnxscript", "numpy"):
        found[name] = metadata.version(name)
    return found
