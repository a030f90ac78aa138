"""In-place operators become functional ones, whatever aliases what."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from planish.ir import capture, text
from planish.ir.ops import functional_form
from planish.ir.verify import verify
from tests.support.lambdas import Lambda, assert_captured

aten = torch.ops.aten

CASES: dict[str, Callable[[Tensor], Any]] = {}


def case(function: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    CASES[function.__name__] = function
    return function


@case
def relu_(x: Tensor) -> Any:
    return (x * 1).relu_()


@case
def a_chain(x: Tensor) -> Any:
    y = x * 1
    z = y.relu_().add_(1).mul_(2)
    return z, y


@case
def a_slice_is_assigned(x: Tensor) -> Any:
    y = x * 2
    y[:, 0] = 0
    y[1:3, :2] += 5
    return y + 1


@case
def a_view_of_a_view_is_written(x: Tensor) -> Any:
    y = x.clone()
    y[:, -1].mul_(3).relu_()
    z = y.view(-1)
    z[0] = 9
    return y, z


@case
def the_base_is_written_under_a_view(x: Tensor) -> Any:
    y = x.clone()
    turned, wide = y.t(), y.expand(2, 4, 3)
    y.add_(1)
    return turned, wide, y


@case
def a_view_is_made_between_two_writes(x: Tensor) -> Any:
    y = x * 1
    w = y.add_(1)
    v = y[0]
    w.mul_(2)
    return v, w, y


@case
def a_reshaped_view_of_a_view(x: Tensor) -> Any:
    x = x * 1
    y = x.view(-1).unsqueeze_(0)
    y.add_(1)
    return x * 1


@case
def pieces_of_a_split(x: Tensor) -> Any:
    y = x * 1
    upper, lower = y.split(2)
    upper.add_(1)
    lower.mul_(2)
    left, right = y.chunk(2, 1)
    y.sub_(1)
    return y, left, right


@case
def the_input_itself(x: Tensor) -> Any:
    x[:, 0] = 7
    return x.add_(1), x


@case
def no_copies_in_disguise(x: Tensor) -> Any:
    x = x * 1
    for alias in (x.float(), x.reshape(3, 4), x.contiguous(), x.detach(), x.to(torch.float32)):
        alias.add_(1)
    return x * 1


@case
def dropout_returns_its_argument(x: Tensor) -> Any:
    h = x * 2
    d = F.dropout(h, 0.1, False)
    d += 1
    return d, h, F.dropout(h, 0.5, False)


@case
def two_names_of_one_tensor(x: Tensor) -> Any:
    y = x * 1
    z = y
    y += 1
    z *= 2
    return y, z


@case
def copy_casts_and_broadcasts(x: Tensor) -> Any:
    y = torch.zeros(4, 3, dtype=torch.int64)
    y.copy_(x)
    z = torch.zeros(4, 3)
    z.copy_(x[0].double())
    return y, z


@case
def rows_are_copied(x: Tensor) -> Any:
    y = x * 1
    y[0].copy_(x[1])
    for i in range(3):
        y[i] = y[i] * 2 + y[i + 1]
    return y


@case
def masks_and_indices(x: Tensor) -> Any:
    y = x * 1
    y[y > 0] = 0
    y.masked_fill_(y < -1, 3.0)
    y[torch.tensor([0, 2])] = 1.0
    y.index_put_((torch.tensor([0]), torch.tensor([1])), torch.tensor([5.0]), accumulate=True)
    y.index_copy_(0, torch.tensor([3]), torch.ones(1, 3))
    y.index_add_(0, torch.tensor([1]), torch.ones(1, 3))
    y.scatter_(1, torch.zeros(4, 1, dtype=torch.long), 2.0)
    return y.fill_diagonal_(5.0)


@case
def a_narrow_tensor_keeps_its_type(x: Tensor) -> Any:
    y = x * 1
    y.add_(x.double())
    half = x.half()
    half.mul_(x)
    count = torch.zeros(3, dtype=torch.int32)
    count.add_(torch.arange(3))
    return y, half, count


@case
def comparisons_in_place_keep_the_type(x: Tensor) -> Any:
    y, z = x * 1, x * 1
    y.gt_(0)
    z.logical_not_()
    y.ge_(z)
    return y, z


@case
def overloads_are_matched_by_their_arguments(x: Tensor) -> Any:
    y = x.abs()
    y.pow_(2).sqrt_().exp_().neg_().sigmoid_().clamp_min_(0.1).floor_()
    y.div_(3, rounding_mode="floor")
    return y.float_power(2).float().lerp_(x, 0.5).addmm_(x, torch.eye(3)).addcmul_(x, x, value=2.0)


@case
def shapes_change_in_place(x: Tensor) -> Any:
    y = x * 1
    y.unsqueeze_(0).squeeze_().t_()
    return y.transpose_(0, 1) * 2


@case
def an_out_argument(x: Tensor) -> Any:
    out = torch.empty(4, 3)
    torch.add(x, x, out=out)
    return out.zero_().fill_(x.sum())


@case
def inside_a_branch(x: Tensor) -> Any:
    def above(t: Tensor) -> Tensor:
        t = t * 1
        t[:, 0] = 0
        return t.relu_()

    return torch.cond(x.sum() > 0, above, lambda t: (t + 1).mul_(3), (x,))


@pytest.mark.parametrize("name", CASES)
def test_writes_are_seen_where_they_were(name: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3)
    assert_captured(Lambda(CASES[name]), (x,), (-x,), (torch.zeros(4, 3),))


def test_a_plain_in_place_operator_is_replaced_one_for_one() -> None:
    program = capture(Lambda(lambda x: (x + 1).relu_() * 2), (torch.ones(2),))
    names = [str(n.target) for n in program.operators]
    assert names == ["aten.add.Tensor", "aten.relu.default", "aten.mul.Tensor"]


def test_batch_norm_stays_whole_where_torch_splits_it() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.norm(self.conv(x))
            y[:, 0] = 0  # a write into a view: torch's own functionalization has to help
            return y

    program = assert_captured(Net().eval(), (torch.randn(1, 2, 3, 3),))
    assert "aten.batch_norm" in text(program)
    assert "_native_batch_norm" not in text(program)
    verify(program)
    whole = next(n for n in program.operators if n.target is aten.batch_norm.default)
    assert "self.norm(self.conv(x))" in whole.meta["stack_trace"]


def test_writing_into_an_input_is_a_remark_and_the_callers_tensor_is_left_alone() -> None:
    program = capture(Lambda(lambda x: x.add_(1)), (torch.zeros(2),))
    assert "writes into its input" in program.remarks[0]
    x = torch.zeros(2)
    program(x)
    assert x.tolist() == [0, 0]


def test_capturing_leaves_the_sample_alone() -> None:
    x = torch.zeros(2)
    program = capture(Lambda(lambda x: x.add_(1)), (x,))
    assert x.tolist() == [0, 0]
    assert program.samples[0][0].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("inplace", "functional"),
    [
        (aten.relu_.default, aten.relu.default),
        (aten.add_.Tensor, aten.add.Tensor),
        (aten.pow_.Scalar, aten.pow.Tensor_Scalar),
        (aten.float_power_.Scalar, aten.float_power.Tensor_Scalar),
        (aten.ldexp_.default, aten.ldexp.Tensor),
        (aten.relu.default, None),
        (aten.copy_.default, aten.copy.default),
        (aten.__iand__.Tensor, None),
    ],
)
def test_functional_forms(inplace: Any, functional: Any) -> None:
    assert functional_form(inplace) is functional
