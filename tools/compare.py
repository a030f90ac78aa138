"""``planish compare``: do two models or files answer alike?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
import torch

from planish.tools.console import print_json, stages, stdout
from planish.tools.options import common, trust_code_option

if TYPE_CHECKING:
    from planish.ir.compare import Fidelity


def parse_sizes(pairs: tuple[str, ...]) -> dict[str, int]:
    """Read ``name=number`` pairs.

    Raises:
        UsageError: another form.
    """
    from planish.ir.errors import UsageError

    sizes: dict[str, int] = {}
    for pair in pairs:
        name, _, number = pair.partition("=")
        if not name or not number.isdigit() or int(number) < 1:
            raise UsageError(f"--size {pair!r} is not NAME=NUMBER", hint="for example batch=8")
        sizes[name] = int(number)
    return sizes


size_option = click.option(
    "--size", "sizes", multiple=True, metavar="NAME=N", help="Size of a dynamic dimension."
)


@click.command()
@click.argument("reference", metavar="A")
@click.argument("other", metavar="B")
@size_option
@click.option("--min-sqnr", type=float, help="Fail below this SQNR in dB.")
@click.option("--max-abs", type=float, help="Fail above this absolute difference.")
@trust_code_option
@common
def compare(
    reference: str,
    other: str,
    sizes: tuple[str, ...],
    min_sqnr: float | None,
    max_abs: float | None,
    trust_code: bool,
    seed: int,
    as_json: bool,
    quiet: bool,
) -> int:
    """Run A and B on the same inputs and compare every output.

    A and B are .onnx, .pt or .pt2 files or anything that MODEL may be. Without a threshold the
    exit code is 3 unless all outputs are equal within the bound of their type (1e-4 for float32).

    \b
    Examples:
      planish compare ./minilm minilm.onnx
      planish compare a.onnx b.onnx --size batch=4 --size sequence=77
      planish compare float.onnx int8.onnx --min-sqnr 20
    """
    from planish.ir.compare import difference, measure
    from planish.ir.errors import UsageError
    from planish.tools.candidates import make_inputs, open_candidate, paired

    with stages(quiet=quiet) as stage:
        stage("opening")
        pair = [open_candidate(spec, trust_code=trust_code) for spec in (reference, other)]
        inputs = make_inputs(pair, parse_sizes(sizes), seed=seed)
        stage("running")
        expected, actual = (candidate.run(inputs) for candidate in pair)
    pairs = paired(expected, actual)
    if not pairs:
        raise UsageError(
            f"their outputs do not match: {', '.join(expected)} and {', '.join(actual)}",
            hint="compare artifacts of one model",
        )
    by_name = any(name in actual for name in expected)
    only = sorted(set(expected) ^ set(actual)) if by_name else []
    rows = []
    for name, expected_value, value in pairs:
        a, b = torch.from_numpy(expected_value), torch.from_numpy(value)
        problem = difference((a,), (b,))
        rows.append((name, measure((a,), (b,)) if a.shape == b.shape else None, problem))
    failed = [
        name for name, fidelity, problem in rows if _fails(fidelity, problem, min_sqnr, max_abs)
    ]
    if as_json:
        print_json(
            {
                "outputs": {
                    name: {**(fidelity.to_dict() if fidelity else {}), "problem": problem}
                    for name, fidelity, problem in rows
                },
                "only_in_one": only,
                "failed": failed,
            }
        )
    else:
        _print(rows, failed, only)
    return 3 if failed else 0


def _print(
    rows: list[tuple[str, Fidelity | None, str | None]], failed: list[str], only: list[str]
) -> None:
    from planish.report import sqnr_text

    console = stdout()
    for name, fidelity, problem in rows:
        verdict = "FAILS" if name in failed else "ok"
        numbers = (
            f"SQNR {sqnr_text(fidelity)} dB, cosine {fidelity.cosine:.6f}, "
            f"max abs {fidelity.max_abs:.2e}"
            if fidelity
            else "-"
        )
        note = f"  ({problem})" if problem else ""
        console.print(f"{verdict:5} {name}: {numbers}{note}", highlight=False, markup=False)
    if only:
        console.print(f"only in one of them: {', '.join(only)}", highlight=False)


def _fails(
    fidelity: Fidelity | None,
    problem: str | None,
    min_sqnr: float | None,
    max_abs: float | None,
) -> bool:
    if min_sqnr is None and max_abs is None:
        return problem is not None
    if fidelity is None:
        return True
    too_noisy = min_sqnr is not None and fidelity.sqnr_db < min_sqnr
    return too_noisy or (max_abs is not None and not fidelity.max_abs <= max_abs)
