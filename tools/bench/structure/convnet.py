"""Half the work of a convolutional net, untrained after: how many decisions stay as they were.

    python -m planish.tools.bench.structure.convnet [--data DIR] [--images 12000] [--json]

A net of five convolutions and two linears is trained here on Fashion-MNIST (60,000 real pictures
of clothes), cut to half its multiply-accumulates by every method, and held against itself on the
10,000 pictures of the test set: the share of equal decisions, and accuracies; one standard error
of a share is at most 0.5 points. Nothing is trained after a cut. The data comes with Debian:

    apt-get download dataset-fashion-mnist && dpkg-deb -x dataset-fashion-mnist_*.deb DIR
"""

from __future__ import annotations

import gzip
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F

from planish.ir.capture import capture
from planish.ir.cost import cost
from planish.ir.errors import RequirementError
from planish.ir.execute import run
from planish.ir.program import Program
from planish.passes.base import PassContext
from planish.passes.calibrate import spool
from planish.passes.pipeline import run_pipeline
from planish.passes.recipe import Recipe
from planish.tools.bench.fetch import models_dir

MEAN, DEVIATION = 0.2860, 0.3530  # of all training pixels
WANTED = 5.0  # points
METHODS: Mapping[str, str] = {
    "magnitude, every layer alike": "prune{keep=KEEP}",
    "magnitude, all together": "prune{rule=macs, ratio=RATIO}",
    "taylor, all together": "prune{score=taylor, rule=macs, ratio=RATIO}",
    "fisher, all together": "prune{score=fisher, rule=macs, ratio=RATIO}",
    "ID, every layer alike": "interpolate{keep=KEEP}",
    "ID, iterated": "interpolate{mode=iterated, macs=RATIO}",
}

Pictures = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Row:
    """What one method gave: shares from 0 to 1, on the pictures of the test set."""

    macs: float
    agreement: float
    accuracy: float
    seconds: float


def load(folder: Path, part: str) -> Pictures:
    """Pictures f32 ``[n, 1, 28, 28]`` and labels; ``part`` is "train" or "t10k".

    Raises:
        RequirementError: the files are not below that folder.
    """
    read = []
    for kind, offset in (("images-idx3", 16), ("labels-idx1", 8)):
        found = sorted(folder.rglob(f"{part}-{kind}-ubyte.gz"))
        if not found:
            raise RequirementError(
                f"there is no {part}-{kind}-ubyte.gz below {folder}",
                hint="apt-get download dataset-fashion-mnist && dpkg-deb -x "
                "dataset-fashion-mnist_*.deb DIR, then --data DIR",
            )
        with gzip.open(found[0]) as file:
            read.append(torch.frombuffer(bytearray(file.read()[offset:]), dtype=torch.uint8))
    pixels = read[0].reshape(-1, 1, 28, 28).float() / 255
    return (pixels - MEAN) / DEVIATION, read[1].long()


def net(width: int = 16) -> nn.Sequential:
    """Five 3 x 3 convolutions with batch norms, and two linears: 11.1M multiply-accumulates."""

    def block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]

    sizes = [(1, width, 1), (width, 2 * width, 2), (2 * width, 2 * width, 1)]
    sizes += [(2 * width, 4 * width, 2), (4 * width, 4 * width, 1)]
    body = [layer for size in sizes for layer in block(*size)]
    head = [nn.Linear(4 * width * 9, 64), nn.ReLU(), nn.Linear(64, 10)]
    return nn.Sequential(*body, nn.MaxPool2d(2), nn.Flatten(), *head)


def train(model: nn.Module, data: Pictures, epochs: int) -> nn.Module:
    """Train in place by AdamW, the rate falling to 0."""
    pixels, labels = data
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.02)
    steps = epochs * (len(pixels) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(pixels)).split(64)[: len(pixels) // 64]:
            optimizer.zero_grad()
            F.cross_entropy(model(pixels[chosen]), labels[chosen]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def decisions(program: Program, pixels: Tensor) -> Tensor:
    """The class each picture gets."""
    return torch.cat([run(program, (part,))[0].argmax(1) for part in pixels.split(500)])


def loss(outputs: Tensor, batch: Pictures) -> Tensor:
    """Cross-entropy."""
    return F.cross_entropy(outputs, batch[1])


def measure(
    folder: Path, images: int, epochs: int, calibration: int, ratio: float, seed: int
) -> dict[str, Row]:
    """Train a net and cut it by every method; the net itself is under "trained"."""
    torch.manual_seed(seed)
    pixels, labels = load(folder, "train")
    seen = pixels[:images], labels[:images]
    held = load(folder, "t10k")
    _say(f"training on {images} pictures, {epochs} epochs")
    model = train(net(), seen, epochs)
    whole = capture(model, (pixels[:2],), dynamic_shapes=({0: Dim("batch", max=5000)},))
    whole = run_pipeline(whole, Recipe.parse("fold-batch-norm"), PassContext()).program
    before, macs = decisions(whole, held[0]), cost(whole).macs
    rows = {"trained": Row(1.0, 1.0, float((before == held[1]).double().mean()), 0.0)}
    inputs = list(seen[0][:calibration].split(100))
    labeled = [(x[None], y[None]) for x, y in zip(*(s[:calibration] for s in seen), strict=True)]
    for name, text in METHODS.items():
        _say(f"{name}: {text}")
        # Work goes with the square of the width, but for the first and the last layer.
        filled = text.replace("KEEP", f"{ratio**0.5:.4f}").replace("RATIO", f"{ratio:g}")
        context = PassContext(
            calibration=spool(inputs, whole), labeled=labeled, loss=loss, remark=_say
        )
        start = time.monotonic()
        cut = run_pipeline(whole, Recipe.parse(filled), context).program
        seconds = time.monotonic() - start
        after = decisions(cut, held[0])
        rows[name] = Row(
            cost(cut).macs / macs,
            float((after == before).double().mean()),
            float((after == held[1]).double().mean()),
            seconds,
        )
    return rows


def gain(rows: Mapping[str, Row]) -> float:
    """Points of agreement between the worst of ID and the best of magnitude."""
    magnitude = max(r.agreement for name, r in rows.items() if name.startswith("magnitude"))
    return 100 * (min(r.agreement for n, r in rows.items() if n.startswith("ID")) - magnitude)


def _say(line: str) -> None:
    print(line, file=sys.stderr)


@click.command()
@click.option(
    "--data",
    type=click.Path(path_type=Path, file_okay=False),
    default=None,
    help="Folder that the Debian package was unpacked to.",
)
@click.option("--images", default=12000, show_default=True, help="Pictures trained on.")
@click.option("--epochs", default=3, show_default=True, help="Times each is trained on.")
@click.option("--calibration", default=500, show_default=True, help="Pictures the cuts read.")
@click.option("--ratio", default=0.5, show_default=True, help="Share of the work that stays.")
@click.option("--seed", default=0, show_default=True, help="Of the training.")
@click.option("--json", "as_json", is_flag=True, help="Strict JSON on stdout.")
def main(
    data: Path | None,
    images: int,
    epochs: int,
    calibration: int,
    ratio: float,
    seed: int,
    as_json: bool,
) -> None:
    """Print agreement and accuracy of every method at about the same work."""
    torch.set_num_threads(1)
    folder = data or models_dir() / "fashion-mnist"
    rows = measure(folder, images, epochs, calibration, ratio, seed)
    if as_json:
        print(json.dumps({name: asdict(row) for name, row in rows.items()}, allow_nan=False))
        return
    print(f"{'':30}{'MACs':>8}{'agreement':>12}{'accuracy':>10}{'seconds':>9}")
    for name, row in rows.items():
        shares = f"{100 * row.macs:7.1f}%{100 * row.agreement:11.2f}%{100 * row.accuracy:9.2f}%"
        print(f"{name:30}{shares}{row.seconds:9.1f}")
    print(f"ID beats magnitude by {gain(rows):.2f} points of agreement; at least {WANTED} wanted")


if __name__ == "__main__":
    main()
