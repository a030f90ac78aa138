"""``planish repro``: make the failure of a bundle happen again, or say what is in the bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from planish.tools.bundles import open_bundle
from planish.tools.console import print_json, printable, stages, stdout

if TYPE_CHECKING:
    from planish.passes.debug.bundle import Bundle


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--show", is_flag=True, help="Print what is in it; run and import nothing.")
@click.option("--only-failing", is_flag=True, help="Run the pass that failed and none after it.")
@click.option("--program", type=click.Path(path_type=Path), help="Another program, *.pt2.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("--quiet", is_flag=True, help="No progress output.")
def repro(
    bundle: Path, show: bool, only_failing: bool, program: Path | None, as_json: bool, quiet: bool
) -> int:
    """Replay BUNDLE, the folder planish-repro-... that an error named.

    Prints the error, and whether it is the same failure: the same pass, the same rule, the same
    kind of error. Exit code 0 if it is, 1 if another error shows or none.

    Nothing in a bundle is pickled, and reading one runs no code. Replaying one imports the passes
    that its recipe names as module:Class, also from the current folder: that is the code of whoever
    wrote them. Look at a bundle from elsewhere with --show first.

    \b
    Examples:
      planish repro planish-repro-57a3046d98ce
      planish repro planish-repro-57a3046d98ce --show
      planish repro planish-repro-57a3046d98ce --program reduced.pt2 --json
    """
    from planish.ir.capture_errors import quiet as without_logs
    from planish.ir.errors import UsageError
    from planish.passes.debug.bundle import replay

    if show and (only_failing or program is not None):
        raise UsageError(
            "--show runs nothing", hint="leave out --only-failing and --program, or --show"
        )
    found = open_bundle(bundle, program=not show)
    if show:
        _show(found, as_json=as_json)
        return 0
    with stages(quiet=quiet) as stage:
        stage("loading")
        other = None
        if program is not None:
            from planish.ir.files import load

            other = load(program)
        stage("replaying")
        with without_logs():
            error = replay(found, other, only_failing=only_failing)
    return _report(found, error, as_json=as_json)


def _show(bundle: Bundle, *, as_json: bool) -> None:
    sizes = {p.name: p.stat().st_size for p in sorted(bundle.folder.iterdir()) if p.is_file()}
    facts = bundle.facts
    if as_json:
        print_json({"folder": str(bundle.folder), **facts.to_dict(), "files": sizes})
        return
    where = {
        "pass": "the first pass of the recipe",
        "recipe": "the recipe as a whole",
        "export": f"export for {facts.export.target}" if facts.export else "export",
    }
    lines = [
        facts.failure.message,
        "",
        f"fails: {where[facts.stage]}",
        f"signature: {facts.failure.signature}",
        f"verify: {facts.verify}, seed of the second probe: {facts.seed}",
        f"sites before: {facts.sites.count}, limit: {facts.sites.limit}",
        *(f"site left out: {site}" for site in facts.sites.excluded),
        f"passes: {len(facts.passes)}",
        *(f"  {text}" for text in facts.passes),
        "files:",
        *(f"  {name:<18}{size:>12,} bytes" for name, size in sizes.items()),
        "versions: " + ", ".join(f"{k} {v}" for k, v in facts.versions.items()),
        "machine: " + ", ".join(f"{k} {v}" for k, v in facts.platform.items()),
        *(f"not in the bundle: {sentence}" for sentence in facts.left_out),
    ]
    _print(lines)


def _report(bundle: Bundle, error: BaseException | None, *, as_json: bool) -> int:
    from planish.passes.debug.bundle import failure_of
    from planish.passes.debug.bundle_replay import drift

    expected = bundle.failure
    got = failure_of(error) if error is not None else None
    same = got is not None and got.signature == expected.signature
    differences = {} if same else drift(bundle)
    if as_json:
        result: dict[str, Any] = {
            "bundle": str(bundle.folder),
            "reproduced": same,
            "expected": {"signature": expected.signature, "message": expected.message},
            "got": {"signature": got.signature, "message": got.message} if got else None,
            "differences": {n: {"bundle": a, "here": b} for n, (a, b) in differences.items()},
            "left_out": list(bundle.facts.left_out),
        }
        print_json(result)
        return 0 if same else 1
    if got is not None:
        _print([got.message, ""])
    if same:
        _print(["reproduced: the same failure"])
        return 0
    what = f"another failure ({got.signature})" if got else "no failure"
    lines = [f"not reproduced: {what}, where the bundle has {expected.signature}:"]
    lines += [f"  {line}" for line in expected.message.splitlines()]
    lines += [f"not in the bundle: {sentence}" for sentence in bundle.facts.left_out]
    lines += [
        f"differs: {name} was {there} and is {here}" for name, (there, here) in differences.items()
    ]
    if not differences:
        lines.append("versions and machine are those of the bundle")
    _print(lines)
    return 1


def _print(lines: list[str]) -> None:
    console = stdout()
    for line in lines:
        console.print(printable(line), markup=False, highlight=False, soft_wrap=True)
