"""``planish show``: a model as canonical text."""

from __future__ import annotations

import sys

import click

from planish.tools.console import print_json, stages, stdout
from planish.tools.options import common, model_argument, optimize_loaded


@click.command()
@model_argument
@click.option("--recipe", default="none", show_default=True, help="Run this recipe first.")
@click.option("--values", is_flag=True, help="Print a digest of every constant's value.")
@click.option("--cost", "with_cost", is_flag=True, help="Print parameters, bytes and MACs instead.")
@common
def show(
    model: str,
    recipe: str,
    values: bool,
    with_cost: bool,
    seed: int,
    as_json: bool,
    quiet: bool,
) -> None:
    """Print MODEL as planish sees it.

    \b
    Examples:
      planish show ./minilm | less
      planish show model.pt2 --recipe exact
      planish show my_package.models:build --cost
    """
    from planish.ir.cost import cost, macs_by_operator
    from planish.ir.text import text
    from planish.passes.recipe import resolve
    from planish.report import cost_cells
    from planish.tools.loading import load_model

    resolve(recipe)  # a mistyped recipe is told before the model is loaded
    with stages(quiet=quiet) as stage:
        stage("loading")
        loaded = load_model(model)
        result = optimize_loaded(loaded, stage, recipe=recipe, target="onnx", seed=seed)
    program = result.program
    total = cost(program)
    if as_json:
        print_json(
            {
                "text": text(program, values=values),
                "parameters": total.parameters,
                "bytes": total.bytes,
                "macs": total.macs,
                "macs_by_operator": macs_by_operator(program),
            }
        )
    elif with_cost:
        console = stdout()
        parameters, size, macs = cost_cells(total)
        console.print(f"{parameters}parameters, {size}, {macs}MACs on the sample", highlight=False)
        for name, count in sorted(macs_by_operator(program).items(), key=lambda item: -item[1]):
            share = count / max(1, total.macs)
            console.print(f"  {name:48} {count:>16,} {share:6.1%}", highlight=False)
    else:
        sys.stdout.write(text(program, values=values))
