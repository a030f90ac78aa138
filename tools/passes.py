"""``planish passes``: list the passes, or explain one."""

from __future__ import annotations

import dataclasses
import inspect

import click

from planish.tools.console import print_json, stdout


@click.command()
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def passes(name: str | None, as_json: bool) -> None:
    """List all passes, or print the documentation and options of one.

    \b
    Examples:
      planish passes
      planish passes fold-batch-norm
    """
    from planish.passes.registry import all_passes, load_pass

    if name is not None:
        facts = describe(name, load_pass(name))
        if as_json:
            print_json(facts)
        else:
            _print_one(facts)
        return
    table = [describe(n, kind) for n, kind in all_passes().items()]
    if as_json:
        print_json(table)
        return
    from rich import box
    from rich.table import Table

    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("pass", "contract", "options", "what it does"):
        shown.add_column(title, overflow="fold")
    for facts in table:
        options = ", ".join(option["name"] for option in facts["options"])  # type: ignore[attr-defined]
        shown.add_row(str(facts["name"]), str(facts["contract"]), options, str(facts["summary"]))
    stdout().print(shown, highlight=False)


def describe(name: str, kind: type) -> dict[str, object]:
    """What there is to know about a pass, as plain data."""
    module = inspect.getmodule(kind)
    documentation = inspect.cleandoc((module.__doc__ if module else None) or kind.__doc__ or "")
    return {
        "name": name,
        "contract": kind.contract.value,  # type: ignore[attr-defined]
        "requires": sorted(fact.name for fact in kind.requires),  # type: ignore[attr-defined]
        "source": list(kind.source),  # type: ignore[attr-defined]
        "summary": documentation.split("\n", 1)[0],
        "documentation": documentation,
        "options": [
            {
                "name": field.name,
                "type": str(field.type),
                "default": None if field.default is dataclasses.MISSING else repr(field.default),
            }
            for field in dataclasses.fields(kind)
        ],
    }


def _print_one(facts: dict[str, object]) -> None:
    console = stdout()
    console.print(f"{facts['name']} ({facts['contract']})\n", highlight=False)
    console.print(str(facts["documentation"]), highlight=False, markup=False)
    options: list[dict[str, str]] = facts["options"]  # type: ignore[assignment]
    console.print("\noptions:" if options else "\nno options", highlight=False)
    for option in options:
        line = f"  {option['name']}: {option['type']} = {option['default']}"
        console.print(line, highlight=False, markup=False)
