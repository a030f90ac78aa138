"""``planish optimize``: run a recipe, check every step, write the artifact."""

from __future__ import annotations

from pathlib import Path

import click

from planish.tools.console import print_json, print_parts, stages, stdout
from planish.tools.options import (
    CALIBRATION_BATCH,
    WRITTEN,
    calibration_option,
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
from planish.tools.watching import Watching
from planish.tools.watching import watching as watching_options


@click.command()
@model_argument
@click.option("-o", "--output", default=None, help="The artifact to write, *.onnx, *.pt, *.pt2.")
@click.option(
    "--recipe",
    default="exact",
    show_default=True,
    help="Recipe name, YAML file, or text such as 'fold-batch-norm,remove-identities'.",
)
@target_option
@opset_option
@verify_option
@calibration_option
@click.option(
    "--labeled",
    metavar="MODULE:CALLABLE",
    help="Returns a list or a loader of batches (inputs, labels), for passes that read the loss.",
)
@click.option(
    "--loss",
    metavar="MODULE:CALLABLE",
    help="loss(outputs, batch) -> scalar tensor; batch is what --labeled gives.",
)
@click.option(
    "--report",
    type=click.Path(path_type=Path),
    help="Also write the report: *.html, *.json, *.txt.",
)
@click.option("--all-passes", is_flag=True, help="Show passes that found nothing to do.")
@watching_options
@common
def optimize(
    model: str,
    output: str | None,
    recipe: str,
    target: str | None,
    opset: int | None,
    verify: str,
    calibration: str | None,
    labeled: str | None,
    loss: str | None,
    report: Path | None,
    all_passes: bool,
    watching: Watching,
    seed: int,
    as_json: bool,
    quiet: bool,
) -> None:
    """Optimize MODEL with a recipe and write a verified artifact.

    \b
    Examples:
      planish optimize ./minilm -o minilm.onnx
      planish optimize my_package.models:build -o model.onnx --recipe recipe.yaml
      planish optimize model.pt2 --recipe 'fold-batch-norm,remove-identities' --json
      planish optimize my_package.models:build -o sparse.onnx \\
          --recipe 'sparsify{pattern=2:4}' --calibration my_package.data:batches
      planish optimize my_package.models:build -o sparse.onnx \\
          --recipe 'sparsify{pattern=unstructured,score=woodfisher,ratio=0.8}' \\
          --labeled my_package.data:labeled --loss my_package.data:loss
      planish optimize ./minilm --dump-dir dump --print-after-change --timing
      planish optimize dump/003_simplify-layout.pt2 --start-from 4 -o minilm.onnx
      planish optimize ./minilm --bisect-limit 12 --disable-pass recover-attention
    """
    from planish.passes.recipe import resolve
    from planish.tools.calibration import labels, load_calibration
    from planish.tools.loading import load_model
    from planish.tools.report import check_report_path, report_text
    from planish.tools.writing import write_text

    out = check_output(output, WRITTEN) if output is not None else None
    if report is not None:
        check_report_path(str(report))
    watching.check(resolve(recipe))  # a mistyped recipe is told before the model is loaded
    written = out.suffix if out is not None else ""
    target = check_target(target_for(target, written, "onnxruntime-cpu"), opset)
    progress = stages(quiet=quiet or watching.prints)
    with watching.shown(as_json=as_json), progress as stage:
        stage("loading")
        loaded = load_model(model)
        extra = labels(labeled, loss)
        if calibration is not None:
            extra["calibration"] = load_calibration(calibration, CALIBRATION_BATCH)
        result = optimize_loaded(
            loaded,
            stage,
            recipe=recipe,
            target=target,
            verify=verify,
            seed=seed,
            extra=extra,
            watching=watching,
        )
        if out is not None:
            stage("exporting")
            result.export(out, opset=opset, verify=verify != "off")
    if report is not None:
        write_text(report, report_text(result.report, report))
    if as_json:
        output = str(out) if out else None
        print_json({**result.report.to_dict(), **watching.to_dict(), "output": output})
        return
    print_parts(result.report.render(all_passes=all_passes))
    wrote = f"wrote {out}" if out is not None else "nothing was written: give -o FILE.onnx"
    stdout().print(wrote, highlight=False)
