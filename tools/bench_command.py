"""``planish bench``: time artifacts against each other on the runtime that will serve them."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial

import click
import torch

from planish.tools.compare import parse_sizes, size_option
from planish.tools.console import print_json, stages, stdout
from planish.tools.options import common


@click.command()
@click.argument("artifacts", nargs=-1, required=True, metavar="A [B]...")
@size_option
@click.option("--threads", default=1, show_default=True, help="Threads within an operator.")
@click.option("--rounds", default=40, show_default=True, help="Timed rounds; all run in each.")
@common
def bench(
    artifacts: tuple[str, ...],
    sizes: tuple[str, ...],
    threads: int,
    rounds: int,
    seed: int,
    as_json: bool,
    quiet: bool,
) -> None:
    """Time A, B, ... in alternation on the same inputs; ratios are against A.

    A ratio is the median over rounds of A's latency divided by the other's: above 1 is faster
    than A. The quartiles say how noisy the machine was. Each is an .onnx file, a TorchScript .pt
    file or a MODEL.

    \b
    Examples:
      planish bench plain.onnx minilm.onnx --size batch=1 --size sequence=128
      planish bench ./minilm minilm.pt minilm.onnx
      planish bench a.onnx b.onnx --threads 2 --rounds 100 --json
    """
    from planish.ir.compare import measure
    from planish.tools.candidates import make_inputs, open_candidate, paired
    from planish.tools.timing import interleave

    with stages(quiet=quiet) as stage:
        stage("opening")
        torch.set_num_threads(threads)
        candidates = [open_candidate(spec, threads=threads) for spec in artifacts]
        inputs = make_inputs(candidates, parse_sizes(sizes), seed=seed)
        outputs = [candidate.run(inputs) for candidate in candidates]
        timings = interleave(
            [partial(candidate.run, inputs) for candidate in candidates],
            rounds=rounds,
            on_round=lambda done: stage("timing", done, rounds),
        )
    rows = []
    for candidate, timing, values in zip(candidates, timings, outputs, strict=True):
        pairs = [(a, b) for _, a, b in paired(outputs[0], values) if a.shape == b.shape]
        fidelity = measure(
            tuple(torch.from_numpy(a) for a, _ in pairs),
            tuple(torch.from_numpy(b) for _, b in pairs),
        )
        rows.append((candidate, timing, fidelity if pairs else None))
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
                        "fidelity": fidelity.to_dict() if fidelity else None,
                    }
                    for candidate, timing, fidelity in rows
                ],
            }
        )
        return
    _print(rows, threads, {name: tuple(value.shape) for name, value in inputs.items()})


def _print(rows: list, threads: int, shapes: dict[str, tuple[int, ...]]) -> None:  # type: ignore[type-arg]
    from rich import box
    from rich.table import Table

    from planish.report import sqnr_text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("artifact", overflow="fold")
    for title in ("median ms", "speed vs first", "quartiles", "load ms", "MB", "SQNR dB"):
        table.add_column(title, justify="right")
    for candidate, timing, fidelity in rows:
        table.add_row(
            candidate.name,
            f"{timing.median_ms:.2f}",
            f"{timing.ratio:.2f}x",
            f"{timing.low:.2f}-{timing.high:.2f}",
            f"{candidate.load_ms:.0f}",
            "-" if candidate.bytes is None else f"{candidate.bytes / 1e6:.1f}",
            sqnr_text(fidelity),
        )
    console = stdout()
    console.print(table, highlight=False)
    inputs = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
    plural = "thread" if threads == 1 else "threads"
    console.print(
        f"{rows[0][1].rounds} interleaved rounds, {threads} {plural}, {inputs}", highlight=False
    )
