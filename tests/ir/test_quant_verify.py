"""The verifier's rules on planish's own quantizing operators."""

import operator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node

from planish.ir.capture import capture
from planish.ir.program import Program
from planish.ir.rewriter import Rewriter
from planish.ir.verify import faults

ops = torch.ops.planish


def program() -> Program:
    return capture(nn.ReLU().eval(), (torch.randn(2, 6),))


def pair(there: dict[str, Any], back: dict[str, Any] | None = None) -> list[str]:
    """What the verifier says of a pair with these parameters on either side."""
    base: dict[str, Any] = {"scale": 0.1, "zero": 3, "dtype": "uint8"}
    there = {**base, **there}
    back = {**there, **(back or {})}
    made = program()
    rewriter = Rewriter(made, "test")
    root = made.operators[0]
    with rewriter.site("pair", made.output) as _:
        codes = rewriter.call(
            ops.quantize.default, [root, *parameters(rewriter, there)], options(there), like=root
        )
        value = rewriter.call(
            ops.dequantize.default, [codes, *parameters(rewriter, back)], options(back), like=root
        )
    made.output.args = ((value,),)
    return [fault.what for _, fault in faults(made)]


def parameters(rewriter: Rewriter, given: dict[str, Any]) -> list[Node]:
    storage = torch.int8 if given["dtype"].startswith("int") else torch.uint8
    scale = torch.as_tensor(given["scale"], dtype=torch.float32)
    zero = torch.as_tensor(given["zero"]).to(storage)
    return [rewriter.constant(scale, "scale"), rewriter.constant(zero, "zero")]


def options(given: dict[str, Any]) -> dict[str, Any]:
    return {key: given[key] for key in ("dtype", "axis", "block_size") if key in given}


@pytest.mark.parametrize(
    "scheme",
    [
        {},
        {"dtype": "int4", "zero": -8},
        {"dtype": "uint4", "zero": 15},
        {"scale": [0.1] * 6, "zero": [0] * 6, "axis": 1},
        {"scale": [[0.1] * 3] * 2, "zero": [[0] * 3] * 2, "axis": 1, "block_size": 2},
    ],
)
def test_possible_schemes_pass(scheme: dict[str, Any]) -> None:
    assert pair(scheme) == []


@pytest.mark.parametrize(
    ("scheme", "says"),
    [
        ({"scale": 0.0}, "its scale is not positive and finite everywhere"),
        ({"scale": -0.1}, "its scale is not positive and finite everywhere"),
        ({"scale": float("inf")}, "its scale is not positive and finite everywhere"),
        ({"scale": float("nan")}, "its scale is not positive and finite everywhere"),
        ({"scale": [0.1] * 5 + [0.0], "zero": [0] * 6, "axis": 1}, "not positive and finite"),
        ({"dtype": "uint4", "zero": 16}, "its zero point is outside of 0 to 15"),
        ({"dtype": "int4", "zero": 8}, "its zero point is outside of -8 to 7"),
    ],
)
def test_an_impossible_scheme_is_told_of_both_operators(scheme: dict[str, Any], says: str) -> None:
    told = pair(scheme)
    assert len(told) == 2
    assert all(says in what for what in told)


@pytest.mark.parametrize(
    ("back", "says"),
    [
        ({"scale": 0.2}, "its scale is not that of quantize_default, which quantized its input"),
        ({"zero": 4}, "its zero_point is not that of quantize_default"),
        ({"dtype": "uint4"}, "its dtype is not that of quantize_default"),
        ({"scale": [0.1] * 6, "zero": [3] * 6, "axis": 1}, "its scale is not that of"),
    ],
)
def test_partners_that_differ_are_told(back: dict[str, Any], says: str) -> None:
    (told,) = pair({}, back)
    assert says in told


def test_axis_and_blocks_are_part_of_the_scheme() -> None:
    square = {"scale": [0.1] * 2, "zero": [0] * 2, "axis": 0}
    made = capture(nn.ReLU().eval(), (torch.randn(2, 2),))
    rewriter = Rewriter(made, "test")
    root = made.operators[0]
    given: dict[str, Any] = {"dtype": "uint8", **square}
    with rewriter.site("pair", made.output) as _:
        shared = parameters(rewriter, given)
        codes = rewriter.call(ops.quantize.default, [root, *shared], options(given), like=root)
        other = {**options(given), "axis": 1}
        value = rewriter.call(ops.dequantize.default, [codes, *shared], other, like=root)
    made.output.args = ((value,),)
    (told,) = [fault.what for _, fault in faults(made)]
    assert "its axis is not that of" in told


@pytest.mark.parametrize(
    ("codes", "dtype", "says"),
    [
        (torch.tensor([-8, 7], dtype=torch.int8), "int4", None),
        (torch.tensor([-9, 7], dtype=torch.int8), "int4", "integers outside of -8 to 7"),
        (torch.tensor([0, 15], dtype=torch.uint8), "uint4", None),
        (torch.tensor([0, 16], dtype=torch.uint8), "uint4", "integers outside of 0 to 15"),
    ],
)
def test_four_bit_constants_hold_four_bits(codes: Tensor, dtype: str, says: str | None) -> None:
    made = program()
    rewriter = Rewriter(made, "test")
    with rewriter.site("constant", made.output) as _:
        given = {"scale": 0.5, "zero": 0, "dtype": dtype}
        held = rewriter.constant(codes, "codes")
        value = rewriter.call(
            ops.dequantize.default, [held, *parameters(rewriter, given)], options(given), like=held
        )
    made.output.args = ((value,),)
    told = [fault.what for _, fault in faults(made)]
    assert len(told) == (says is not None)
    assert says is None or says in told[0]


def dynamic(
    picks: tuple[int, int, int] = (0, 1, 2), per_token: bool = False, **given: Any
) -> list[str]:
    """What the verifier says of a dynamic pair with other results picked, or other options."""
    made = program()
    rewriter = Rewriter(made, "test")
    root = made.operators[0]
    with rewriter.site("pair", made.output) as _:
        triple = rewriter.call(
            ops.dynamic_quantize.default, [root], {"per_token": per_token}, like=root
        )
        parts = [rewriter.call(operator.getitem, [triple, i], like=root) for i in picks]
        value = rewriter.call(ops.dequantize.default, parts, {"dtype": "uint8", **given}, like=root)
    made.output.args = ((value,),)
    return [fault.what for _, fault in faults(made)]


def test_dynamic_pairs_belong_together() -> None:
    assert dynamic() == []
    assert dynamic(per_token=True, axis=-1, block_size=6) == []


def test_a_dynamic_pair_with_the_scale_of_another_is_told() -> None:
    made = program()
    rewriter = Rewriter(made, "test")
    root = made.operators[0]
    with rewriter.site("pair", made.output) as _:
        triples = [rewriter.call(ops.dynamic_quantize.default, [root], like=root) for _ in "ab"]
        parts = [
            rewriter.call(operator.getitem, [triples[which], i], like=root)
            for i, which in enumerate((0, 1, 0))
        ]
        value = rewriter.call(ops.dequantize.default, parts, {"dtype": "uint8"}, like=root)
        zeros = rewriter.call(operator.getitem, [triples[1], 2], like=root)
        scale = rewriter.call(operator.getitem, [triples[0], 1], like=root)
        other = rewriter.call(
            ops.dequantize.default, [parts[0], scale, zeros], {"dtype": "uint8"}, like=root
        )
    made.output.args = ((value,),)
    told = [fault.what for _, fault in faults(made) if "results of" in fault.what]
    told += [fault.what for _, fault in faults(made) if "zero point is not the" in fault.what]
    assert told == [
        "its integers and its scale are not the first two results of dynamic_quantize_default",
        "its zero point is not the third result of dynamic_quantize_default",
    ]
    assert other.name
