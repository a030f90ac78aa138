"""Gradients by masks of units: what a mask written into the model gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from planish.ir.capture import capture
from planish.ir.errors import RequirementError, UsageError
from planish.ir.program import Program
from planish.passes.base import PassContext
from planish.passes.prune.coupling import find_groups
from planish.passes.prune.groups import Group
from planish.passes.prune.mask_gradients import mask_gradients


class Net(nn.Module):
    """Attention of two heads, then a hidden layer that is read twice; masks may be given."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.out = (nn.Linear(6, 6) for _ in range(4))
        self.up, self.down, self.side = nn.Linear(6, 5), nn.Linear(5, 6), nn.Linear(5, 6)
        self.heads, self.neurons = torch.ones(2), torch.ones(5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).view(2, 4, 2, 3).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 4, 6)
        x = x + self.out(mixed * self.heads.repeat_interleave(3))
        h = F.gelu(self.up(x)) * self.neurons
        y: Tensor = x + self.down(h) + self.side(h)
        return y.mean(1)


def _loss(outputs: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(outputs, batch[1])


BATCHES = [
    (torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(i)), torch.tensor([i, i + 1]))
    for i in range(3)
]


class Plain(Net):
    """The same without masks, as it is captured."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).view(2, 4, 2, 3).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 4, 6)
        x = x + self.out(mixed)
        h = F.gelu(self.up(x))
        y: Tensor = x + self.down(h) + self.side(h)
        return y.mean(1)


def _program() -> tuple[Program, Group, Group]:
    program = capture(Plain().eval(), (BATCHES[0][0],))
    groups, _ = find_groups(program)
    heads = next(g for g in groups if g.kind == "heads")
    neurons = next(g for g in groups if g.kind == "neurons")
    return program, heads, neurons


def test_equal_to_masks_in_the_model() -> None:
    program, heads, neurons = _program()
    assert len(neurons.reads) == 2
    before = str(program)
    context = PassContext(labeled=BATCHES, loss=_loss)
    found = list(mask_gradients(program, [heads, neurons], context))
    assert str(program) == before
    assert len(found) == 3
    for batch, got in zip(BATCHES, found, strict=True):
        net = Net().eval()
        net.heads.requires_grad_()
        net.neurons.requires_grad_()
        want = torch.autograd.grad(_loss(net(batch[0]), batch), [net.heads, net.neurons])
        assert torch.allclose(got[heads], want[0].double(), atol=1e-7)
        assert torch.allclose(got[neurons], want[1].double(), atol=1e-7)
        assert got[heads].dtype == torch.float64


def test_groups_on_one_axis_do_not_disturb_each_other() -> None:
    program, heads, _ = _program()
    groups, _ = find_groups(program)
    context = PassContext(labeled=BATCHES[:1], loss=_loss)
    alone = next(iter(mask_gradients(program, [heads], context)))
    together = next(iter(mask_gradients(program, groups, context)))
    assert any(g.kind == "head-dims" for g in groups)
    assert torch.allclose(
        alone[heads], next(together[g] for g in groups if g.kind == "heads"), atol=1e-7
    )


def test_limit() -> None:
    program, heads, _ = _program()
    context = PassContext(labeled=BATCHES, loss=_loss)
    assert len(list(mask_gradients(program, [heads], context, limit=2))) == 2


def test_labels_are_asked_for() -> None:
    program, heads, _ = _program()
    with pytest.raises(RequirementError, match="gradients"):
        next(iter(mask_gradients(program, [heads], PassContext(loss=_loss))))


def test_a_gradient_that_is_not_finite_names_the_batch() -> None:
    program, heads, _ = _program()

    def bad(outputs: Tensor, batch: object) -> Tensor:
        # finite, with an infinite slope
        return (outputs - outputs.detach()).abs().sum().sqrt()

    with pytest.raises(UsageError, match="not finite") as caught:
        list(mask_gradients(program, [heads], PassContext(labeled=BATCHES, loss=bad)))
    assert "labeled batch 0" in str(caught.value.where)
