"""A program with something of everything, for the tests of files and translations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from planish.ir import Program, capture


class Net(nn.Module):
    """Tied weights, a buffer of each kind, an unused default, several kinds of result."""

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("shift", torch.arange(4.0))
        self.register_buffer("scale", torch.full((4,), 2.0), persistent=False)

    def forward(
        self, input: Tensor, n: int, mask: Tensor | None = None, *, extra: dict[str, Tensor]
    ) -> dict[str, Any]:
        """The unused mask is a default; `n` is compiled in."""
        y = self.norm(self.first(input)) * self.scale + self.shift
        left, right = y.relu().split(2, -1)
        return {
            "y": self.second(y),
            "nothing": None,
            "same": input,
            "pair": [right, left],
            "twice": right,
            "weight": self.shift,
            "batch": input.shape[0],
            "extra": extra["p"] * n,
            "word": n + 1,
        }


def net_inputs(size: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of batch ``size``."""
    return (torch.randn(size, 4), 5), {"extra": {"p": torch.randn(size, 2)}}


def net_program(size: int = 3) -> tuple[nn.Module, Program]:
    """The model and its program, traced with a dynamic batch."""
    torch.manual_seed(0)
    model = Net().eval()
    batch = Dim("batch")
    args, kwargs = net_inputs(size)
    shapes = {"input": {0: batch}, "n": None, "extra": {"p": {0: batch}}}
    return model, capture(model, args, kwargs, dynamic_shapes=shapes)


class Branch(nn.Module):
    """A branch that a traced graph can follow, with a constant in one arm."""

    one: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("one", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        """Two items of a split, taken in reverse, so that their order shows."""
        one = self.one

        def above(t: Tensor) -> Tensor:
            items = torch.split(t, [1, 2], 1)
            late = items[1].sum(1, keepdim=True)
            return t + one + late * items[0]

        result: Tensor = torch.cond(x.sum() > 0, above, lambda t: t * 2, (x,))
        return result


def branch_program() -> Program:
    """The branch, with a dynamic first dimension."""
    return capture(Branch().eval(), (torch.ones(4, 3),), dynamic_shapes=({0: Dim("n")},))


def assert_same(expected: Any, got: Any) -> None:
    """Same structure, close tensors, equal constants."""
    left, left_spec = pytree.tree_flatten(expected)
    right, right_spec = pytree.tree_flatten(got)
    assert left_spec == right_spec
    for a, b in zip(left, right, strict=True):
        if isinstance(a, Tensor):
            torch.testing.assert_close(a, b)
        else:
            assert a == b


def held(tensors: dict[str, Tensor]) -> Program:
    """A program that returns its constants."""
    _, program = net_program()
    program = program.clone()
    graph = program.graph
    nodes = []
    with graph.inserting_before(program.output):
        for name, tensor in tensors.items():
            program.constants[name] = tensor
            node = graph.create_node("get_attr", name)
            node.meta["val"] = program.fake_mode.from_tensor(tensor, static_shapes=True)
            nodes.append(node)
    program.output.args = (tuple(nodes),)
    graph.eliminate_dead_code()
    spec = pytree.tree_structure([0] * len(nodes))
    names = tuple(f"output_{i}" for i in range(len(nodes)))
    program.signature = type(program.signature)(
        **{**vars(program.signature), "out_spec": spec, "output_names": names}
    )
    program.drop_dead_constants()
    return program
