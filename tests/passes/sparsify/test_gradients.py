"""Gradients of a labeled loss by constants of a program: autograd's own, and what is refused."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from planish.ir.capture import capture
from planish.ir.errors import RequirementError, UsageError
from planish.passes.base import Fact, PassContext
from planish.passes.sparsify.gradients import count_batches, gradients, inputs_of

torch.manual_seed(0)
DATA = [(torch.randn(4, 6), torch.randint(0, 3, (4,))) for _ in range(5)]


class Net(nn.Module):
    """Two linears that share a weight, and one more."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.one, self.two, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.out(F.relu(self.two(F.relu(self.one(x)))))}


def loss(outputs: dict[str, Tensor], batch: Any) -> Tensor:
    return F.cross_entropy(outputs["logits"], batch[1])


MODEL = Net().eval()
PROGRAM = capture(MODEL, (DATA[0][0],))
# A weight of two names is one constant, under one of them.
(SHARED,) = {"one.weight", "two.weight"} & set(PROGRAM.constants)
NAMES = [SHARED, "out.weight"]


def context(
    labeled: Iterable[Any] | None = DATA, loss: Callable[[Any, Any], Any] | None = loss
) -> PassContext:
    return PassContext(labeled=labeled, loss=loss)


def test_they_equal_those_of_the_module_also_of_a_shared_weight() -> None:
    found = list(gradients(PROGRAM, NAMES, context()))
    assert len(found) == len(DATA)
    parameters = [MODEL.one.weight, MODEL.out.weight]
    for batch, by_name in zip(DATA, found, strict=True):
        known = torch.autograd.grad(loss(MODEL(batch[0]), batch), parameters)
        for name, gradient in zip(NAMES, known, strict=True):
            torch.testing.assert_close(by_name[name], gradient, rtol=1e-5, atol=1e-7)


def test_they_are_the_same_again_and_the_limit_holds() -> None:
    first, again = (list(gradients(PROGRAM, NAMES, context(), limit=2)) for _ in range(2))
    assert len(first) == 2
    assert all(torch.equal(a[n], b[n]) for a, b in zip(first, again, strict=True) for n in NAMES)


def test_other_weights_can_be_put_in_place() -> None:
    out = PROGRAM.constants["out.weight"]
    assert isinstance(out, Tensor)
    halved = {"out.weight": out / 2}
    (found,) = gradients(PROGRAM, [SHARED], context(DATA[:1]), constants=halved)
    model = Net().eval()
    with torch.no_grad():
        model.out.weight /= 2
    (known,) = torch.autograd.grad(loss(model(DATA[0][0]), DATA[0]), [model.one.weight])
    torch.testing.assert_close(found[SHARED], known, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("made", "named"),
    [
        (context(None, None), (Fact.LABELS, Fact.LOSS)),
        (context(None), (Fact.LABELS,)),
        (context(DATA, None), (Fact.LOSS,)),
    ],
)
def test_labels_and_loss_are_both_asked_for(made: PassContext, named: tuple[Fact, ...]) -> None:
    for read in (lambda: next(gradients(PROGRAM, NAMES, made)), lambda: count_batches(made)):
        with pytest.raises(RequirementError) as caught:
            read()
        assert caught.value.hint == "; ".join(fact.value for fact in named)


def test_a_gradient_that_is_not_finite_names_weight_and_batch() -> None:
    def cliff(outputs: dict[str, Tensor], batch: Any) -> Tensor:
        logits = outputs["logits"]
        number = float(batch is DATA[1])
        # sqrt at 0: the loss is finite, its gradient is not
        return ((logits - logits.detach()).square() * number).sum().sqrt() + logits.sum()

    found = gradients(PROGRAM, NAMES, context(DATA, cliff))
    with pytest.raises(UsageError, match=f"gradient of {SHARED} is not finite") as caught:
        list(found)
    assert "labeled batch" in str(caught.value.where)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda o, b: o["logits"], r"a Tensor of shape \[4, 3\], not a scalar"),
        (lambda o, b: 1.0, "a float, not a scalar"),
        (lambda o, b: o["logits"].sum().detach(), "does not depend on the weights"),
        (lambda o, b: o["logits"].sum() * torch.nan, "the loss is nan"),
    ],
)
def test_a_loss_that_is_none_is_refused(bad: Callable[..., Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        list(gradients(PROGRAM, NAMES, context(DATA, bad)))
    assert "labeled batch 0" in str(caught.value.where)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.zeros(4, 6), "a Tensor is no labeled batch"),
        (((DATA[0][0], DATA[0][0]), DATA[0][1]), "2 positional inputs"),
        ({"y": DATA[0][1]}, "missing input 'x'"),
        ((torch.zeros(4, 5), DATA[0][1]), "x"),
        ((torch.zeros(4, 6).long(), DATA[0][1]), "input 'x' is i64; the model takes f32"),
        (("words", DATA[0][1]), "input 'x' is a str, not a tensor"),
    ],
)
def test_a_batch_that_does_not_fit_is_named(batch: object, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        list(gradients(PROGRAM, NAMES, context([DATA[0], batch])))
    assert "labeled batch 1" in str(caught.value.where)


def test_a_batch_is_a_pair_or_a_dict() -> None:
    x, y = DATA[0]
    for batch in ((x, y), ((x,), y), ({"x": x}, y), {"x": x, "labels": y}):
        (found,) = inputs_of(PROGRAM, batch, "")
        assert found is x


def test_a_generator_is_refused_and_so_is_nothing() -> None:
    def once() -> Iterator[Any]:
        yield from DATA

    for read in (lambda c: list(gradients(PROGRAM, NAMES, c)), count_batches):
        with pytest.raises(UsageError, match="read only once"):
            read(context(once()))
        with pytest.raises(UsageError, match="gave no batch"):
            read(context([]))


class Unsized:
    """A re-iterable that does not say how long it is."""

    def __iter__(self) -> Iterator[Any]:
        return iter(DATA)


def test_batches_are_counted_where_nobody_says() -> None:
    assert count_batches(context(DATA)) == count_batches(context(Unsized())) == 5
