"""Running a program node by node: right, frugal, and clear when an operator fails."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node

from planish.ir import capture
from planish.ir.errors import PassError
from planish.ir.execute import last_uses, run
from tests.support.lambdas import Lambda
from tests.support.nets import Branch, assert_same, branch_program, net_inputs, net_program


def test_it_computes_what_the_model_computes() -> None:
    model, program = net_program()
    args, kwargs = net_inputs(6)
    flat = program.signature.flatten(args, kwargs)
    assert_same(model(*args, **kwargs), program.signature.unflatten(run(program, flat)))


def test_branches_run_as_they_are() -> None:
    for sign in (1.0, -1.0):
        x = torch.full((2, 3), sign)
        assert_same((Branch()(x),), run(branch_program(), (x,)))


def test_results_carry_no_gradient() -> None:
    program = capture(nn.Linear(2, 2).eval(), (torch.ones(1, 2),))
    (y,) = run(program, (torch.ones(1, 2, requires_grad=True),))
    assert not y.requires_grad


def test_the_observer_sees_every_operator_once_in_order() -> None:
    _, program = net_program()
    args, kwargs = net_inputs(2)
    seen: list[tuple[Node, Any]] = []
    run(program, program.signature.flatten(args, kwargs), observe=lambda n, v: seen.append((n, v)))
    assert [n for n, _ in seen] == program.operators
    for node, value in seen:
        declared = node.meta["val"]
        if isinstance(declared, Tensor):
            assert (value.dtype, value.dim()) == (declared.dtype, declared.dim())


def test_values_are_freed_after_their_last_use() -> None:
    def chain(x: Tensor) -> Tensor:
        for _ in range(6):
            x = x + 1
        return x

    program = capture(Lambda(chain), (torch.ones(2),))
    alive: list[int] = []
    import weakref

    values: list[weakref.ref[Tensor]] = []

    def observe(_node: Node, value: Tensor) -> None:
        values.append(weakref.ref(value))
        alive.append(sum(ref() is not None for ref in values))

    run(program, (torch.ones(2),), observe=observe)
    assert max(alive) == 2  # an operand and its result


def test_last_uses_cover_every_value_once() -> None:
    _, program = net_program()
    freed = [n for dead in last_uses(program).values() for n in dead]
    assert sorted(map(str, freed)) == sorted(str(n) for n in program.nodes if n.users)
    order = {n: i for i, n in enumerate(program.nodes)}
    for reader, dead in last_uses(program).items():
        for value in dead:
            assert max(order[u] for u in value.users) == order[reader]


def test_a_dead_value_is_not_kept() -> None:
    def wasteful(x: Tensor) -> Tensor:
        x.exp()
        return x + 1

    program = capture(Lambda(wasteful), (torch.ones(2),))
    assert len(program.operators) == 2
    assert_same((torch.full((2,), 2.0),), run(program, (torch.ones(2),)))


def test_a_value_that_nobody_reads_is_freed_at_once() -> None:
    import weakref

    def wasteful(x: Tensor) -> Tensor:
        x.exp()
        return x + 1

    program = capture(Lambda(wasteful), (torch.ones(2),))
    unread: list[weakref.ref[Tensor]] = []
    alive: list[bool] = []

    def observe(node: Node, value: Tensor) -> None:
        alive.extend(ref() is not None for ref in unread)
        if not node.users:
            unread.append(weakref.ref(value))

    run(program, (torch.ones(2),), observe=observe)
    assert alive == [False]


def test_a_failing_operator_is_named_with_the_users_line() -> None:
    class Embed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.ones(3, 2))

        def forward(self, ids: Tensor) -> Tensor:
            return self.table.index_select(0, ids)  # where it fails

    program = capture(Embed().eval(), (torch.tensor([1]),))
    with pytest.raises(PassError, match="operator failed") as caught:
        run(program, (torch.tensor([7]),))
    assert "where it fails" in str(caught.value)
    assert "index_select" in str(caught.value)


@pytest.mark.parametrize("count", [0, 2])
def test_a_wrong_number_of_inputs_is_refused(count: int) -> None:
    program = capture(nn.Linear(2, 2).eval(), (torch.ones(1, 2),))
    with pytest.raises(PassError, match=f"takes 1 inputs, got {count}"):
        run(program, (torch.ones(1, 2),) * count)
