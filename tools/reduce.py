"""``planish reduce``: shrink the program of a bundle while its failure persists."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from planish.tools.bundles import open_bundle
from planish.tools.console import print_json, stages, stdout

if TYPE_CHECKING:
    from planish.passes.debug.reduce_bundle import ReducedBundle
    from planish.passes.debug.reduce_search import Progress


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="The folder to write; BUNDLE-reduced by default.",
)
@click.option(
    "--max-tries",
    type=click.IntRange(min=1),
    default=1000,
    show_default=True,
    help="How many programs may be tried.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("--quiet", is_flag=True, help="No progress output.")
def reduce(bundle: Path, output: Path | None, max_tries: int, as_json: bool, quiet: bool) -> None:
    """Shrink BUNDLE, the folder planish-repro-... that an error named.

    Operators are left out as long as the same failure shows: the same pass, the same rule, the same
    kind of error. In the end none of them can go. Weights and inputs become zeros, ones or small
    numbers where they do not matter.

    Writes a folder that is a bundle again (planish repro FOLDER), with module.py: the program that
    is left, as a PyTorch module to read, run and pass on. Exit code 1 if BUNDLE does not reproduce
    here, since nothing can be reduced then.

    Replaying imports the passes that the bundle's recipe names as module:Class, also from the
    current folder: look at a bundle from elsewhere with `planish repro BUNDLE --show` first.

    \b
    Examples:
      planish reduce planish-repro-57a3046d98ce
      planish reduce planish-repro-57a3046d98ce -o small --json
      cd small && planish optimize module:build --recipe recipe.yaml
    """
    from planish.passes.debug.reduce_bundle import reduce_bundle

    folder = output or bundle.resolve().with_name(f"{bundle.resolve().name}-reduced")
    with stages(quiet=quiet) as stage:
        stage("loading")
        found = open_bundle(bundle)
        total = len(found.program.operators)

        def tell(progress: Progress) -> None:
            text = f"reducing: {progress.now} of {total} operators, {progress.tries} tries"
            stage(text, total - progress.now, total)

        stage("replaying")
        result = reduce_bundle(found, folder, tell=tell, max_tries=max_tries)
    if as_json:
        print_json({"bundle": str(bundle), "max_tries": max_tries, **result.to_dict()})
    else:
        _print(result, max_tries)


def _print(result: ReducedBundle, max_tries: int) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("stage")
    for title in ("operators before", "now", "tries so far"):
        table.add_column(title, justify="right")
    for step in result.reduction.steps:
        table.add_row(step.stage, str(step.before), str(step.now), str(step.tries))
    console = stdout()
    console.print(table, highlight=False)
    lines = [
        "",
        f"{result.before} -> {result.after} operators ({100 * result.removed:.1f}% removed), "
        f"{result.bytes_before:,} -> {result.bytes_after:,} bytes of constants",
        "passes: " + ", ".join(result.passes),
    ]
    if result.reduction.exhausted:
        lines.append(
            f"stopped after {max_tries} tries: more might go; run again on the result, or with "
            "a larger --max-tries"
        )
    else:
        lines.append("none of these operators can be left out")
    if result.problem is not None:
        lines.append(f"only program.pt2 reproduces the failure; module.py: {result.problem}")
    files = "program.pt2 and module.py" if result.module else "program.pt2"
    lines += [f"wrote {files} into {result.folder}", f"replay: {result.to_dict()['replay']}"]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
