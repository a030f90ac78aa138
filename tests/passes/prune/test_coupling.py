"""Groups of small nets of each kind: what is found, and that a cut equals zeroes at all reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from planish.ir.capture import capture
from planish.ir.cost import cost
from planish.ir.execute import run
from planish.ir.program import Program
from planish.ir.verify import verify
from planish.passes.prune.coupling import find_groups
from planish.passes.prune.groups import Group
from planish.tools.bench.structure.masking import masked, share_kept, without

B, T = torch.export.Dim("b"), torch.export.Dim("t")


class Net(nn.Module):
    """Modules by name, and what to do with them."""

    def __init__(self, what: Callable[[Any, Tensor], Tensor], **parts: nn.Module):
        super().__init__()
        self.what = what
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.what(self, x)


def _program(module: nn.Module, x: Tensor, dynamic: object = None) -> Program:
    torch.manual_seed(1)
    for each in module.modules():
        if isinstance(each, nn.BatchNorm2d):
            assert each.running_mean is not None
            assert each.running_var is not None
            each.running_mean.normal_()
            each.running_var.uniform_(0.5, 1.5)
        if isinstance(each, (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)):
            nn.init.normal_(each.bias)
    return capture(module.eval(), (x,), dynamic_shapes=dynamic)


def _mlp() -> tuple[nn.Module, Tensor]:
    net = nn.Sequential(
        nn.Linear(6, 20), nn.GELU(), nn.Linear(20, 9), nn.Sigmoid(), nn.Linear(9, 4)
    )
    return net, torch.randn(3, 6)


def _conv() -> tuple[nn.Module, Tensor]:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU6(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3, groups=4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(12, 5),
    )
    return net, torch.randn(2, 3, 8, 8)


def _residual() -> tuple[nn.Module, Tensor]:
    def what(s: Any, x: Tensor) -> Tensor:
        x = F.relu(s.a(x))
        x = F.relu(x + s.c(F.relu(s.b(x))))
        return s.d(x.mean((2, 3)))

    parts = {"a": nn.Conv2d(3, 8, 1), "b": nn.Conv2d(8, 6, 3, padding=1), "d": nn.Linear(8, 3)}
    return Net(what, c=nn.Conv2d(6, 8, 1), **parts), torch.randn(2, 3, 6, 6)


def _flatten() -> tuple[nn.Module, Tensor]:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5))
    return net, torch.randn(2, 3, 6, 6)


def _dense() -> tuple[nn.Module, Tensor]:
    def what(s: Any, x: Tensor) -> Tensor:
        a = F.relu(s.a(x))
        b = F.relu(s.b(a))
        return s.c(F.relu(s.n(torch.cat([a, b, x], 1)))).mean((2, 3))

    parts = {"a": nn.Conv2d(3, 8, 1), "b": nn.Conv2d(8, 6, 3, padding=1)}
    net = Net(what, n=nn.BatchNorm2d(17), c=nn.Conv2d(17, 4, 1), **parts)
    return net, torch.randn(2, 3, 6, 6)


def _shuffle() -> tuple[nn.Module, Tensor]:
    def what(s: Any, x: Tensor) -> Tensor:
        x = s.a(x)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return s.b(F.relu(x)).mean((2, 3))

    net = Net(what, a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 4, 1))
    return net, torch.randn(2, 3, 5, 5)


def _pixels() -> tuple[nn.Module, Tensor]:
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.PixelShuffle(2), nn.ReLU(), nn.Conv2d(4, 2, 3))
    return net, torch.randn(2, 3, 6, 6)


def _squeeze() -> tuple[nn.Module, Tensor]:
    def what(s: Any, x: Tensor) -> Tensor:
        x = F.silu(s.a(x))
        x = x * torch.sigmoid(s.up(F.silu(s.down(x.mean((2, 3), keepdim=True)))))
        return s.b(x).mean((2, 3))

    parts = {"down": nn.Conv2d(8, 4, 1), "up": nn.Conv2d(4, 8, 1), "b": nn.Conv2d(8, 3, 1)}
    return Net(what, a=nn.Conv2d(3, 8, 3), **parts), torch.randn(2, 3, 6, 6)


def _group_norm() -> tuple[nn.Module, Tensor]:
    net = nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.GroupNorm(4, 12), nn.ReLU(), nn.ConvTranspose2d(12, 4, 3)
    )
    return net, torch.randn(2, 3, 6, 6)


def _glu() -> tuple[nn.Module, Tensor]:
    def what(s: Any, x: Tensor) -> Tensor:
        a, b = s.a(x).chunk(2, -1)
        return s.b(F.silu(a) * b)

    return Net(what, a=nn.Linear(6, 20), b=nn.Linear(10, 4)), torch.randn(3, 6)


def _swiglu() -> tuple[nn.Module, Tensor]:
    def what(s: Any, x: Tensor) -> Tensor:
        return s.d(F.silu(s.g(x)) * s.u(x))

    net = Net(what, g=nn.Linear(6, 11), u=nn.Linear(6, 11), d=nn.Linear(11, 4))
    return net, torch.randn(3, 6)


CASES = {
    "mlp": (_mlp, ["0: 20 neurons", "2: 9 neurons"]),
    "conv": (_conv, ["0: 2 channels", "7: 3 channels"]),
    "residual": (_residual, ["a: 8 channels", "b: 6 channels"]),
    "flatten": (_flatten, ["0: 8 channels"]),
    "dense": (_dense, ["a: 8 channels", "b: 6 channels"]),
    "shuffle": (_shuffle, None),
    "pixels": (_pixels, ["0: 4 channels"]),
    "squeeze": (_squeeze, ["a: 8 channels", "down: 4 channels"]),
    "group-norm": (_group_norm, ["0: 4 channels"]),
    "glu": (_glu, ["a: 10 neurons"]),
    "swiglu": (_swiglu, ["g: 11 neurons"]),
}


def check(program: Program, groups: list[Group], *inputs: tuple[Any, ...]) -> Program:
    """Cut all of some groups at once: equal to zeroes at their reads, on each of the inputs."""
    kept = {group: share_kept(group, 0.6, i) for i, group in enumerate(groups)}
    cut, zeroed = without(program, kept), masked(program, kept)
    verify(cut, since=program)
    for each in inputs:
        for mine, wanted, was in zip(
            run(cut, each), run(zeroed, each), run(program, each), strict=True
        ):
            assert mine.shape == was.shape
            assert torch.allclose(mine, wanted, atol=1e-5, rtol=1e-5)
            assert not torch.allclose(mine, was, atol=1e-4)  # something did change
    return cut


@pytest.mark.parametrize("name", CASES)
def test_a_cut_equals_zeroes_at_all_reads(name: str) -> None:
    make, wanted = CASES[name]
    torch.manual_seed(0)
    module, x = make()
    program = _program(module, x)
    groups, _ = find_groups(program)
    if wanted is not None:
        assert [group.name for group in groups] == wanted
    assert groups
    for group in groups:
        assert group.exact
        assert group.reads
        cut = check(program, [group], (x,))
        assert cost(cut).parameters < cost(program).parameters
    check(program, groups, (x,))
