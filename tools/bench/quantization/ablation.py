"""What each repair of quantization is worth: error before and after, and what it costs.

    python -m planish.tools.bench.quantization.ablation [--only MODEL] [--held 40] [--json]

Every row is a recipe behind ``exact``, run in PyTorch on the program that a file is made of, and
judged on data that nothing was calibrated with; the gain is against the row it builds on.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import click
import torch
from rich import box
from rich.table import Table
from torch import Tensor

from planish.ir.capture import capture
from planish.ir.errors import PlanishError
from planish.ir.execute import run
from planish.ir.program import Program
from planish.passes.base import PassContext
from planish.passes.calibrate import spool
from planish.passes.pipeline import run_pipeline
from planish.passes.recipe import Recipe
from planish.tools.bench.quantization import judges
from planish.tools.bench.quantization.cases import CASES, Case, Inputs
from planish.tools.console import stderr, stdout

PLAIN = "quantize"
_RANGES = "quantize{range=%s}"
_SMOOTH = "smooth-quant{min_gain_db=6}"
_FOLDED = "smooth-quant{explicit=false}"

# The output of a pooler has no axis of tokens, so that padding cannot be left out of it; nothing of
# the figures depends on it.
_NO_POOLER = "where={exclude=[*pooler*]}"
_FOUR = "round-weights{dtype=uint4}"

# Model -> (recipe, the recipe it is compared with), plain ranges first.
_TRANSFORMER = (
    (_RANGES % "token", PLAIN),
    ("quantize{weight_range=mse}", PLAIN),
    ("quantize,correct-bias", PLAIN),
    ("migrate-gamma,quantize", PLAIN),
    ("split-outliers,quantize", PLAIN),
    ("smooth-quant{alpha=0.5,min_gain_db=0},quantize", PLAIN),
    (f"{_FOLDED},quantize", PLAIN),
    (f"{_SMOOTH},quantize", PLAIN),
    (f"{_SMOOTH},quantize,correct-bias", f"{_SMOOTH},quantize"),
    ("quantize,keep-float{min_sqnr_db=30}", PLAIN),
)
_WEIGHTS = (
    (_FOUR, PLAIN),
    ("hqq", _FOUR),
    ("awq", _FOUR),
    ("gptq", _FOUR),
    ("choose-bits,gptq", "gptq"),
)
ABLATIONS: Mapping[str, Sequence[tuple[str, str]]] = {
    "minilm": (
        *_TRANSFORMER,
        *_WEIGHTS,
        (f"{_SMOOTH},adaround{{iterations=0,{_NO_POOLER}}},quantize", f"{_SMOOTH},quantize"),
    ),
    "efficientnet-lite0": (
        ("quantize{weight_range=mse}", PLAIN),
        ("equalize-layers{clamp=per-channel},quantize", PLAIN),
        ("quantize,correct-bias", PLAIN),
        ("quantize,keep-float{min_sqnr_db=20}", PLAIN),
        ("adaround{iterations=0},quantize", PLAIN),
        ("adaround{iterations=0},quantize,correct-bias", "quantize,correct-bias"),
    ),
    "dinov2-s": _TRANSFORMER,
}


@dataclass(frozen=True)
class Row:
    """What one recipe gives.

    Attributes:
        recipe: behind ``exact``.
        scores: figures of fidelity on held-out data.
        gain_db: signal to noise against the recipe it builds on.
        against: that recipe; itself for the first row.
        seconds: what its passes took.
        note: how many sites each pass changed, or the reason why there is no figure.
    """

    recipe: str
    scores: Mapping[str, float]
    gain_db: float | None
    against: str
    seconds: float
    note: str


def judged_on_signal(case: Case, held: Sequence[Inputs]) -> Case:
    """The case with the plain judge, where its own would need all of the held-out data."""
    return replace(case, judge=judges.signal, held=lambda: list(held))


def ablate(
    case: Case,
    rows: Sequence[tuple[str, str]],
    *,
    calibration: int = 0,
    held: int = 0,
    tell: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """Run the recipes on one model.

    Args:
        case: the model, and how it is fed and judged.
        rows: (recipe, the one it is compared with); `quantize` itself always comes first.
        calibration: batches to calibrate with, at most, spread over all; 0 for all.
        held: batches to judge by, at most, by signal to noise alone; 0 for all and every figure.
        tell: called with every row that is done.
    """
    batches = case.held()
    if held and held < len(batches):
        case, batches = judged_on_signal(case, batches[:held]), batches[:held]
    seen = case.calibration()
    seen = seen[:: max(1, len(seen) // calibration)][:calibration] if calibration else seen
    program = capture(case.load(), (*seen[0], *case.extra), dynamic_shapes=case.dynamic_shapes)
    program = run_pipeline(program, Recipe.parse("exact")).program
    reference = _outputs(program, batches)
    found: dict[str, Row] = {}
    for recipe, against in ((PLAIN, PLAIN), *rows):
        row = _row(case, program, recipe, against, seen, batches, reference)
        base = found.get(against)
        if base is not None and "sqnr_db" in row.scores and "sqnr_db" in base.scores:
            row = replace(row, gain_db=row.scores["sqnr_db"] - base.scores["sqnr_db"])
        found[recipe] = row
        tell(row)
    return list(found.values())


def _row(
    case: Case,
    program: Program,
    recipe: str,
    against: str,
    seen: Sequence[Inputs],
    batches: Sequence[Inputs],
    reference: Sequence[Tensor],
) -> Row:
    context = PassContext(target="onnxruntime-cpu")
    calls = [(*inputs, *case.extra) for inputs in seen]
    with spool(calls, program) as context.calibration:
        start = time.perf_counter()
        try:
            done = run_pipeline(program, Recipe.parse(recipe), context)
        except PlanishError as error:  # one repair that cannot run here does not end the table
            return Row(recipe, {}, None, against, time.perf_counter() - start, error.what)
        seconds = time.perf_counter() - start
    note = ", ".join(f"{r.name} {len(r.changes)}" for r in done.records)
    scores = case.judge(batches, reference, _outputs(done.program, batches))
    return Row(recipe, scores, None, against, seconds, note)


def _outputs(program: Program, batches: Sequence[Inputs]) -> list[Tensor]:
    """The first output for every batch."""
    return [run(program, inputs)[0] for inputs in batches]


@click.command()
@click.option("--only", default=".*", help="Regular expression for model names.")
@click.option("--recipe", "recipes", multiple=True, help="Instead of the table's own; repeatable.")
@click.option("--calibration", default=32, show_default=True, help="Batches; 0 for all.")
@click.option("--held", default=0, show_default=True, help="Batches to judge by; 0 for all.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON and nothing else.")
def main(only: str, recipes: tuple[str, ...], calibration: int, held: int, as_json: bool) -> None:
    """Print what each repair is worth.

    \b
    Examples:
      python -m planish.tools.bench.quantization.ablation --only minilm
      python -m planish.tools.bench.quantization.ablation --held 10 --json
    """
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    chosen = [case for case in CASES if case.name in ABLATIONS and re.search(only, case.name)]
    if not chosen:
        stderr().print("no such model: " + ", ".join(ABLATIONS), markup=False)
        sys.exit(2)
    results: dict[str, list[Row]] = {}
    for case in chosen:
        stderr().print(f"{case.name} ...", style="dim", markup=False)
        rows = [(r, PLAIN) for r in recipes] or ABLATIONS[case.name]
        try:
            results[case.name] = ablate(case, rows, calibration=calibration, held=held, tell=_tell)
        except PlanishError as error:  # a model that is not here: the others are
            stderr().print(f"{case.name}: {error}", style="red", markup=False)
            continue
        if not as_json:
            _print(case.name, results[case.name])
    if as_json:
        click.echo(json.dumps({n: [asdict(r) for r in rows] for n, rows in results.items()}))
    sys.exit(0 if len(results) == len(chosen) else 1)


def _tell(row: Row) -> None:
    """A line of progress for one row."""
    figures = ", ".join(f"{name} {value:.4f}" for name, value in row.scores.items())
    line = f"  {row.recipe}: {figures or row.note} ({row.seconds:.1f} s)"
    stderr().print(line, style="dim", markup=False)


def _print(name: str, rows: Sequence[Row]) -> None:
    table = Table(title=name, box=box.SIMPLE)
    table.add_column("recipe", overflow="fold")
    figures = list(dict.fromkeys(figure for row in rows for figure in row.scores))
    for heading in (*figures, "gain dB", "seconds"):
        table.add_column(heading, justify="right")
    table.add_column("sites", overflow="fold")
    for row in rows:
        scores = [f"{row.scores[f]:.4f}" if f in row.scores else "-" for f in figures]
        gain = "" if row.gain_db is None or row.recipe == PLAIN else f"{row.gain_db:+.1f}"
        table.add_row(row.recipe, *scores, gain, f"{row.seconds:.1f}", row.note)
    stdout().print(table)


if __name__ == "__main__":
    main()
