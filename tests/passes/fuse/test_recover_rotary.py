from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.export import Dim

from planish.ir.operators import rotary_embedding, rotate
from planish.passes.fuse.rotary import RecoverRotary
from tests.passes.fuse.modules import Ternary, assert_is_a_value, random
from tests.support.check import check, refuses, unchanged

RECOVER = RecoverRotary()
ARGS = (random(2, 3, 5, 8), random(2, 1, 5, 8, seed=1), random(2, 1, 5, 8, seed=2))
DYNAMIC = ({0: Dim("b"), 2: Dim("t")},) * 3


def halves(x: Tensor) -> Tensor:
    middle = x.shape[-1] // 2
    return torch.cat((-x[..., middle:], x[..., :middle]), dim=-1)


def chunks(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((second * -1, first), dim=-1)


def sections(x: Tensor) -> Tensor:
    first, second = x.split([4, 4], dim=-1)
    return torch.cat((-second, first), dim=3)


def neighbors(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def pairs(x: Tensor) -> Tensor:
    even, odd = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return torch.stack((-odd, even), dim=-1).reshape(x.shape)


def selected(x: Tensor) -> Tensor:
    both = x.unflatten(-1, (-1, 2))
    return torch.stack((-both[..., 1], both[..., 0]), dim=-1).flatten(3)


FORMS = [halves, chunks, sections, neighbors, pairs, selected]


def rotary(f: Callable[[Tensor], Tensor]) -> Ternary:
    return Ternary(lambda _, x, cos, sin: x * cos + f(x) * sin)


# Fires ---------------------------------------------------------------------------------------


def test_recovers_the_embedding_of_halves() -> None:
    check(
        rotary(halves),
        ARGS,
        RECOVER,
        """
        program(%q: f32[b, 3, t, 8], %k: f32[b, 1, t, 8], %v: f32[b, 1, t, 8])
          %0: f32[b, 3, t, 8] = planish.rotary_embedding(%q, %k, %v)
          return %0
        """,
        dynamic_shapes=DYNAMIC,
        changes=1,
    )


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.__name__)
def test_recovers_every_form_in_both_orders(form: Callable[[Tensor], Tensor]) -> None:
    for f in (
        lambda _, x, cos, sin: x * cos + form(x) * sin,
        lambda _, x, cos, sin: sin * form(x) + cos * x,
    ):
        result = check(Ternary(f), ARGS, RECOVER, changes=1)
        node = result.program.operators[-1]
        assert node.target is torch.ops.planish.rotary_embedding.default
        assert node.args[3] is (form in (neighbors, pairs, selected))


# Refuses -------------------------------------------------------------------------------------


def opposite(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((second, -first), dim=-1)


def used_twice(_: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Any:
    turned = halves(x)
    return x * cos + turned * sin, turned


@pytest.mark.parametrize(
    ("f", "because"),
    [
        (lambda _, x, cos, sin: x * cos + opposite(x) * sin, "by the opposite angle"),
        (lambda _, x, cos, sin: x + halves(x) * sin, "added to something that is not a product"),
        (
            lambda _, x, cos, sin: (x + 1) * cos + halves(x) * sin,
            "what is rotated is not what is multiplied",
        ),
        (used_twice, "(aten.cat) has another user"),
        (
            lambda _, x, cos, sin: x[:, :1] * cos + halves(x[:, :1]) * sin.expand(2, 4, 5, 8),
            "what is rotated is not what is multiplied",
        ),
        (lambda _, x, cos, sin: x * cos.double() + halves(x) * sin, "has another dtype"),
    ],
    ids=["opposite", "no product", "another tensor", "second user", "two slices", "dtype"],
)
def test_refuses(f: Callable[..., Any], because: str) -> None:
    refuses(Ternary(f), ARGS, RECOVER, because)


def test_refuses_a_cosine_larger_than_what_it_rotates() -> None:
    args = (random(1, 3, 5, 8), *ARGS[1:])
    refuses(rotary(halves), args, RECOVER, "cos or sin is larger than what it rotates")


@pytest.mark.parametrize(
    "f",
    [
        lambda x: torch.cat((-x[..., 3:], x[..., :3]), dim=-1),
        lambda x: torch.cat((x[..., 4:], x[..., :4]), dim=-1),
        lambda x: torch.cat((-x[..., :4], x[..., 4:]), dim=-1),
        lambda x: torch.stack((-x[..., ::2], x[..., 1::2]), dim=-1).flatten(-2),
        lambda x: torch.cat((-x[..., 1::2], x[..., ::2]), dim=-1),
        lambda x: torch.roll(x, 1, -1),
    ],
    ids=["unequal", "no sign", "not swapped", "pairs not swapped", "mixed", "roll"],
)
def test_leaves_what_only_looks_alike(f: Callable[[Tensor], Tensor]) -> None:
    unchanged(rotary(f), ARGS, RECOVER)


# Meaning -------------------------------------------------------------------------------------


def test_rotating_twice_negates() -> None:
    x = ARGS[0]
    for interleaved in (False, True):
        assert torch.equal(rotate(rotate(x, interleaved), interleaved), -x)
    assert rotate(torch.tensor([1.0, 2, 3, 4])).tolist() == [-3, -4, 1, 2]
    assert rotate(torch.tensor([1.0, 2, 3, 4]), True).tolist() == [-2, 1, -4, 3]


def test_a_rotation_keeps_the_length_of_each_pair() -> None:
    angle = torch.tensor([0.3, 0.7]).repeat(2)
    x = torch.tensor([3.0, 0.0, 4.0, 1.0])
    y = torch.ops.planish.rotary_embedding(x, angle.cos(), angle.sin())
    assert torch.allclose(y[0] ** 2 + y[2] ** 2, torch.tensor(25.0))
    assert torch.equal(y, rotary_embedding(x, angle.cos(), angle.sin()))


def test_the_operator_has_the_type_it_says_it_has() -> None:
    torch.library.opcheck(torch.ops.planish.rotary_embedding.default, ARGS, {"interleaved": True})


@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    length=st.integers(1, 4),
    width=st.integers(1, 4).map(lambda n: 2 * n),
    shared=st.booleans(),
    form=st.sampled_from([halves, chunks, neighbors, selected]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_any_embedding_means_the_same(
    batch: int,
    heads: int,
    length: int,
    width: int,
    shared: bool,
    form: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
) -> None:
    angles = (1 if shared else batch, 1, length, width)
    args = (
        random(batch, heads, length, width, dtype=dtype),
        random(*angles, seed=1, dtype=dtype),
        random(*angles, seed=2, dtype=dtype),
    )
    result = check(rotary(form), args, RECOVER, changes=1)
    assert len(result.program.operators) == 1


# Neighbors -----------------------------------------------------------------------------------


def test_query_and_key_share_their_angles() -> None:
    def both(_: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Any:
        key = x[:, :1]
        return x * cos + halves(x) * sin, key * cos + halves(key) * sin

    result = check(Ternary(both), ARGS, RECOVER, changes=2)
    targets = [n.target for n in result.program.operators]
    assert targets.count(torch.ops.planish.rotary_embedding.default) == 2
    node = result.program.operators[-1]
    assert node.meta["from"][:2] == ("recover-rotary", "rotary-embedding")


def test_is_a_value() -> None:
    assert_is_a_value(RECOVER, "recover-rotary")
