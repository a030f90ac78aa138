"""``planish quantize``: from a float model and a few samples to a file in integers, measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from planish.tools.console import print_json, print_parts, stages, stdout
from planish.tools.options import (
    CALIBRATION_BATCH,
    check_output,
    check_target,
    common,
    model_argument,
    opset_option,
    optimize_loaded,
    target_option,
    verify_option,
)

if TYPE_CHECKING:
    from planish.passes.recipe import Recipe
    from planish.report import Report
    from planish.tools.calibration import First
    from planish.tools.loading import Loaded
    from planish.tools.quantized import Bounds, Measured


@click.command()
@model_argument
@click.option("-o", "--output", required=True, help="The file to write, *.onnx.")
@click.option(
    "--calibration",
    metavar="DATA",
    help="FILE.npz, a folder of such files, or package.module:callable.",
)
@click.option(
    "--recipe",
    default="int8",
    show_default=True,
    help="int8 (the fastest mix, by measurement), int8-static, int8-dynamic, int8-weight, "
    "int4-weight, fp16, bf16, or any recipe that quantizes.",
)
@click.option(
    "--where",
    "include",
    multiple=True,
    metavar="PATTERN",
    help="Only these operators: name, operator or module path, with *; repeatable.",
)
@click.option(
    "--exclude", multiple=True, metavar="PATTERN", help="Not these operators; repeatable."
)
@click.option(
    "--padding-mask",
    metavar="INPUT",
    help="The input that is 0 where padding is; default: attention_mask, if there is one.",
)
@click.option("--min-sqnr-db", type=float, metavar="DB", help="Keep the outputs this near.")
@click.option("--min-cosine", type=float, metavar="C", help="Likewise, by cosine similarity.")
@click.option(
    "--metric",
    metavar="MODULE:CALLABLE",
    help="metric(outputs, reference) -> number, higher is better; with --min-metric. With "
    "--labeled it is called as metric(model, labeled).",
)
@click.option(
    "--labeled",
    metavar="MODULE:CALLABLE",
    help="Returns a list or a loader of whatever --metric reads: batches with labels.",
)
@click.option("--min-metric", type=float, metavar="M", help="Keep the mean of the metric.")
@click.option(
    "--max-float",
    type=click.IntRange(min=0),
    metavar="N",
    help="Leave at most N operators in floating point for the sake of these bounds.",
)
@click.option(
    "--batch",
    type=click.IntRange(min=1),
    metavar="N",
    help="Samples in a batch, where FILE.npz is cut; default: as the example inputs, or "
    f"{CALIBRATION_BATCH}.",
)
@target_option
@opset_option
@verify_option
@click.option(
    "--report",
    type=click.Path(path_type=Path),
    help="Also write the report: *.html, *.json, *.txt.",
)
@common
def quantize(
    model: str,
    output: str,
    calibration: str | None,
    recipe: str,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    padding_mask: str | None,
    min_sqnr_db: float | None,
    min_cosine: float | None,
    metric: str | None,
    labeled: str | None,
    min_metric: float | None,
    max_float: int | None,
    batch: int | None,
    target: str | None,
    opset: int | None,
    verify: str,
    report: Path | None,
    seed: int,
    as_json: bool,
    quiet: bool,
) -> None:
    """Quantize MODEL to a file, and say how fast and how right it is.

    Ranges come from the calibration data, of which every fifth batch is held out: fidelity is
    measured there. The speed is that of the file beside the one in floating point, both timed here
    in ONNX Runtime on one thread. With the recipe int8 a file slower than float is never written.

    \b
    Examples:
      planish quantize ./minilm --calibration sentences.npz -o minilm.onnx \\
          --padding-mask attention_mask
      planish quantize my_package.models:build --calibration my_package.data:batches -o m.onnx
      planish quantize ./minilm --calibration batches/ -o m.onnx --recipe int8-static \\
          --min-cosine 0.998 --exclude 'encoder.layer.0.*'
      planish quantize model.pt2 -o small.onnx --recipe int4-weight --json
    """
    from planish.tools.loading import load_model
    from planish.tools.quantized import Bounds, Original, measured
    from planish.tools.report import check_report_path

    out = check_output(output)
    if report is not None:
        check_report_path(str(report))
    bounds = Bounds(min_sqnr_db, min_cosine, min_metric, max_float)
    _check_metric(metric, labeled, min_metric)
    chosen = _recipe(recipe, include, exclude, bounds, calibration)
    target = check_target(target or chosen.target or "onnxruntime-cpu", opset)
    extra: dict[str, Any] = {"padding_mask": padding_mask}
    remarks: list[str] = []
    original = Original()
    with stages(quiet=quiet) as stage:
        stage("loading")
        loaded = load_model(model)
        extra |= _judge(metric, labeled)
        extra["calibration"] = data = _data(calibration, loaded, batch, remarks)
        result = optimize_loaded(
            loaded,
            stage,
            recipe=chosen,
            target=target,
            verify=verify,
            seed=seed,
            extra=extra,
            instruments=[original],
        )
        stage("exporting")
        result.export(out, opset=opset, verify=verify != "off")
        stage("measuring")
        assert original.program is not None  # a run began
        first = data.first if data is not None else None
        found = measured(result, original.program, out, first, remarks)
    _tell(result.report, found, remarks, out, report, as_json=as_json)


def _check_metric(metric: str | None, labeled: str | None, min_metric: float | None) -> None:
    """Refuse options that do nothing without each other.

    Raises:
        UsageError: says what is missing.
    """
    from planish.ir.errors import UsageError

    if min_metric is not None and metric is None:
        raise UsageError("--min-metric without --metric", hint="add --metric MODULE:CALLABLE")
    if labeled is not None and metric is None:
        raise UsageError(
            "--labeled without --metric, which reads it", hint="add --metric MODULE:CALLABLE"
        )


def _tell(
    done: Report,
    found: Measured,
    remarks: list[str],
    out: Path,
    report: Path | None,
    *,
    as_json: bool,
) -> None:
    """Write the report and print the result."""
    from planish.tools.quantized import render
    from planish.tools.report import report_text
    from planish.tools.writing import write_text

    if report is not None:
        write_text(report, report_text(done, report))
    if as_json:
        written = {**done.to_dict(), **found.to_dict(), "output": str(out)}
        print_json({**written, "remarks": [*done.remarks, *remarks]})
        return
    print_parts(render(done, found, remarks))
    stdout().print(f"wrote {out}", highlight=False)


def _judge(metric: str | None, labeled: str | None) -> dict[str, Any]:
    """What the metric is, and what it judges on, as ``optimize`` takes them."""
    from planish.tools.loading import import_callable

    found = {} if metric is None else {"metric": import_callable(metric)}
    return found if labeled is None else found | {"labeled": import_callable(labeled)()}


def _recipe(
    text: str,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    bounds: Bounds,
    calibration: str | None,
) -> Recipe:
    """The recipe with what the options ask for, refused before any long work is done.

    Raises:
        UsageError: it quantizes nothing, or lacks calibration data.
    """
    from planish.ir.errors import UsageError
    from planish.passes.base import Contract, Fact
    from planish.passes.recipe import Recipe
    from planish.passes.recipe_options import with_bound, with_choice
    from planish.tools.calibration import FORMS

    chosen = with_choice(Recipe.parse(text), include, exclude)
    chosen = with_bound(chosen, **bounds.options())
    everything = [chosen, *map(Recipe.parse, chosen.alternatives.values())]
    passes = [pass_ for one in everything for pass_ in one.passes]
    if not any(pass_.contract is Contract.LOSSY for pass_ in passes):
        raise UsageError(
            f"the recipe {text!r} quantizes nothing",
            hint="use int8, int8-static, int8-dynamic, int8-weight or int4-weight",
        )
    asks = [pass_.name for pass_ in passes if Fact.CALIBRATED in pass_.needs()]
    if calibration is None and (asks or chosen.alternatives):
        raise UsageError(
            f"the recipe {text!r} needs calibration data"
            + (f", for {' and '.join(dict.fromkeys(asks))}" if asks else ""),
            hint=f"give {FORMS}; int8-weight and int4-weight need none",
        )
    return chosen


def _data(spec: str | None, loaded: Loaded, batch: int | None, remarks: list[str]) -> First | None:
    """The calibration data, in batches that the model takes."""
    from planish.tools.calibration import First, load_calibration

    if spec is None:
        return None
    size = batch or _example_batch(loaded.example_inputs) or CALIBRATION_BATCH
    fixed = loaded.example_inputs is not None and loaded.dynamic_shapes is None
    return First(load_calibration(spec, size, whole=fixed, remark=remarks.append))


def _example_batch(example_inputs: object) -> int | None:
    """The first axis of the first tensor among example inputs."""
    from torch import Tensor
    from torch.utils import _pytree as pytree

    plain = dict(example_inputs) if isinstance(example_inputs, Mapping) else example_inputs
    for leaf in pytree.tree_leaves(plain):
        if isinstance(leaf, Tensor) and leaf.dim():
            return int(leaf.shape[0])
    return None
