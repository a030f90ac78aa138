import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.export import Dim
from torch.nn import functional as F

from planish.passes.base import PassResult
from planish.passes.fuse.attention import RecoverAttention, written_out
from planish.passes.fuse.attention_masks import absorbs, bias_of
from tests.passes.fuse.modules import Quaternary, Ternary, assert_is_a_value, random
from tests.support.check import check, refuses, unchanged

RECOVER = RecoverAttention()
SDPA = torch.ops.aten.scaled_dot_product_attention.default
B, T = Dim("b"), Dim("t", max=15)
QKV = (random(2, 3, 5, 8), random(2, 3, 5, 8, seed=1), random(2, 3, 5, 8, seed=2))
DYNAMIC = ({0: B, 2: T},) * 3
INF = math.inf
CAUSAL = torch.ones(16, 16).tril()


def softmax(x: Tensor) -> Tensor:
    return torch.softmax(x, -1)


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-1, -2) * 0.25


def mask_of(result: PassResult) -> Any:
    """The mask operand of the one attention, by its target."""
    (node,) = [n for n in result.program.operators if n.target is SDPA]
    mask = node.args[3]
    return getattr(mask, "target", mask)


# Fires ---------------------------------------------------------------------------------------


def test_recovers_attention_with_an_additive_mask() -> None:
    check(
        Quaternary(lambda _, q, k, v, m: softmax(m + q @ k.transpose(2, 3) / math.sqrt(16)) @ v),
        (*QKV, random(2, 1, 5, 5)),
        RECOVER,
        """
        program(%q: f32[b, 3, t, 8], %k: f32[b, 3, t, 8], %v: f32[b, 3, t, 8], %m: f32[b, 1, t, t])
          %0: f32[b, 3, t, 8] = aten.scaled_dot_product_attention(%q, %k, %v, %m, scale=0.25)
          return %0
        """,
        dynamic_shapes=(*DYNAMIC, {0: B, 2: T, 3: T}),
        changes=1,
    )


def test_recovers_a_causal_mask_cut_from_a_constant() -> None:
    def nano(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length = q.shape[2]
        hidden = self.causal[:, :, :length, :length] == 0
        return F.dropout(softmax(scores(q, k).masked_fill(hidden, -INF)), 0.1, False) @ v

    module = Ternary(nano, causal=CAUSAL[None, None])
    after = """
    program(%q: f32[b, 3, t, 8], %k: f32[b, 3, t, 8], %v: f32[b, 3, t, 8])
      %0: f32[b, 3, t, 8] = aten.scaled_dot_product_attention(%q, %k, %v, is_causal=True, scale=0.25)
      return %0
    """  # noqa: E501
    check(module, QKV, RECOVER, after, dynamic_shapes=DYNAMIC, changes=1)
    kept = check(module, QKV, RecoverAttention(causal=False), dynamic_shapes=DYNAMIC, changes=1)
    assert mask_of(kept) is torch.ops.aten.logical_not.default


def test_recovers_batch_and_heads_folded_for_bmm() -> None:
    def folded(_: Any, q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        b, h, t, _e = q.shape
        q, k, v = (x.reshape(b * h, t, 8) for x in (q, k, v))
        weights = torch.bmm(q * 0.25, k.transpose(1, 2)).view(b, h, t, t) + m
        return torch.bmm(softmax(weights.view(b * h, t, t)), v)

    check(
        Quaternary(folded),
        (*QKV, random(2, 1, 5, 5)),
        RECOVER,
        """
        program(%q: f32[b, 3, t, 8], %k: f32[b, 3, t, 8], %v: f32[b, 3, t, 8], %m: f32[b, 1, t, t])
          %0: f32[b, 3, t, 8] = aten.scaled_dot_product_attention(%q, %k, %v, %m, scale=0.25)
          %1: f32[3*b, t, 8] = aten.flatten.using_ints(%0, end_dim=1)
          return %1
        """,
        dynamic_shapes=(*DYNAMIC, {0: B, 2: T, 3: T}),
        changes=1,
    )


def test_recovers_three_dimensions_as_one_head() -> None:
    check(
        Quaternary(lambda _, q, k, v, m: softmax(scores(q, k).masked_fill(m, -INF)) @ v),
        (*(x[0] for x in QKV), random(3, 5, 5) > 1),
        RECOVER,
        """
        program(%q: f32[3, 5, 8], %k: f32[3, 5, 8], %v: f32[3, 5, 8], %m: bool[3, 5, 5])
          %0: f32[3, 1, 5, 8] = aten.unsqueeze(%q, dim=1)
          %1: f32[3, 1, 5, 8] = aten.unsqueeze(%k, dim=1)
          %2: f32[3, 1, 5, 8] = aten.unsqueeze(%v, dim=1)
          %3: bool[3, 1, 5, 5] = aten.unsqueeze(%m, dim=1)
          %4: bool[3, 1, 5, 5] = aten.logical_not(%3)
          %5: f32[3, 1, 5, 8] = aten.scaled_dot_product_attention(%0, %1, %2, %4, scale=0.25)
          %6: f32[3, 5, 8] = aten.squeeze.dim(%5, dim=1)
          return %6
        """,
        changes=1,
    )


def test_recovers_baddbmm_with_a_mask_that_folds_batch_and_heads() -> None:
    def alibi(_: Any, q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        q, k, v = (x.reshape(6, 5, 8) for x in (q, k, v))
        weights = torch.baddbmm(m, q, k.transpose(1, 2), beta=1.0, alpha=0.25)
        return torch.bmm(softmax(weights), v)

    result = check(Quaternary(alibi), (*QKV, random(6, 1, 5)), RECOVER, changes=1)
    assert mask_of(result) is torch.ops.aten.unflatten.int


SCALES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "none": lambda q, k: q @ k.transpose(-1, -2),
    "before, on both": lambda q, k: (q * 0.5) @ (0.5 * k).transpose(-2, -1),
    "on the transposed key": lambda q, k: q @ (k.mT / 4),
    "after": lambda q, k: 0.25 * torch.matmul(q, k.permute(0, 1, 3, 2)),
    "swapaxes": lambda q, k: q @ k.swapaxes(-1, -2) / 4,
    "transposed twice": lambda q, k: q @ k.transpose(1, 2).transpose(1, 2).transpose(2, 3),
    "constant": lambda q, k: q @ k.mT * torch.full([], 0.3),
}


@pytest.mark.parametrize("form", SCALES)
def test_recovers_every_place_of_the_scale(form: str) -> None:
    f = SCALES[form]
    result = check(Ternary(lambda _, q, k, v: softmax(f(q, k)) @ v), QKV, RECOVER, changes=1)
    (node,) = [n for n in result.program.operators if n.target is SDPA]
    wanted = {"none": 1.0, "transposed twice": 1.0, "constant": 0.3}.get(form, 0.25)
    assert math.isclose(node.kwargs["scale"], wanted, rel_tol=1e-6)  # type: ignore[arg-type]


def test_recovers_a_key_that_already_lies_transposed() -> None:
    def permuted(_: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = softmax(q.permute(0, 2, 1, 3) @ k.permute(0, 2, 3, 1))
        return weights @ v.permute(0, 2, 1, 3)

    result = check(Ternary(permuted), QKV, RECOVER, changes=1)
    dims = [n.args[1] for n in result.program.operators if n.target is not SDPA]
    assert dims == [[0, 2, 1, 3]] * 3
    given_so = (QKV[0], QKV[1].mT.contiguous(), QKV[2])
    check(Ternary(lambda _, q, k, v: softmax(q @ k) @ v), given_so, RECOVER, changes=1)


Masked = Callable[[Tensor, Tensor], Tensor]
FINITE = torch.finfo(torch.float32).min
MASKS: dict[str, tuple[Masked, str]] = {
    "fill": (lambda s, m: s.masked_fill(m == 0, -INF), "logical_not.default"),
    "keep": (lambda s, m: torch.where(m > 0, s, -INF), "gt.Scalar"),
    "drop": (lambda s, m: torch.where(m == 0, torch.tensor(-INF), s), "logical_not.default"),
    "large number": (lambda s, m: s.masked_fill(m == 0, -1e9), "where.Scalar"),
    "largest number": (lambda s, m: torch.where(m > 0, s, FINITE), "where.Scalar"),
    "added": (lambda s, m: s + (1.0 - m.float()) * FINITE, "mul.Tensor"),
    "two added": (lambda s, m: s + m * 0.1 + (1.0 - m.float()) * FINITE, "add.Tensor"),
    "added and filled": (
        lambda s, m: (s + m.float()).masked_fill(m == 0, -INF),
        "add.Tensor",
    ),
    "two conditions": (
        lambda s, m: s.masked_fill(m == 0, -INF).masked_fill(m == 7, -INF),
        "logical_and.default",
    ),
    "one number a key": (lambda s, m: s + m.float()[0, 0, 0], "unsqueeze.default"),
}


@pytest.mark.parametrize("form", MASKS)
def test_recovers_every_kind_of_mask(form: str) -> None:
    f, target = MASKS[form]
    mask = torch.ones(2, 1, 1, 5, dtype=torch.long)
    mask[1, :, :, 3:] = 0
    module = Quaternary(lambda _, q, k, v, m: softmax(f(scores(q, k), m)) @ v)
    result = check(module, (*QKV, mask), RECOVER, changes=1)
    assert str(mask_of(result)) == f"aten.{target}"


def test_recovers_a_softmax_in_float32_of_half_precision() -> None:
    def half(_: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(scores(q, k), -1, dtype=torch.float32).to(q.dtype) @ v

    args = tuple(x.to(torch.bfloat16) for x in QKV)
    result = check(Ternary(half), args, RECOVER, changes=1)
    assert len(result.program.operators) == 1


# Refuses -------------------------------------------------------------------------------------


def returns_weights(_: Any, q: Tensor, k: Tensor, v: Tensor) -> Any:
    weights = softmax(scores(q, k))
    return weights @ v, weights


@pytest.mark.parametrize(
    ("f", "because"),
    [
        (returns_weights, "(aten.softmax.int) has another user"),
        (lambda _, q, k, v: softmax(torch.tanh(scores(q, k))) @ v, "pass through aten.tanh"),
        (lambda _, q, k, v: softmax(scores(q, k) * v.mean()) @ v, "pass through aten.mul.Tensor"),
        (lambda _, q, k, v: softmax((scores(q, k) + v[0, 0, 0, 0]) * 2) @ v, "after the mask"),
        (
            lambda _, q, k, v: softmax((scores(q, k) + q[..., :5]) * 2 + k[..., :5]) @ v,
            "after the mask",
        ),
        (
            lambda _, q, k, v: (
                (torch.baddbmm(q[0, :, :, :5], q[0], k[0].mT) * 2).softmax(-1) @ v[0]
            ),
            "after the mask",
        ),
        (lambda _, q, k, v: softmax(scores(q, k) + v[0, 0, 0, 0]) @ v, "the scores is a number"),
        (lambda _, q, k, v: torch.softmax(scores(q, k), 2) @ v, "is not over the keys"),
        (lambda _, q, k, v: (softmax(scores(q, k)) * q.mean()) @ v, "aten.mul.Tensor after the"),
        (lambda _, q, k, v: softmax(scores(q, k[:, :1])) @ v[:, :1], "differ in batch or heads"),
        (lambda _, q, k, v: softmax(scores(q, k[0, 0])) @ v[0, 0], "not 3 or 4"),
        (lambda _, q, k, v: softmax(scores(q, k).double()) @ v.double(), "differ in dtype"),
        (
            lambda _, q, k, v: softmax(scores(q, k).masked_fill(q[..., :5] > 0, -1e4)) @ v,
            "masked scores are set to -10000, too near to real scores",
        ),
        (
            lambda _, q, k, v: softmax(torch.where(q[..., :5] > 0, scores(q, k), q[..., :5])) @ v,
            "masked scores are replaced by another tensor",
        ),
        (
            lambda _, q, k, v: softmax(scores(q[:1], k[:1]) + q[..., :5]) @ v,
            "a mask is larger than the scores",
        ),
        (
            lambda _, q, k, v: softmax(torch.add(scores(q, k), q[..., :5], alpha=2)) @ v,
            "the mask is added with a factor",
        ),
        (
            lambda _, q, k, v: (
                softmax(scores(q, k).view(1, 2, 3, 5, 5) + q[..., :5]).view(2, 3, 5, 5) @ v
            ),
            "the scores are viewed in another shape",
        ),
        (
            lambda _, q, k, v: (
                torch.baddbmm(q[0, :, :, :5], q[0], k[0].mT, beta=2).softmax(-1) @ v[0]
            ),
            "the mask of baddbmm is scaled",
        ),
    ],
)
def test_refuses(f: Callable[..., Any], because: str) -> None:
    refuses(Ternary(f), QKV, RECOVER, because)


@pytest.mark.parametrize(
    "f",
    [
        lambda _, q, k, v: softmax(q) @ v.mT,
        lambda _, q, k, v: scores(q, k) @ v,
        lambda _, q, k, v: torch.sigmoid(scores(q, k)) @ v,
        lambda _, q, k, v: v.mT @ softmax(scores(q, k)),
    ],
    ids=["no scores", "no softmax", "sigmoid", "other side"],
)
def test_leaves_what_only_looks_alike(f: Callable[..., Any]) -> None:
    unchanged(Ternary(f), QKV, RECOVER)


@pytest.mark.parametrize(
    "constant",
    [CAUSAL.roll(1, 1), CAUSAL.T.contiguous(), torch.ones(16, 16).tril(1), CAUSAL.roll(1, 0)],
    ids=["shifted", "upper", "one ahead", "one behind"],
)
def test_a_mask_that_is_not_quite_causal_stays_a_mask(constant: Tensor) -> None:
    module = Ternary(
        lambda m, q, k, v: softmax(scores(q, k).masked_fill(m.c[:5, :5] == 0, -INF)) @ v, c=constant
    )
    assert mask_of(check(module, QKV, RECOVER, changes=1)) is torch.ops.aten.logical_not.default


# Meaning -------------------------------------------------------------------------------------


def test_the_definition_is_what_torch_computes() -> None:
    q, k, v = QKV
    for mask in (None, random(5, 5), random(2, 1, 5, 5) > -2):
        expected = F.scaled_dot_product_attention(q, k, v, mask, scale=0.3)
        torch.testing.assert_close(written_out(q, k, v, mask, 0.3), expected)
    one_key = written_out(q, k[:, :, :1], v[:, :, :1], None, 1.0)
    assert torch.equal(one_key, v[:, :, :1].expand(2, 3, 5, 8))


def test_adding_is_filling_where_the_number_swallows_the_score() -> None:
    score, hidden = torch.linspace(-16, 16, 65), torch.tensor([True])
    for fill in (-1e9, -1e30, torch.finfo(torch.float32).min):
        assert absorbs(fill, torch.float32)
        assert torch.equal(score + bias_of(hidden, fill), torch.full((65,), fill))
    assert absorbs(-INF, torch.float16)
    assert not absorbs(-1e4, torch.float32)
    assert not absorbs(1e30, torch.float32)


def test_a_row_masked_everywhere_is_the_mean_of_the_values_for_a_finite_fill() -> None:
    hidden = torch.ones(1, 1, 5, 5, dtype=torch.bool)
    module = Quaternary(lambda _, q, k, v, m: softmax(scores(q, k).masked_fill(m, -1e9)) @ v)
    program = check(module, (*QKV, hidden), RECOVER, changes=1).program
    expected = QKV[2].mean(2, keepdim=True).expand(2, 3, 5, 8)
    torch.testing.assert_close(program(*QKV, hidden), expected)


@given(
    sizes=st.tuples(*[st.integers(1, 3)] * 2, *[st.integers(1, 6)] * 4),
    scale=st.sampled_from([1.0, 0.125, -0.5, 3.0]),
    kind=st.sampled_from(["none", "float", "bool", "finite"]),
    mask_sizes=st.tuples(*[st.booleans()] * 4),
    rank=st.integers(2, 4),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_any_attention_means_the_same(
    sizes: tuple[int, ...],
    scale: float,
    kind: str,
    mask_sizes: tuple[bool, ...],
    rank: int,
    dtype: torch.dtype,
) -> None:
    b, h, queries, keys, e, f = sizes
    args = [
        random(b, h, n, m, seed=i, dtype=dtype)
        for i, (n, m) in enumerate([(queries, e), (keys, e), (keys, f)])
    ]
    whole = zip((b, h, queries, keys), mask_sizes, strict=True)
    bias = random(*[n if full else 1 for n, full in whole][4 - rank :], seed=3, dtype=dtype)

    def attention(_: Any, q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        if kind == "finite":
            return softmax((q @ k.mT * scale).masked_fill(m > 0, -1e30)) @ v
        mask = {"none": None, "float": m, "bool": m > -0.5}[kind]
        return written_out(q, k, v, mask, scale)

    result = check(Quaternary(attention), (*args, bias), RECOVER, changes=1)
    assert [n.target for n in result.program.operators].count(SDPA) == 1


# Neighbors -----------------------------------------------------------------------------------


def test_leaves_other_readers_of_the_operands_alone() -> None:
    module = Ternary(lambda _, q, k, v: (softmax((q * 0.5) @ k.mT) @ v, k.mT + 1, q * 0.5 + v))
    result = check(module, QKV, RECOVER, changes=1)
    (node,) = [n for n in result.program.operators if n.target is SDPA]
    assert node.meta["from"][:2] == ("recover-attention", "whole-attention")
    assert "add" in {n.name for n in result.program.operators}


def test_repeated_heads_of_grouped_queries_stay_repeated() -> None:
    def grouped(_: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x[:, :1, None].expand(2, 1, 3, 5, 8).reshape(2, 3, 5, 8) for x in (k, v))
        return softmax(scores(q, k)) @ v

    result = check(Ternary(grouped), QKV, RECOVER, changes=1)
    assert [n.target for n in result.program.operators].count(torch.ops.aten.expand.default) == 2


def test_is_a_value() -> None:
    assert_is_a_value(RECOVER, "recover-attention")
    assert_is_a_value(RecoverAttention(causal=False), "recover-attention{causal=false}")
