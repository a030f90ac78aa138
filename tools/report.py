"""``planish report``: what happened to a model, as one HTML page."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from planish.ir.errors import UsageError
from planish.tools.console import print_json, stages, stdout
from planish.tools.options import (
    CALIBRATION_BATCH,
    calibration_option,
    check_output,
    check_target,
    common,
    model_argument,
    optimize_loaded,
    target_option,
    verify_option,
)

if TYPE_CHECKING:
    from planish.report import Report

_SUFFIXES = (".html", ".json", ".txt")
# Parameters that say how to run a model, and mean nothing where a finished report is read.
_OF_A_RUN = ("recipe", "target", "verify", "calibration", "runtime", "seed")


@click.command()
@model_argument
@click.option("-o", "--output", required=True, help="The file to write: *.html, *.json or *.txt.")
@click.option("--recipe", default="exact", show_default=True, help="What to run on the model.")
@target_option
@verify_option
@calibration_option
@click.option(
    "--runtime",
    is_flag=True,
    help="Also export to a temporary file, and report what the runtime makes of it.",
)
@common
@click.pass_context
def report(
    context: click.Context,
    model: str,
    output: str,
    recipe: str,
    target: str | None,
    verify: str,
    calibration: str | None,
    runtime: bool,
    seed: int,
    as_json: bool,
    quiet: bool,
) -> None:
    """Optimize MODEL and write a report of it: one HTML page that needs no network.

    MODEL may also be a report that was saved as JSON; it is drawn as it is, without another run.

    \b
    Examples:
      planish report ./minilm -o minilm.html
      planish report my_package.models:build --recipe recipe.yaml --runtime -o report.html
      planish optimize model.pt2 -o model.onnx --report run.json
      planish report run.json -o run.html
    """
    from planish.tools.writing import write_text

    out = check_report_path(output)
    if Path(model).suffix == ".json":
        _check_unused(context)
        data = saved_report(Path(model))
        text = _redrawn(data, out)
    else:
        target = check_target(target or "onnxruntime-cpu", None)
        made = _run(model, recipe, target, verify, calibration, runtime, seed, quiet)
        data, text = made.to_dict(), report_text(made, out)
    write_text(out, text)
    size = out.stat().st_size
    if as_json:
        print_json({"path": str(out), "bytes": size, "model": data.get("model", "")})
        return
    stdout().print(f"wrote {out}: {size / 1e6:.2f} MB", highlight=False)


def check_report_path(path: str) -> Path:
    """Refuse a path that no report can be written to, before any long work is done.

    Raises:
        UsageError: wrong suffix, missing or unwritable folder, or a folder.
    """
    if Path(path).suffix not in _SUFFIXES:
        hint = "name it " + " or ".join(f"*{s}" for s in _SUFFIXES)
        raise UsageError(f"a report cannot be written as {path!r}", hint=hint)
    return check_output(path, _SUFFIXES)


def report_text(report: Report, path: Path) -> str:
    """A report in the form that a file's suffix asks for: a page, complete JSON, or a table."""
    if path.suffix == ".html":
        return report.to_html()
    return report.to_json(graphs=True) if path.suffix == ".json" else report.to_text()


def saved_report(path: Path) -> dict[str, Any]:
    """Read a report that was saved as JSON.

    Raises:
        UsageError: the file cannot be read, is no strict JSON, or is no report.
    """
    from planish.htmlpage import check_report

    try:
        data = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except OSError as error:
        raise UsageError(f"cannot read {str(path)!r}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{str(path)!r} is no JSON report: {error}") from None
    check_report(data)
    assert isinstance(data, dict)
    return data


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _redrawn(data: dict[str, Any], out: Path) -> str:
    """A saved report in another form.

    Raises:
        UsageError: only a page can be made of a saved report.
    """
    from planish.htmlpage import page

    if out.suffix != ".html":
        raise UsageError(
            f"a saved report can be drawn as a page only, not as {out.suffix}",
            hint="name the output *.html",
        )
    return page(data)


def _check_unused(context: click.Context) -> None:
    given = [
        f"--{name}"
        for name in _OF_A_RUN
        if context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT
    ]
    if given:
        raise UsageError(
            f"{', '.join(given)} would have no effect: a saved report is not run again",
            hint="leave it out, or give the model",
        )


def _run(
    model: str,
    recipe: str,
    target: str,
    verify: str,
    calibration: str | None,
    runtime: bool,
    seed: int,
    quiet: bool,
) -> Report:
    from planish.passes.recipe import resolve
    from planish.tools.calibration import load_calibration
    from planish.tools.loading import load_model

    resolve(recipe)  # a mistyped recipe is told before the model is loaded
    with stages(quiet=quiet) as stage, tempfile.TemporaryDirectory() as folder:
        stage("loading")
        loaded = load_model(model)
        extra = {}
        if calibration is not None:
            extra["calibration"] = load_calibration(calibration, CALIBRATION_BATCH)
        result = optimize_loaded(
            loaded, stage, recipe=recipe, target=target, verify=verify, seed=seed, extra=extra
        )
        if runtime:
            stage("exporting")
            name = Path(loaded.name).name or "model"
            result.export(Path(folder) / f"{name}.onnx", verify=verify != "off")
        stage("writing")
    return replace(result.report, model=f"{loaded.name} ({result.report.model})")
