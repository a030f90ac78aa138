"""How the time of the exact passes grows with the graph, without verification.

    python -m planish.tools.bench.scaling [--kind mlp|conv|attention] [--sizes 1000,2000,...]

A block is captured once, with a dynamic batch, and repeated until the graph has as many nodes as
asked for; every copy has weights of its own. The best CPU time of the rounds is shown (one thread
computes, so it is the wall time of an idle machine), with the exponent of the growth since the size
before (1 is linear), and where the time went at the largest size. The number of function calls per
node does not depend on the machine: where it stays the same, the passes are linear.
"""

from __future__ import annotations

import cProfile
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass

import click
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import Graph, Node

from planish.ir.capture import capture
from planish.ir.program import Constant, Program
from planish.passes.pipeline import Run, run_pipeline
from planish.passes.recipe import Recipe, resolve


class MlpBlock(nn.Module):
    """A residual block with what the passes look for: scale, dropout, casts, two linears."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.drop = nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        """[B, width] to [B, width]."""
        hidden = torch.relu(self.up(self.norm(x))).contiguous()
        found: Tensor = x + self.drop(self.down(hidden)) * 0.5
        return found


class ConvBlock(nn.Module):
    """A residual block of convolutions and batch norms."""

    def __init__(self, width: int = 4):
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(width), nn.BatchNorm2d(width)])

    def forward(self, x: Tensor) -> Tensor:
        """[B, width, 8, 8] to the same."""
        hidden = torch.relu(self.norms[0](self.first(x)))
        return torch.relu(self.norms[1](self.second(hidden)) + x)


class AttentionBlock(nn.Module):
    """Attention and its norm written out by hand: the recovering passes have all to do."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """[B, 4, width] to the same."""
        scores = self.query(x) @ self.key(x).transpose(1, 2) / 8**0.5
        y = x + scores.softmax(-1) @ self.value(x)
        found: Tensor = self.gain * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6))
        return found


KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (MlpBlock, (3, 8)),
    "conv": (ConvBlock, (3, 4, 8, 8)),
    "attention": (AttentionBlock, (3, 4, 8)),
}


def build(kind: str, nodes: int) -> Program:
    """A program of about this many nodes (inputs, constants and operators).

    Args:
        kind: one of ``KINDS``.
        nodes: how many; rounded up to whole blocks.
    """
    torch.manual_seed(0)
    block, shape = KINDS[kind]
    shapes = {"x": {0: Dim("batch")}}
    captured = capture(block().eval(), (torch.randn(shape),), dynamic_shapes=shapes)
    body = [n for n in captured.nodes if n.op in ("get_attr", "call_function")]
    return _repeated(captured, math.ceil(nodes / len(body)))


def _repeated(block: Program, times: int) -> Program:
    """The block applied to its own output, each time with other weights."""
    graph, constants = Graph(), dict[str, Constant]()
    mapping: dict[Node, Node] = {}
    value = graph.node_copy(block.placeholders[0])
    for number in range(times):
        mapping[block.placeholders[0]] = value
        for node in block.nodes:
            if node.op == "get_attr":
                tensor = block.constant(node)
                assert tensor is not None
                copied = graph.node_copy(node)
                copied.target = f"block{number}.{node.target}"
                constants[copied.target] = tensor + 0.01 * torch.rand(tensor.shape)
                mapping[node] = copied
            elif node.op == "call_function":
                mapping[node] = graph.node_copy(node, lambda n: mapping[n])
        (result,) = block.results
        value = mapping[result]
    graph.output((value,))
    graph.output_node().meta = dict(block.output.meta)
    return Program(graph, constants, block.signature, block.samples)


@dataclass(frozen=True)
class Point:
    """One size of the curve."""

    kind: str
    nodes: int
    seconds: float
    changes: int
    nodes_after: int
    exponent: float | None  # of the growth since the size before
    calls: int  # Python and C calls, which no load on the machine disturbs
    parts: dict[str, float]  # wall seconds by pass, and of what is around them


def measure(kind: str, nodes: int, recipe: Recipe, rounds: int, before: Point | None) -> Point:
    """Time a recipe on one graph; the best of the rounds."""
    program = build(kind, nodes)
    best: tuple[float, Run] | None = None
    for _ in range(rounds):
        start = time.process_time()
        run = run_pipeline(program, recipe)
        seconds = time.process_time() - start
        if best is None or seconds < best[0]:
            best = (seconds, run)
    assert best is not None
    seconds, run = best
    passes: defaultdict[str, float] = defaultdict(float)
    for record in run.records:
        passes[record.name] += record.seconds
    count = len(program.graph.nodes)
    exponent = None
    if before is not None:
        exponent = math.log(seconds / before.seconds) / math.log(count / before.nodes)
    changes = sum(len(record.changes) for record in run.records)
    after = len(run.program.graph.nodes)
    passes["(clones and comparisons)"] = run.seconds - sum(passes.values())
    calls = count_calls(program, recipe)
    return Point(kind, count, seconds, changes, after, exponent, calls, dict(passes))


def count_calls(program: Program, recipe: Recipe) -> int:
    """How many functions are called while a recipe runs: the same number every time."""
    profile = cProfile.Profile()
    profile.runcall(run_pipeline, program, recipe)
    return int(sum(entry.callcount for entry in profile.getstats()))


def table(points: list[Point]) -> str:
    """The curve as text."""
    lines = [
        f"{'kind':<10}{'nodes':>8}{'after':>8}{'changes':>9}{'ms':>10}{'us/node':>9}{'exponent':>10}"
        f"{'calls/node':>12}"
    ]
    for p in points:
        exponent = "" if p.exponent is None else f"{p.exponent:.2f}"
        per_node = 1e6 * p.seconds / p.nodes
        lines.append(
            f"{p.kind:<10}{p.nodes:>8}{p.nodes_after:>8}{p.changes:>9}{1e3 * p.seconds:>10.1f}"
            f"{per_node:>9.1f}{exponent:>10}{p.calls / p.nodes:>12.1f}"
        )
    last = points[-1]
    lines.append(f"at {last.nodes} nodes, by wall time:")
    longest = sorted(last.parts.items(), key=lambda item: -item[1])[:10]
    lines += [f"  {name:<36}{1e3 * seconds:>10.1f} ms" for name, seconds in longest]
    return "\n".join(lines)


@click.command()
@click.option("--kind", type=click.Choice([*KINDS, "all"]), default="all", show_default=True)
@click.option("--sizes", default="1000,2000,4000,8000,16000", show_default=True)
@click.option("--recipe", default="exact", show_default=True)
@click.option("--rounds", default=3, show_default=True, help="The best of so many.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(kind: str, sizes: str, recipe: str, rounds: int, as_json: bool) -> None:
    """Show how the time of a recipe grows with the number of nodes."""
    torch.set_num_threads(1)
    resolved = resolve(recipe)
    measure("mlp", 100, resolved, 1, None)  # imports and caches are paid here
    found: list[Point] = []
    for name in KINDS if kind == "all" else (kind,):
        curve: list[Point] = []
        for nodes in map(int, sizes.split(",")):
            curve.append(measure(name, nodes, resolved, rounds, curve[-1] if curve else None))
        found += curve
        if not as_json:
            click.echo(table(curve) + "\n")
    if as_json:
        click.echo(json.dumps([asdict(point) for point in found], indent=2))


if __name__ == "__main__":
    main()
