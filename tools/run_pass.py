"""``planish run-pass``: run passes on a model and show what they did."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from planish.tools.console import print_json, print_parts, stages, stdout
from planish.tools.diff import print_unified
from planish.tools.options import common, model_argument, optimize_loaded, verify_option
from planish.tools.watching import Watching
from planish.tools.watching import watching as watching_options

if TYPE_CHECKING:
    from planish.report import Report


@click.command("run-pass")
@model_argument
@click.argument("passes", metavar="PASSES")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Save the program, *.pt2.")
@verify_option
@watching_options
@common
def run_pass(
    model: str,
    passes: str,
    output: Path | None,
    verify: str,
    watching: Watching,
    seed: int,
    as_json: bool,
    quiet: bool,
) -> None:
    """Run PASSES (recipe text) on MODEL; print the diff, the changes and the refusals.

    \b
    Examples:
      planish run-pass ./minilm remove-identities
      planish run-pass model.pt2 'fold-batch-norm,eliminate-dead-code' -o after.pt2
      planish run-pass ./minilm exact --stop-after recover-norms --print-after 'fold-.*'
    """
    from planish.ir.files import save
    from planish.ir.textdiff import compare
    from planish.passes.recipe import resolve
    from planish.tools.loading import load_model
    from planish.tools.options import check_output

    if output is not None:
        check_output(str(output), (".pt2",))
    watching.check(resolve(passes))  # a mistyped pass is told before the model is loaded
    progress = stages(quiet=quiet or watching.prints)
    with watching.shown(as_json=as_json), progress as stage:
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
            watching=watching,
        )
    if output is not None:
        save(after.program, output)
    difference = compare(before, after.program)
    names = ("before", "after")
    if as_json:
        lines = difference.unified(names=names)
        found = {"diff": "".join(f"{line}\n" for line in lines), **after.report.to_dict()}
        print_json({**found, **watching.to_dict()})
        return
    print_unified(difference, 3, names)
    _print_passes(after.report)


def _print_passes(report: Report) -> None:
    from planish.accuracy import accuracy_parts, ranked

    console = stdout()
    for entry in report.passes:
        if not entry.ran:
            console.print(f"{entry.name}: left out", highlight=False)
            continue
        counts = f"{len(entry.changes)} changes, {len(entry.refusals)} refusals"
        console.print(f"{entry.name}: {counts}, {1e3 * entry.seconds:.1f} ms", highlight=False)
        if entry.fidelity is not None and entry.cumulative is not None:
            console.print(f"  outputs against those before: {entry.fidelity}", highlight=False)
            console.print(f"  against the original: {entry.cumulative}", highlight=False)
        for change in entry.changes:
            at = f"  ({change.source})" if change.source else ""
            detail = f": {change.detail}" if change.detail else ""
            line = f"  {change.number} {change.rule} at {change.node}{detail}{at}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        for refusal in entry.refusals:
            at = f"  ({refusal.source})" if refusal.source else ""
            line = f"  declined {refusal.rule} at {refusal.node}: {refusal.reason}{at}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        for sentence in entry.remarks:
            console.print(f"  remark: {sentence}", markup=False, highlight=False, soft_wrap=True)
    print_parts(accuracy_parts(ranked(report.passes)))
    for sentence in report.remarks:
        console.print(f"remark: {sentence}", markup=False, highlight=False, soft_wrap=True)
