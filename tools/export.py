"""``planish export``: a model as a file: ONNX, TorchScript, or what torch.export writes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from planish.tools.console import print_json, stages, stdout
from planish.tools.options import (
    WRITTEN,
    check_output,
    check_target,
    common,
    model_argument,
    opset_option,
    optimize_loaded,
    target_for,
    target_option,
    verify_option,
)
from planish.tools.watching import Watching, remarks, said
from planish.tools.watching import watching as watching_options

if TYPE_CHECKING:
    from planish.backends.base import Artifact
    from planish.report import Report


@click.command()
@model_argument
@click.option("-o", "--output", required=True, help="The file to write, *.onnx, *.pt, *.pt2.")
@opset_option
@target_option
@click.option(
    "--recipe", default="exact", show_default=True, help="'none' exports the model as traced."
)
@verify_option
@watching_options
@common
def export(
    model: str,
    output: str,
    opset: int | None,
    target: str | None,
    recipe: str,
    verify: str,
    watching: Watching,
    seed: int,
    as_json: bool,
    quiet: bool,
) -> None:
    """Export MODEL to a verified file: ONNX of standard operators, or one for plain torch.

    *.pt is TorchScript; *.pt2 is what torch.export.save writes or, with --target aotinductor, a
    package of machine code for this kind of processor.

    The file's outputs are compared with the model's on the example inputs and on a second set of
    sizes before the file is moved into place.

    \b
    Examples:
      planish export ./minilm -o minilm.onnx
      planish export my_package.models:build -o model.onnx --opset 20
      planish export ./minilm -o minilm.pt
      planish export ./minilm -o minilm.pt2 --target aotinductor
      planish export model.pt2 -o model.onnx --target onnxruntime-cpu --recipe none
    """
    from planish.passes.recipe import resolve
    from planish.tools.loading import load_model

    out = check_output(output, WRITTEN)
    watching.check(resolve(recipe))  # a mistyped recipe is told before the model is loaded
    target = check_target(target_for(target, out.suffix, "onnx"), opset)
    progress = stages(quiet=quiet or watching.prints)
    with watching.shown(as_json=as_json), progress as stage:
        stage("loading")
        loaded = load_model(model)
        result = optimize_loaded(
            loaded,
            stage,
            recipe=recipe,
            target=target,
            verify=verify,
            seed=seed,
            watching=watching,
        )
        stage("exporting")
        artifact = result.export(out, opset=opset, verify=verify != "off")
    if as_json:
        print_json({**_facts(artifact, result.report), **watching.to_dict()})
    else:
        _print(artifact, result.report)


def _facts(artifact: Artifact, report: Report) -> dict[str, Any]:
    comparison = artifact.comparison
    return {
        "path": str(artifact.path),
        "target": artifact.target,
        "opset": artifact.opset,
        "bytes": artifact.bytes,
        "files": [str(f) for f in artifact.files],
        "inputs": list(artifact.input_names),
        "outputs": list(artifact.output_names),
        "operators": dict(artifact.operators),
        "max_abs": comparison.max_abs if comparison else None,
        "probes": list(comparison.probes) if comparison else [],
        **said(report),
    }


def _print(artifact: Artifact, report: Report) -> None:
    console, comparison = stdout(), artifact.comparison
    opset = f"opset {artifact.opset}, " if artifact.opset else ""
    console.print(
        f"wrote {artifact.path}: {opset}{artifact.bytes / 1e6:.1f} MB, "
        f"{sum(artifact.operators.values())} operators",
        highlight=False,
    )
    console.print(f"  inputs   {', '.join(artifact.input_names)}", highlight=False)
    console.print(f"  outputs  {', '.join(artifact.output_names)}", highlight=False)
    if comparison is not None:
        console.print(
            f"  checked  {'; '.join(comparison.probes)}: largest difference "
            f"{comparison.max_abs:.2e}",
            highlight=False,
        )
    for line in remarks(report):
        console.print(line, highlight=False, markup=False)
