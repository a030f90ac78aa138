"""``planish bisect``: which pass, and which rewrite of it, makes a result wrong, slow or crash."""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from planish.tools.console import print_json, stages, stdout
from planish.tools.options import (
    calibration_option,
    common,
    model_argument,
    target_option,
)

if TYPE_CHECKING:
    from planish.passes.debug.bisect import Bisection, Evaluation
    from planish.passes.debug.predicates import Predicate
    from planish.tools.bisect_subject import Subject, Wish

_CONTEXT = 2  # lines around a difference
_SHOWN = 60  # lines of the diff of one rewrite


@dataclass(frozen=True)
class Question:
    """The predicate as the user wrote it; none means the default verification."""

    min_sqnr: float | None = None
    max_abs: float | None = None
    metric: str | None = None
    max_drop: float | None = None
    crash: bool = False
    non_finite: bool = False
    slower_than: str | None = None
    threads: int | None = None

    def check(self) -> None:
        """Refuse what cannot be asked, before any long work is done.

        Raises:
            UsageError: two predicates at once, one that is incomplete, a bad number.
        """
        from planish.ir.errors import UsageError
        from planish.tools.predicates import read_limit

        given = [
            name
            for name, value in (
                ("--min-sqnr", self.min_sqnr is not None),
                ("--max-abs", self.max_abs is not None),
                ("--metric", self.metric is not None),
                ("--crash", self.crash),
                ("--non-finite", self.non_finite),
                ("--slower-than", self.slower_than is not None),
            )
            if value
        ]
        if len(given) > 1:
            raise UsageError(f"{' and '.join(given)} are two questions", hint="ask one at a time")
        if (self.metric is None) != (self.max_drop is None):
            pair = ("--metric MODULE:FUNCTION", "--max-drop X")
            there, missing = pair if self.metric is not None else reversed(pair)
            raise UsageError(f"{there} alone asks nothing", hint=f"add {missing}")
        for name, value in (("--max-abs", self.max_abs), ("--max-drop", self.max_drop)):
            if value is not None and not value >= 0:
                raise UsageError(f"{name} is {value:g}", hint="give a number of at least 0")
        if self.min_sqnr is not None and math.isnan(self.min_sqnr):
            raise UsageError("--min-sqnr is nan", hint="give a number of decibels")
        if self.slower_than is not None:
            read_limit(self.slower_than)
        elif self.threads is not None:
            raise UsageError("--threads means nothing here", hint="it belongs to --slower-than")

    @property
    def on_batches(self) -> bool:
        """Whether calibration inputs are looked at."""
        return self.min_sqnr is not None or self.max_abs is not None or self.non_finite

    def predicate(self, stack: ExitStack, subject: Subject) -> Predicate:
        """The predicate itself.

        Raises:
            UsageError: the metric cannot be imported.
        """
        from planish.passes.debug import predicates as known
        from planish.tools.loading import import_callable
        from planish.tools.predicates import Metric, SlowerThan

        seed = subject.recipe.seed
        options: dict[str, Any] = {"calibration": subject.batches, "seed": seed}
        if self.min_sqnr is not None:
            return known.MinSqnr(self.min_sqnr, **options)
        if self.max_abs is not None:
            return known.MaxAbs(self.max_abs, **options)
        if self.non_finite:
            return known.NonFinite(**options)
        if self.crash:
            return known.Crashes(seed=seed)
        if self.metric is not None and self.max_drop is not None:
            return Metric(import_callable(self.metric), self.max_drop, name=self.metric)
        if self.slower_than is not None:
            threads = self.threads or 1
            slower = SlowerThan(self.slower_than, target=subject.target, threads=threads)
            return stack.enter_context(slower)
        return known.KeepsContract(seed=seed, bounds=subject.bounds)


_PREDICATES = (
    click.option("--min-sqnr", type=float, metavar="DB", help="Bad below this SQNR in dB."),
    click.option("--max-abs", type=float, metavar="X", help="Bad above this absolute difference."),
    click.option(
        "--metric",
        metavar="MODULE:FUNCTION",
        help="Called with the optimized model; returns a score, higher is better.",
    ),
    click.option("--max-drop", type=float, metavar="X", help="Bad where the score drops by more."),
    click.option("--crash", is_flag=True, help="Bad where a pass fails or the result cannot run."),
    click.option("--non-finite", is_flag=True, help="Bad where an output gains NaN or infinity."),
    click.option(
        "--slower-than",
        metavar="X",
        help="Bad where the file is slower: 1.1 (times the original's time) or 12ms.",
    ),
    click.option("--threads", type=click.IntRange(min=1), help="Of --slower-than; default 1."),
)


def _asks(function: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_PREDICATES):
        function = option(function)
    return function


@click.command()
@model_argument
@click.option("--recipe", help="As for `planish optimize`; default exact.")
@target_option
@_asks
@calibration_option
@click.option("--exhaustive", is_flag=True, help="Look at every pass and site, not at log2 of it.")
@click.option("--disable-pass", multiple=True, metavar="PASS", help="Leave it out; repeatable.")
@click.option(
    "--exclude", multiple=True, metavar="RULE@NODE", help="Leave out one site; repeatable."
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Write before.pt2 and after.pt2 of the guilty rewrite.",
)
@common
def bisect(
    model: str,
    recipe: str | None,
    target: str | None,
    calibration: str | None,
    exhaustive: bool,
    disable_pass: tuple[str, ...],
    exclude: tuple[str, ...],
    output: Path | None,
    seed: int,
    as_json: bool,
    quiet: bool,
    **asked: Any,  # noqa: ANN401 - the options of a Question
) -> int:
    """Find the pass, then the rewrite, that makes the result of a recipe bad.

    MODEL is as for `planish optimize`, or a folder planish-repro-* (then with its own recipe).
    Without a question, bad is what the default verification rejects, or a crash. Every level takes
    at most ceil(log2(N)) + 1 evaluations. Exit code 0: found; 1: nothing is bad.

    \b
    Examples:
      planish bisect ./minilm
      planish bisect ./minilm --recipe recipe.yaml --min-sqnr 40 --calibration my_data:batches
      planish bisect my_package.models:build --metric my_eval:accuracy --max-drop 0.01
      planish bisect model.pt2 --recipe exact --slower-than 1.1 -o guilty
      planish bisect planish-repro-1f0c2a
    """
    from planish.ir.symbols import Symbols
    from planish.passes.debug.bisect import bisect as find
    from planish.tools.bisect_subject import Wish

    question = Question(**asked)
    question.check()
    wish = Wish(model, recipe, target, calibration, seed, exclude, disable_pass)
    made = output is not None and _make_folder(output)
    with ExitStack() as stack:
        tell = _teller(as_json=as_json)
        stage = stack.enter_context(stages(quiet=quiet))
        subject = wish.load(stack, stage, on_batches=question.on_batches)
        symbols = Symbols(subject.program)
        found = find(
            subject.program,
            subject.recipe,
            question.predicate(stack, subject),
            context_factory=subject.context,
            tell=tell,
            working=stage,
            exhaustive=exhaustive,
            disabled=disable_pass,
        )
    with symbols.restored():  # a guilty pass may have fixed a size for all versions of the program
        _report(found, wish, subject, _write(found, output), as_json=as_json)
    if made and output is not None and not any(output.iterdir()):
        output.rmdir()
    return 0 if found.found else 1


def _teller(*, as_json: bool) -> Callable[[Evaluation], None]:
    """Prints evaluations on stdout as they come; a live progress bar must not swallow them."""
    real = sys.stdout

    def tell(evaluation: Evaluation) -> None:
        if as_json:
            return
        # On a terminal the bar has put itself before sys.stdout, and makes room for the line.
        stream = sys.stdout if real.isatty() else real
        stream.write(f"{evaluation}\n")
        stream.flush()

    return tell


# -- the answer -----------------------------------------------------------------------------------


def _make_folder(folder: Path) -> bool:
    """Make a folder before any long work is done; says whether it is a new one."""
    from planish.ir.errors import UsageError

    new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # asking for permission is not enough
    except OSError as error:
        raise UsageError(
            f"cannot write into {str(folder)!r}: {error.strerror}", hint="name a new folder"
        ) from None
    return new


def _write(found: Bisection, folder: Path | None) -> dict[str, str | None]:
    """Write the two programs; the paths, or None where there is no such program."""
    from planish.ir.files import save

    written: dict[str, str | None] = {}
    if folder is None or not found.found:
        return written
    for name, program in (("before", found.before), ("after", found.after)):
        path = folder / f"{name}.pt2"
        written[name] = str(path)
        if program is None:
            written[name] = None
            continue
        try:
            save(program, path)
        except Exception as error:  # what is no valid program may fail in any way
            written[name] = None
            sys.stderr.write(f"the program {name} the rewrite cannot be saved: {error}\n")
    return written


def _difference(found: Bisection) -> list[str]:
    """The guilty rewrite as a diff; where the pass raised, the lines around its node before it."""
    from planish.ir.text import excerpt
    from planish.ir.textdiff import compare

    if found.before is None:
        return []
    if found.after is None:
        nodes = [n for n in found.before.nodes if n.name == found.node]
        return excerpt(found.before, nodes[0]).splitlines() if nodes else []
    try:
        difference = compare(found.before, found.after)
    except Exception as error:  # what is no valid program may fail in any way
        return [f"the program after it cannot be printed: {type(error).__name__}: {error}"]
    return difference.unified(context=_CONTEXT, names=("before", "after"))


def _report(
    found: Bisection,
    wish: Wish,
    subject: Subject,
    written: dict[str, str | None],
    *,
    as_json: bool,
) -> None:
    difference = _difference(found)
    if as_json:
        facts = found.to_dict()
        facts["remarks"] = [*subject.remarks, *facts["remarks"]]
        print_json(
            {
                "model": wish.model,
                "recipe": str(subject.recipe),
                **facts,
                "diff": difference,
                **({"written": written} if written else {}),
            }
        )
        return
    console = stdout()

    def say(line: str, style: str | None = None) -> None:
        console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)

    if not found.found:
        # The result of the whole recipe comes first; where nothing changed, it is the original.
        result = next((e for e in found.evaluations if e.level == "pass"), found.evaluations[0])
        say(f"nothing is bad: {found.predicate}", "bold green")
        say(f"  the result of the recipe: {result.seen}")
    else:
        _say_answer(found, say)
        for line in difference[:_SHOWN]:
            say(line, _style(line))
        if len(difference) > _SHOWN:
            say(f"... {len(difference) - _SHOWN} more lines; -o DIR writes both programs")
    for remark in (*subject.remarks, *found.remarks):
        say(f"remark: {remark}", "yellow")
    if found.found:
        if found.site is not None:
            limits = f"--bisect-limit {found.site - 1}", f"--bisect-limit {found.site}"
            say(f"see it: planish optimize with {limits[0]}, and with {limits[1]}")
        say(f"without it: {found.suggestion}", "bold")
    for name, path in written.items():
        say(f"wrote {path}" if path else f"there is no program {name} it: nothing was written")


def _say_answer(found: Bisection, say: Callable[..., None]) -> None:
    where = f"pass {found.pass_name} (step {found.step})"
    if found.site is not None:
        where += f", rewrite site {found.site}: {found.rule} at {found.node}"
    elif found.rule or found.node:
        where += f": rule {found.rule or 'unknown'} at {found.node or 'an unknown node'}"
    say(f"guilty: {where}", "bold red")
    if found.source:
        say(f"  source: {found.source}")
    say("  " + found.symptom.splitlines()[0])


def _style(line: str) -> str | None:
    if line.startswith(("---", "+++")):
        return "bold"
    return {"+": "green", "-": "red", "@": "cyan"}.get(line[:1])
