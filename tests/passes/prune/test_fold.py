"""A matrix folded into all reads of a group: exact where it makes up combinations of others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.nn import functional as F

from planish.ir.capture import capture
from planish.ir.errors import PassError
from planish.ir.execute import run
from planish.ir.ops import aten
from planish.ir.program import Program
from planish.ir.rewriter import Rewriter
from planish.ir.verify import verify
from planish.passes.prune.decompose import decompose
from planish.passes.prune.fold import Fold, columns_of, fold, problem
from planish.passes.prune.groups import Group, Place, Read
from tests.passes.rounding.nets import tensor


def _units(size: int, columns: int = 1) -> Tensor:
    return torch.arange(size).repeat_interleave(columns)


def _constant(program: Program, name: str) -> Node:
    return next(n for n in program.graph.find_nodes(op="get_attr") if n.target == name)


def _group(
    program: Program,
    size: int,
    written: tuple[str, ...],
    read: dict[str, tuple[int, int]],
    columns: int = 1,
) -> Group:
    """A group by the names of its constants; ``read`` gives axes of weight and of activation."""
    reads = []
    for name, (axis, value_axis) in read.items():
        node = _constant(program, name)
        for reader in node.users:
            value = reader.args[0]
            assert isinstance(value, Node)
            reads.append(
                Read(
                    reader,
                    Place(value, value_axis, _units(size, columns)),
                    Place(node, axis, _units(size, columns)),
                )
            )
    writers = [Place(_constant(program, name), 0, _units(size)) for name in written]
    places = (*writers, *{id(r.weight.node): r.weight for r in reads if r.weight}.values())
    first = next(iter(writers[0].node.users))
    return Group(f"test: {size} units", "other", size, places, tuple(reads), True, first)


def _rows(program: Program, x: Tensor, place: Place, size: int) -> Tensor:
    """The activations of a place, ``[n, units]``."""
    found: list[Tensor] = []

    def see(node: Node, value: Tensor) -> None:
        if node is place.node:
            columns = columns_of(place, size)
            assert columns is not None
            held = value.movedim(place.axis, -1)[..., columns]
            found.append(held.movedim(-2, -1).reshape(-1, size))

    run(program, (x,), observe=see)
    return found[0]


class Linears(nn.Module):
    """A hidden layer read twice: once as it is and once by a matrix product."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(5, 8), nn.Linear(8, 4)
        self.right = nn.Parameter(torch.randn(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.one(x))
        y: Tensor = self.two(h) + h @ self.right
        return y


class Convolutions(nn.Module):
    """Channels read by a padded 3 x 3 convolution, and flattened by a linear."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one = nn.Conv2d(3, 8, 3, padding=1)
        self.two = nn.Conv2d(8, 4, 3, padding=1, stride=2)
        self.three = nn.Linear(8 * 36, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.one(x))
        y: Tensor = self.two(h).mean((2, 3)) + self.three(h.flatten(1))
        return y


def _copies(module: nn.Module, layer: str = "one") -> None:
    """Units 5 to 7 become copies of 0 to 2, enlarged."""
    one = getattr(module, layer)
    with torch.no_grad():
        one.weight[5:] = 2 * one.weight[:3]
        one.bias[5:] = 2 * one.bias[:3]


def _linears() -> tuple[Program, Group, Tensor]:
    module = Linears().eval()
    _copies(module)
    x = torch.randn(40, 5)
    program = capture(module, (x,))
    return (
        program,
        _group(program, 8, ("one.weight", "one.bias"), {"two.weight": (1, 1), "right": (0, 1)}),
        x,
    )


def _convolutions() -> tuple[Program, Group, Tensor]:
    module = Convolutions().eval()
    _copies(module)
    x = torch.randn(6, 3, 6, 6)
    program = capture(module, (x,))
    group = _group(program, 8, ("one.weight", "one.bias"), {"two.weight": (1, 1)})
    flat = _group(program, 8, ("one.weight",), {"three.weight": (1, 1)}, columns=36)
    both = Group(
        group.name, group.kind, 8, (*group.constants, flat.constants[-1]),
        (*group.reads, *flat.reads), True, group.first,
    )  # fmt: skip
    return program, both, x


@pytest.mark.parametrize("make", [_linears, _convolutions])
def test_units_that_others_give_are_folded_away_exactly(
    make: Callable[[], tuple[Program, Group, Tensor]],
) -> None:
    program, group, x = make()
    (wanted,) = run(program, (x,))
    found = decompose(_rows(program, x, group.reads[0].value, 8), 5)
    assert sorted({k % 5 for k in found.kept.tolist()}) == [0, 1, 2, 3, 4]
    assert problem(program, group) is None
    rewriter = Rewriter(program, "test")
    ((after, kept),) = fold(rewriter, {group: Fold(found.kept, found.matrix)}).items()
    assert torch.equal(kept, found.kept)
    gone = torch.tensor(sorted(set(range(8)) - set(kept.tolist())))
    for read in after.reads:
        assert read.weight is not None
        columns = columns_of(read.weight, 8)
        weight = program.constant(read.weight.node)
        assert columns is not None
        assert weight is not None
        assert not weight.index_select(read.weight.axis, columns[gone].flatten()).any()
    verify(rewriter.finish())
    assert torch.allclose(run(program, (x,))[0], wanted, atol=2e-5)
    assert {c.rule for c in rewriter.changes} == {"fold-units"}
    assert len(rewriter.changes) == 2


def test_a_constant_goes_into_the_bias() -> None:
    torch.manual_seed(0)
    first = nn.Conv2d(2, 4, 1)
    module = nn.Sequential(first, nn.ReLU(), nn.Conv2d(4, 3, 3)).eval()
    with torch.no_grad():
        assert first.bias is not None
        first.weight[3], first.bias[3] = 0, 2.5
    x = torch.randn(8, 2, 5, 5)
    program = capture(module, (x,))
    (wanted,) = run(program, (x,))
    group = _group(program, 4, ("0.weight", "0.bias"), {"2.weight": (1, 1)})
    found = decompose(_rows(program, x, group.reads[0].value, 4), 3, constant=True)
    assert found.kept.tolist() == [0, 1, 2]
    assert problem(program, group, constant=True) is None
    rewriter = Rewriter(program, "test")
    fold(rewriter, {group: Fold(found.kept, found.matrix, found.constant)})
    verify(rewriter.finish())
    assert not tensor(program, "2.weight")[:, 3].any()
    assert torch.allclose(run(program, (x,))[0], wanted, atol=1e-5)


def test_a_diagonal_scales() -> None:
    program, group, _ = _linears()
    before = tensor(program, "two.weight").clone()
    kept = torch.tensor([1, 3])
    matrix = torch.zeros(2, 8)
    matrix[0, 1], matrix[1, 3] = 2, 3
    rewriter = Rewriter(program, "test")
    fold(rewriter, {group: Fold(kept, matrix)})
    rewriter.finish()
    assert torch.allclose(
        tensor(program, "two.weight")[:, [1, 3]], before[:, [1, 3]] * matrix[[0, 1], [1, 3]]
    )


def test_groups_in_a_chain_are_folded_together() -> None:
    """The middle weight is cut along both axes: by rows as what makes, by columns as what reads."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)).eval()
    x = torch.randn(20, 6)
    program = capture(module, (x,))
    (wanted,) = run(program, (x,))
    groups = [
        _group(program, 6, (f"{i}.weight", f"{i}.bias"), {f"{i + 1}.weight": (1, 1)})
        for i in (0, 1)
    ]
    folds = {g: Fold(torch.arange(6), torch.eye(6)) for g in groups}
    rewriter = Rewriter(program, "test")
    after = fold(rewriter, folds)
    for group in after:
        for place in group.constants:
            assert place.node in program.graph.nodes
    verify(rewriter.finish())
    assert torch.equal(run(program, (x,))[0], wanted)


def test_refusals_name_the_reader() -> None:
    program, group, _ = _linears()
    assert problem(program, group) is None
    assert "matmul" in (problem(program, group, constant=True) or "")
    read = group.reads[0]
    computed = Group(
        group.name, group.kind, 8, group.constants, (Read(read.reader, read.value, None),),
        True, group.first,
    )  # fmt: skip
    assert "no constant" in (problem(program, computed) or "")
    with pytest.raises(PassError, match="no constant"):
        fold(Rewriter(program, "test"), {computed: Fold(torch.arange(8), torch.eye(8))})
    alone = Group(group.name, group.kind, 8, group.constants, (), True, group.first)
    assert problem(program, alone) == "nothing reads its units"
    part = Group(group.name, group.kind, 8, group.constants, group.reads[1:], True, group.first)
    assert problem(program, part) is None
    program, group, _ = _convolutions()
    assert "pads with zeros" in (problem(program, group, constant=True) or "")


def test_a_weight_that_something_else_reads_is_refused() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.two(self.one(x)) + self.two.weight.sum()
            return y

    program = capture(Tied().eval(), (torch.randn(2, 4),))
    weight = _constant(program, "two.weight")
    linear = next(u for u in weight.users if u.target is aten.linear.default)
    value = linear.args[0]
    assert isinstance(value, Node)
    place = Place(weight, 1, _units(8))
    read = Read(linear, Place(value, 1, _units(8)), place)
    group = Group("test", "neurons", 8, (place,), (read,), True, value)
    assert "aten.sum reads the weight of aten.linear" in (problem(program, group) or "")


def test_columns_of_units() -> None:
    node = next(iter(_linears()[0].graph.nodes))
    uneven = Place(node, 0, torch.tensor([0, 0, 1]))
    assert columns_of(uneven, 2) is None
    assert columns_of(Place(node, 0, torch.tensor([1, -1, 0])), 3) is None
    found = columns_of(Place(node, 0, torch.tensor([1, -1, 0, 1, 0])), 2)
    assert found is not None
    assert found.tolist() == [[2, 4], [0, 3]]
