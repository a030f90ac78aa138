"""Weights of 8 and 4 bits: perplexity, size and speed of language models.

    python -m planish.tools.bench.quantization.weight_only [--model small-lm|smollm2|gpt2]

small-lm  is trained here from scratch (``--train`` steps; 5000 take a few minutes of one core),
          then rounded by every method; its perplexity is that of the next byte.
smollm2   SmolLM2-135M beside the plain float export: speed with 1 and 64 tokens, file size, and
          perplexity of the file itself on windows of 512 tokens of text that no pass was
          calibrated with. Its linear weights already lie on a 4-bit grid (Q4_1, groups of 32, with
          real offsets that integer zero points do not hit), so its figures flatter.
gpt2      GPT-2's small shape with random weights: speed only.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F

import planish
from planish.tools.bench.quantization.small_lm import LENGTH, text, train, windows

# name -> recipe
SMALL: dict[str, str] = {
    f"{bits} {name}": recipe.format(bits=bits)
    for bits in ("int8", "uint4")
    for name, recipe in {
        "nearest": "exact,round-weights{{dtype={bits}}}",
        "hqq": "exact,hqq{{dtype={bits}}}",
        "gptq": "exact,gptq{{dtype={bits}}}",
        "awq": "exact,awq{{dtype={bits}}}",
        "awq, gptq": "exact,awq{{dtype={bits},rounding=gptq}}",
    }.items()
} | {"int8-weight": "int8-weight", "int4-weight": "int4-weight"}
SMOLLM2: dict[str, str] = {
    "int8-weight": "int8-weight",
    "int4 nearest": "exact,round-weights{dtype=uint4}",
    "int4-weight": "int4-weight",
}
GPT2: dict[str, str] = {
    "int8-weight": "int8-weight",
    "int4-weight": "int4-weight",
    "int4 blocks of 128": "exact,round-weights{dtype=uint4,block_size=128}",
}
# (model, form) -> what its figures should be
GOALS: dict[tuple[str, str], str] = {
    ("smollm2", "int8-weight"): "perplexity within 2 % of float",
    ("smollm2", "int4-weight"): (
        "1 token at least 3.0x, 64 tokens at least 1.0x, size at most 0.2, perplexity within 8 %"
    ),
}
FLATTERS = (
    "SmolLM2's linear weights already lie on a 4-bit grid (Q4_1, groups of 32), so these figures "
    "flatter; small-lm's weights lie on none."
)


def perplexity(logits: Callable[[Tensor], Tensor], batches: Iterable[Tensor]) -> float:
    """Exp of the mean negative log likelihood of each token but the first, ``[B, T]`` each."""
    total, count = 0.0, 0
    for ids in batches:
        found, wanted = logits(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
        total += float(F.cross_entropy(found, wanted, reduction="sum"))
        count += len(wanted)
    return math.exp(total / count)


def small_lm(steps: int) -> list[dict[str, Any]]:
    """Perplexity per byte of the model trained here, float and by every method."""
    model = train(steps, lambda step, loss: click.echo(f"step {step}: loss {loss:.3f}", err=True))
    learned, held = text()
    sample = windows(learned, 2, 10_000)[:, :-1]
    calibration = [windows(learned, 8, 20_000 + i)[:, :-1] for i in range(8)]
    test = held[: len(held) // LENGTH * LENGTH].view(-1, LENGTH).split(16)
    shapes = {"ids": {0: Dim("batch", max=64)}}
    rows: list[dict[str, Any]] = []
    for name, recipe in {"float": "exact", **SMALL}.items():
        result = planish.optimize(
            model, (sample,), recipe=recipe, dynamic_shapes=shapes, verify="off",
            calibration=calibration if _reads_data(recipe) else None,
        )  # fmt: skip
        with torch.no_grad():
            found = perplexity(result.model, test)
        rows.append({"model": f"small-lm, {steps} steps", "form": name, "perplexity": found})
    return rows


def smollm2(windows_: int, calibrated: int, rounds: float) -> list[dict[str, Any]]:
    """Perplexity, size and speed of SmolLM2's files."""
    from planish.tools.bench.fetch import locate
    from planish.tools.bench.real_inputs import smollm2_tokenizer
    from planish.tools.bench.real_models import real_model

    description = real_model("smollm2-135m")
    path = locate("gensim", "gensim/test/test_data/lee_background.cor")
    ids = torch.tensor(smollm2_tokenizer()(path.read_text(encoding="utf-8"))["input_ids"])
    cut = ids[: len(ids) // 512 * 512].view(-1, 1, 512)
    return _files(
        description.load(), description.inputs(*description.sizes[0])[0],
        description.dynamic_shapes, SMOLLM2, list(cut[windows_ + 20 :][:calibrated]),
        list(cut[:windows_]), [cut[0][:, :1], cut[0][:, :64]], rounds,
    )  # fmt: skip


def gpt2(rounds: float) -> list[dict[str, Any]]:
    """Speed of GPT-2's small shape with random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from planish.tools.bench.real_nets import CausalLM

    torch.manual_seed(0)
    model = CausalLM(GPT2LMHeadModel(GPT2Config())).eval()
    ids = torch.randint(0, 50257, (2, 64))
    shapes = {"ids": {0: Dim("batch", max=64), 1: Dim("sequence", min=1, max=1024)}}
    return _files(model, (ids,), shapes, GPT2, [], [], [ids[:1, :1], ids[:1]], rounds)


def _files(
    model: nn.Module,
    args: tuple[Any, ...],
    shapes: Any,  # noqa: ANN401 - as torch.export takes them
    recipes: dict[str, str],
    calibration: Sequence[Tensor],
    test: Sequence[Tensor],
    timed: Sequence[Tensor],
    seconds: float,
) -> list[dict[str, Any]]:
    """Write every form, then race all of them against the plain float export."""
    from planish.backends.ort_race import race
    from planish.tools.bench.export_cost import export_plain

    with tempfile.TemporaryDirectory(prefix="planish-") as folder:
        paths = {"plain float export": Path(folder) / "plain.onnx"}
        export_plain(model, args, {}, shapes, str(paths["plain float export"]))
        for name, recipe in {"float": "exact", **recipes}.items():
            result = planish.optimize(
                model, args, recipe=recipe, target="onnxruntime-cpu",
                dynamic_shapes=shapes, verify="off",
                calibration=calibration if calibration and _reads_data(recipe) else None,
            )  # fmt: skip
            paths[name] = Path(folder) / f"{len(paths)}.onnx"
            result.export(paths[name], verify=False)
        base = paths["plain float export"]
        rows = [
            {"form": name, "MB": _size(path) / 1e6, "size": _size(path) / _size(base)}
            for name, path in paths.items()
        ]
        for row, path in zip(rows, paths.values(), strict=True):
            if test:
                row["perplexity"] = perplexity(_logits(path), test)
        for ids in timed:
            for row, speed in zip(
                rows, race(list(paths.values()), [ids], seconds=seconds), strict=True
            ):
                tokens = f"{ids.shape[1]} tokens"
                row |= {f"{tokens}, ms": speed.best_ms, f"{tokens}, x": speed.ratio,
                        f"{tokens}, median x": speed.median_ratio}  # fmt: skip
        return rows


def _reads_data(recipe: str) -> bool:
    """Whether calibration makes a difference to a recipe."""
    return recipe == "int4-weight" or "gptq" in recipe or "awq" in recipe


def _logits(path: Path) -> Callable[[Tensor], Tensor]:
    """A file as a function of token ids."""
    from planish.backends.ort_run import Session

    session = Session(path, threads=1)
    return lambda ids: torch.from_numpy(session.run([ids])[0])


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))


def _shown(model: str, rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    for row in rows:
        if "perplexity" in row:
            row["change"] = f"{100 * (row['perplexity'] / rows[0]['perplexity'] - 1):+.2f}%"
    table = Table(*dict.fromkeys(key for row in rows for key in row))
    for row in rows:
        cells = [row.get(str(column.header), "") for column in table.columns]
        table.add_row(*[f"{c:.4g}" if isinstance(c, float) else str(c) for c in cells])
    console = Console(width=160)
    console.print(table)
    for (of, form), goal in GOALS.items():
        if of == model:
            console.print(f"Goal of {form}: {goal}.")
    if model == "smollm2":
        console.print(FLATTERS)


@click.command(help=__doc__)
@click.option("--model", type=click.Choice(["small-lm", "smollm2", "gpt2"]), default="small-lm")
@click.option("--train", "steps", default=5000, help="Training steps of small-lm.")
@click.option("--windows", "windows_", default=8, help="Windows of 512 tokens for perplexity.")
@click.option("--calibrate", default=12, help="Windows for calibration.")
@click.option("--race", "rounds", default=30.0, help="Seconds of racing for each input.")
@click.option("--threads", default=1, help="Threads of torch; files always run on one.")
@click.option("--json", "as_json", is_flag=True, help="Rows as JSON.")
def main(
    model: str, steps: int, windows_: int, calibrate: int, rounds: float, threads: int,
    as_json: bool,
) -> None:  # fmt: skip
    """Measure one model and print its table."""
    torch.set_num_threads(threads)
    if model == "small-lm":
        rows = small_lm(steps)
    elif model == "smollm2":
        rows = smollm2(windows_, calibrate, rounds)
    else:
        rows = gpt2(rounds)
    if as_json:
        click.echo(json.dumps(rows, indent=1))
    else:
        _shown(model, rows)


if __name__ == "__main__":
    main()
