"""``planish run-pass``: run passes on a model and show what they did."""

from __future__ import annotations

from pathlib import Path

import click

from planish.tools.console import print_json, stages, stdout
from planish.tools.options import common, model_argument, optimize_loaded, verify_option


@click.command("run-pass")
@model_argument
@click.argument("passes", metavar="PASSES")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Save the program, *.pt2.")
@verify_option
@common
def run_pass(
    model: str,
    passes: str,
    output: Path | None,
    verify: str,
    seed: int,
    as_json: bool,
    quiet: bool,
) -> None:
    """Run PASSES (recipe text) on MODEL; print the diff, the changes and the refusals.

    \b
    Examples:
      planish run-pass ./minilm remove-identities
      planish run-pass model.pt2 'fold-batch-norm,eliminate-dead-code' -o after.pt2
    """
    from planish.ir.files import save
    from planish.ir.text import diff
    from planish.passes.recipe import resolve
    from planish.tools.loading import load_model
    from planish.tools.options import check_output

    if output is not None:
        check_output(str(output), (".pt2",))
    resolve(passes)  # a mistyped pass is told before the model is loaded
    with stages(quiet=quiet) as stage:
        stage("loading")
        loaded = load_model(model)
        before = optimize_loaded(loaded, stage, recipe="none", target="onnx", seed=seed).program
        after = optimize_loaded(
            type(loaded)(before, name=loaded.name),
            stage,
            recipe=passes,
            target="onnx",
            verify=verify,
            seed=seed,
        )
    if output is not None:
        save(after.program, output)
    difference = diff(before, after.program)
    if as_json:
        print_json({"diff": difference, **after.report.to_dict()})
        return
    console = stdout()
    for line in difference.splitlines():
        console.print(line, style=_style(line), markup=False, highlight=False, soft_wrap=True)
    for entry in after.report.passes:
        counts = f"{len(entry.changes)} changes, {len(entry.refusals)} refusals"
        console.print(f"{entry.name}: {counts}, {1e3 * entry.seconds:.1f} ms", highlight=False)
        for change in entry.changes:
            at = f"  ({change.source})" if change.source else ""
            detail = f": {change.detail}" if change.detail else ""
            line = f"  {change.number} {change.rule} at {change.node}{detail}{at}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        for refusal in entry.refusals:
            at = f"  ({refusal.source})" if refusal.source else ""
            line = f"  declined {refusal.rule} at {refusal.node}: {refusal.reason}{at}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def _style(line: str) -> str | None:
    if line.startswith(("---", "+++")):
        return "bold"
    return {"+": "green", "-": "red", "@": "cyan"}.get(line[:1])
