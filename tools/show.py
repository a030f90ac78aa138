"""``planish show``: a model as canonical text, or the life of one of its nodes."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from planish.tools.console import print_json, printable, stages, stdout
from planish.tools.options import common, model_argument, optimize_loaded, verify_option
from planish.tools.watching import Watching, remarks, said
from planish.tools.watching import watching as watching_options

if TYPE_CHECKING:
    from planish.ir.errors import PlanishError
    from planish.ir.program import Program
    from planish.passes.debug.life import Life
    from planish.passes.debug.story import Story


@click.command()
@model_argument
@click.option("--recipe", default="none", show_default=True, help="Run this recipe first.")
@click.option("--values", is_flag=True, help="Print a digest of every constant's value.")
@click.option("--cost", "with_cost", is_flag=True, help="Print parameters, bytes and MACs instead.")
@click.option(
    "--explain",
    metavar="NODE",
    help="Tell what the recipe did to one value instead: %5 of the text, a node's name, or a "
    "constant's as @conv.weight; NODE@2 is what had this name after step 2, NODE@0 at capture.",
)
@verify_option
@watching_options
@common
def show(
    model: str,
    recipe: str,
    values: bool,
    with_cost: bool,
    explain: str | None,
    verify: str,
    watching: Watching,
    seed: int,
    as_json: bool,
    quiet: bool,
) -> None:
    """Print MODEL as planish sees it.

    --explain tells where a value came from, which pass and rule made, replaced, edited or removed
    it at which numbered site, which rules looked at it and declined, and what stands for it now.

    \b
    Examples:
      planish show ./minilm | less
      planish show model.pt2 --recipe exact
      planish show my_package.models:build --cost
      planish show ./minilm --recipe exact --explain %5
      planish show ./minilm --recipe exact --explain layer_norm_3 --json
    """
    from planish.ir.errors import PlanishError, UsageError
    from planish.ir.text import text
    from planish.passes.debug.life import Life
    from planish.passes.recipe import resolve
    from planish.tools.loading import load_model

    if explain is not None and (values or with_cost):
        raise UsageError("--explain prints no program", hint="leave out --values and --cost")
    watching.check(resolve(recipe))  # a mistyped recipe is told before the model is loaded
    life = Life() if explain is not None else None
    progress = stages(quiet=quiet or watching.prints)
    with watching.shown(as_json=as_json), progress as stage:
        stage("loading")
        loaded = load_model(model)
        try:
            result = optimize_loaded(
                loaded,
                stage,
                recipe=recipe,
                target="onnx",
                verify=verify,
                seed=seed,
                watching=watching,
                instruments=() if life is None else (life,),
            )
        except PlanishError as error:
            if life is not None and explain is not None and life.began:
                _explain_failure(life, explain, error, as_json=as_json)
            raise
    found: dict[str, Any]
    if life is not None and explain is not None:
        story = life.explain(explain)
        found = story.to_dict()
    else:
        found = {"text": text(result.program, values=values), **_cost(result.program)}
    if as_json:
        print_json({**found, **said(result.report), **watching.to_dict()})
        return
    for line in remarks(result.report):
        click.echo(line, err=True)
    if explain is not None:
        _print_story(story)
    elif with_cost:
        _print_cost(result.program)
    else:
        sys.stdout.write(printable(found["text"]))


def _cost(program: Program) -> dict[str, Any]:
    from planish.ir.cost import cost, macs_by_operator

    total = cost(program)
    return {
        "parameters": total.parameters,
        "bytes": total.bytes,
        "macs": total.macs,
        "macs_by_operator": macs_by_operator(program),
    }


def _print_cost(program: Program) -> None:
    from planish.ir.cost import cost, macs_by_operator
    from planish.report import cost_cells

    console, total = stdout(), cost(program)
    parameters, size, macs = cost_cells(total)
    console.print(f"{parameters}parameters, {size}, {macs}MACs on the sample", highlight=False)
    for name, count in sorted(macs_by_operator(program).items(), key=lambda item: -item[1]):
        share = count / max(1, total.macs)
        console.print(f"  {name:48} {count:>16,} {share:6.1%}", highlight=False)


def _explain_failure(life: Life, node: str, failure: PlanishError, *, as_json: bool) -> None:
    """A run that fails is where a node's life matters most: tell it as far as it went."""
    from planish.ir.errors import UsageError

    try:
        story = life.explain(node)
    except UsageError as error:  # the failure itself is what must show
        failure.add_note(str(error))
        return
    if as_json:
        print_json(story.to_dict())
    else:
        _print_story(story)


def _print_story(story: Story) -> None:
    console = stdout()
    for line in story.text().splitlines():
        style = {"-": "red", "+": "green"}.get(line.strip()[:1]) if line[:1] == " " else "bold"
        console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)
