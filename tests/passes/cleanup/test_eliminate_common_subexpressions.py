"""eliminate-common-subexpressions: equal things are computed once."""

import operator
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import Dim

from planish.ir.execute import run
from planish.ir.ops import COMMUTATIVE
from planish.passes.base import PassContext
from planish.passes.cleanup.eliminate_common_subexpressions import (
    EliminateCommonSubexpressions,
    expression_key,
)
from tests.passes.cleanup.graphs import Of, captured
from tests.support.check import check, refuses, run_checked, unchanged

aten = torch.ops.aten
PASS = EliminateCommonSubexpressions()
X, Y = torch.randn(2, 3), torch.randn(2, 3)

# -- Fires ------------------------------------------------------------------------------------


def test_equal_calls_are_merged_and_so_are_calls_of_them() -> None:
    check(
        Of(lambda x: torch.relu(x.exp()) - torch.relu(x.exp()) * 2),
        (X,),
        PASS,
        """
        program(%x: f32[2, 3])
          %0: f32[2, 3] = aten.exp(%x)
          %1: f32[2, 3] = aten.relu(%0)
          %2: f32[2, 3] = aten.mul.Tensor(%1, other=2)
          %3: f32[2, 3] = aten.sub.Tensor(%1, %2)
          return %3
        """,
        changes=2,
    )


def test_operands_of_commutative_operators_may_be_swapped() -> None:
    result = check(Of(lambda x, y: (x * y + 1) / (y * x + 2) + (x + y) * (y + x)), (X, Y), PASS)
    assert [c.node for c in result.changes] == ["mul_1", "add_3"]


def test_sizes_are_formulas_whatever_they_were_read_from() -> None:
    check(
        Of(lambda x, y: torch.ones(x.shape[0]) + torch.zeros(y.shape[0]) * torch.ones(x.shape[0])),
        (X, Y),
        PASS,
        dynamic_shapes=({0: (n := Dim("n"))}, {0: n}),
        changes=1,
    )


def test_attention_in_evaluation_mode_draws_nothing() -> None:
    attend = nn.functional.scaled_dot_product_attention
    check(Of(lambda x: attend(x, x, x) + attend(x, x, x) * 2), (X,), PASS, changes=1)


# -- Refuses ----------------------------------------------------------------------------------


def test_refuses_to_let_two_outputs_share_memory() -> None:
    module = Of(lambda x: (x + 1, (x + 1).unsqueeze(0)))
    refuses(module, (X,), PASS, "two outputs would share their memory")


def test_random_numbers_are_drawn_twice() -> None:
    module = Of(lambda x: (torch.rand(3) - torch.rand(3)) * 0 + x)
    unchanged(module, (X,), PASS)


def test_branches_of_conditions_are_left_alone() -> None:
    def forward(x: Tensor) -> Tensor:
        def branch(t: Tensor) -> Tensor:
            return t + 1

        first = torch.cond(x.sum() > 0, branch, torch.neg, (x,))
        return first + torch.cond(x.mean() > 0, branch, torch.neg, (x,))

    unchanged(Of(forward), (X,), PASS)


def test_undefined_memory_is_no_value() -> None:
    unchanged(Of(lambda x: x + torch.empty(0).sum() - torch.empty(0).sum() * 2), (X,), PASS)


# -- Meaning ----------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.sampled_from("+*-/m"), st.integers(0, 9), st.integers(0, 9)), max_size=12)
)
def test_every_value_is_computed_once_and_is_the_same(code: list[tuple[str, int, int]]) -> None:
    """Random straight-line programs; the pass finds what a table of seen expressions finds."""
    functions: dict[str, Any] = {
        "+": operator.add,
        "*": operator.mul,
        "-": operator.sub,
        "/": lambda a, b: a / (b.abs() + 1),
        "m": torch.maximum,
    }
    numbers: dict[Any, int] = {"x": 0, "y": 1}
    stack = [0, 1]
    for name, i, j in code:
        a, b = stack[i % len(stack)], stack[j % len(stack)]
        key = (name, *(sorted((a, b)) if name in "+*m" else (a, b)))
        stack.append(numbers.setdefault(key, len(numbers)))

    def forward(x: Tensor, y: Tensor) -> Tensor:
        values = [x, y]
        for name, i, j in code:
            values.append(functions[name](values[i % len(values)], values[j % len(values)]).tanh())
        return torch.stack(values).sum(0)

    result = run_checked(captured(Of(forward), X, Y), PASS)
    assert sum(n.target is aten.tanh.default for n in result.program.operators) == len(numbers) - 2


def test_the_key_tells_apart_what_python_calls_equal() -> None:
    def key(*args: Any, target: Any = aten.add.Tensor, **kwargs: Any) -> Any:
        return expression_key(target, args, kwargs, identity=lambda node: node.name)

    assert len({key(2, v) for v in [1, 1.0, True, 0.0, -0.0, "1"]}) == 6
    assert key(1, [1, 2]) == key(1, (1, 2))
    assert key(1, 2) == key(2, 1) == key(1, other=2) == key(2, 1, alpha=1)
    assert key(1, 2, alpha=3) != key(2, 1, alpha=3)
    assert key(1, 2, target=aten.sub.Tensor) != key(2, 1, target=aten.sub.Tensor)
    assert key(1, object()) is None


def test_every_commutative_operator_is() -> None:
    a, b = torch.randint(0, 2, (2, 50)).bool()
    for target in COMMUTATIVE:
        assert torch.equal(torch.as_tensor(target(a, b)), torch.as_tensor(target(b, a)))  # type: ignore[operator]


# -- Neighbors --------------------------------------------------------------------------------


def test_time_is_linear_in_nodes() -> None:
    """Each node is hashed once: no pair is compared."""
    program = captured(Of(lambda x: sum(x.exp() * 2 for _ in range(200))), X)
    result = PASS.run(program.clone(), PassContext())
    assert len(result.changes) == 398
    sample = program.samples[0]
    assert torch.equal(run(program, sample)[0], run(result.program, sample)[0])
