"""``planish bench``: time artifacts against each other on the runtime that will serve them."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING

import click
import torch

from planish.tools.compare import parse_sizes, size_option
from planish.tools.console import print_json, stages, stdout
from planish.tools.options import common, trust_code_option

if TYPE_CHECKING:
    from planish.tools.candidates import Candidate, Values


@click.command()
@click.argument("artifacts", nargs=-1, required=True, metavar="A [B]...")
@size_option
@click.option("--threads", default=1, show_default=True, help="Threads within an operator.")
@click.option("--rounds", default=40, show_default=True, help="Timed rounds; all run in each.")
@click.option("--no-memory", is_flag=True, help="Do not measure memory: no further processes.")
@trust_code_option
@common
def bench(
    artifacts: tuple[str, ...],
    sizes: tuple[str, ...],
    threads: int,
    rounds: int,
    no_memory: bool,
    trust_code: bool,
    seed: int,
    as_json: bool,
    quiet: bool,
) -> None:
    """Time A, B, ... in alternation on the same inputs; ratios are against A.

    A ratio is the median over rounds of A's latency divided by the other's: above 1 is faster
    than A. The quartiles say how noisy the machine was. Each is an .onnx, .pt or .pt2 file or a
    MODEL. Peak memory is what loading and running a file adds to a process of its own.

    \b
    Examples:
      planish bench plain.onnx minilm.onnx --size batch=1 --size sequence=128
      planish bench ./minilm minilm.pt minilm.onnx
      planish bench minilm.pt minilm.pt2 --trust-code
      planish bench a.onnx b.onnx --threads 2 --rounds 100 --json
    """
    from planish.ir.compare import measure
    from planish.tools.candidates import make_inputs, open_candidate, paired
    from planish.tools.timing import interleave

    with stages(quiet=quiet) as stage:
        stage("opening")
        torch.set_num_threads(threads)
        candidates = [
            open_candidate(spec, threads=threads, trust_code=trust_code) for spec in artifacts
        ]
        inputs = make_inputs(candidates, parse_sizes(sizes), seed=seed)
        outputs = [candidate.run(inputs) for candidate in candidates]
        timings = interleave(
            [partial(candidate.run, inputs) for candidate in candidates],
            rounds=rounds,
            on_round=lambda done: stage("timing", done, rounds),
        )
        peaks = []
        for done, candidate in enumerate(candidates):
            stage("memory", done, len(candidates))
            peaks.append(None if no_memory else _peak(candidate, inputs, threads, trust_code))
    rows = []
    for candidate, timing, values, peak in zip(candidates, timings, outputs, peaks, strict=True):
        pairs = [(a, b) for _, a, b in paired(outputs[0], values) if a.shape == b.shape]
        fidelity = measure(
            tuple(torch.from_numpy(a) for a, _ in pairs),
            tuple(torch.from_numpy(b) for _, b in pairs),
        )
        rows.append((candidate, timing, fidelity if pairs else None, peak))
    if as_json:
        print_json(
            {
                "threads": threads,
                "inputs": {name: list(value.shape) for name, value in inputs.items()},
                "candidates": [
                    {
                        "name": candidate.name,
                        **asdict(timing),
                        "load_ms": candidate.load_ms,
                        "bytes": candidate.bytes,
                        "peak_bytes": peak,
                        "fidelity": fidelity.to_dict() if fidelity else None,
                    }
                    for candidate, timing, fidelity, peak in rows
                ],
            }
        )
        return
    _print(rows, threads, {name: tuple(value.shape) for name, value in inputs.items()})


def _peak(candidate: Candidate, inputs: Values, threads: int, trust_code: bool) -> int | None:
    """Peak memory of a file; None for a model, which is captured by the process that runs it.

    Raises:
        UnsupportedError: it could not be measured.
    """
    from planish.ir.errors import UnsupportedError
    from planish.tools.peak_memory import peak_bytes

    if candidate.bytes is None:
        return None
    try:
        return peak_bytes(candidate.name, inputs, threads=threads, trust_code=trust_code)
    except RuntimeError as error:
        raise UnsupportedError(
            f"the memory of {candidate.name} could not be measured: {error}",
            hint="add --no-memory to leave that out",
        ) from None


def _print(rows: list, threads: int, shapes: dict[str, tuple[int, ...]]) -> None:  # type: ignore[type-arg]
    from rich import box
    from rich.table import Table

    from planish.report import sqnr_text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("artifact", overflow="fold")
    for title in (
        "median ms",
        "speed vs first",
        "quartiles",
        "load ms",
        "MB",
        "peak MB",
        "SQNR dB",
    ):
        table.add_column(title, justify="right")
    for candidate, timing, fidelity, peak in rows:
        table.add_row(
            candidate.name,
            f"{timing.median_ms:.2f}",
            f"{timing.ratio:.2f}x",
            f"{timing.low:.2f}-{timing.high:.2f}",
            f"{candidate.load_ms:.0f}",
            "-" if candidate.bytes is None else f"{candidate.bytes / 1e6:.1f}",
            "-" if peak is None else f"{peak / 1e6:.0f}",
            sqnr_text(fidelity),
        )
    console = stdout()
    console.print(table, highlight=False)
    inputs = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
    plural = "thread" if threads == 1 else "threads"
    console.print(
        f"{rows[0][1].rounds} interleaved rounds, {threads} {plural}, {inputs}", highlight=False
    )
