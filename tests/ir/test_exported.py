"""A program in torch's own container computes the same and is accepted wherever torch takes one."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import GraphModule

from planish.ir import Rewriter, capture, from_exported, text
from planish.ir.exported import to_exported_program
from tests.support.nets import Branch, assert_same, branch_program, net_inputs, net_program


def quietly(exported: ExportedProgram, *args: Any, **kwargs: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about its own pytrees
        return exported.module()(*args, **kwargs)


@pytest.mark.parametrize("size", [1, 2, 7])
def test_its_module_computes_the_same_at_other_sizes(size: int) -> None:
    model, program = net_program()
    args, kwargs = net_inputs(size)
    assert_same(model(*args, **kwargs), quietly(to_exported_program(program), *args, **kwargs))


@pytest.mark.parametrize("table", [None, {}], ids=["core", "functional"])
def test_it_survives_decomposition(table: dict[Any, Any] | None) -> None:
    model, program = net_program()
    decomposed = to_exported_program(program).run_decompositions(table)
    args, kwargs = net_inputs(6)
    assert_same(model(*args, **kwargs), quietly(decomposed, *args, **kwargs))


def test_capturing_it_again_gives_the_same_text() -> None:
    _, program = net_program()
    again = from_exported(to_exported_program(program))
    assert text(again).replace("s2", "batch") == text(program).replace("s2", "batch")
    assert again.constants.keys() == program.constants.keys()
    assert again.signature.fixed == {1: 5}


def test_constants_are_lifted_once_and_share_memory() -> None:
    _, program = net_program()
    exported = to_exported_program(program)
    assert set(exported.state_dict) == set(program.constants)
    for name, value in exported.state_dict.items():
        assert value is program.constants[name]
    lifted = [s.target for s in exported.graph_signature.input_specs if s.target is not None]
    assert sorted(lifted) == sorted(program.constants)


def test_the_program_is_left_alone() -> None:
    _, program = net_program()
    before, nodes = text(program, values=True), [n.name for n in program.nodes]
    to_exported_program(program).run_decompositions({})
    assert text(program, values=True) == before
    assert [n.name for n in program.nodes] == nodes


def test_inputs_keep_their_names_in_order_with_constants_in_place() -> None:
    _, program = net_program()
    exported = to_exported_program(program)
    names = [
        s.arg.name for s in exported.graph_signature.input_specs if s.kind is InputKind.USER_INPUT
    ]
    assert names == ["input", "n", "extra_p"]
    assert exported.graph_signature.user_inputs == ("input", 5, "extra_p")


class Clash(nn.Module):
    """An input is called what the constant `x` would be called as a placeholder."""

    x: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("x", torch.ones(2))

    def forward(self, b_x: Tensor) -> Tensor:
        return b_x - self.x


def test_an_input_named_like_a_lifted_constant_keeps_its_name() -> None:
    program = capture(Clash().eval(), (torch.full((2,), 3.0),))
    exported = to_exported_program(program)
    assert exported.graph_signature.user_inputs == ("b_x",)
    torch.testing.assert_close(quietly(exported, torch.full((2,), 3.0)), torch.full((2,), 2.0))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_branches_stay_branches(sign: float) -> None:
    exported = to_exported_program(branch_program())
    x = torch.full((2, 3), sign)
    torch.testing.assert_close(quietly(exported, x), Branch()(x))
    torch.testing.assert_close(quietly(exported.run_decompositions({}), x), Branch()(x))


def test_ranges_of_dimensions_are_kept() -> None:
    class Double(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return torch.cat([x, x]) + y

    n = Dim("n", min=2, max=9)
    program = capture(
        Double().eval(),
        (torch.ones(3, 2), torch.ones(6, 2)),
        dynamic_shapes=({0: n}, {0: 2 * n}),
    )
    exported = to_exported_program(program)
    ranges = {str(k): (int(v.lower), int(v.upper)) for k, v in exported.range_constraints.items()}
    symbol = next(iter(program.signature.symbols))
    assert ranges[symbol] == (2, 9)
    assert quietly(exported, torch.ones(4, 2), torch.ones(8, 2)).shape == (8, 2)
    with pytest.raises((AssertionError, RuntimeError)):
        quietly(exported, torch.ones(11, 2), torch.ones(22, 2))


def test_a_rewritten_program_with_shared_constants_is_still_valid() -> None:
    _, program = net_program()
    program = program.clone()
    rewriter = Rewriter(program, "test")
    linear = next(n for n in program.operators if str(n.target) == "aten.linear.default")
    weight = program.constant(linear.args[1])
    assert weight is not None
    with rewriter.site("share", linear):
        again = rewriter.constant(weight, "alias.of.weight", like=linear)
        same = rewriter.call(linear.target, (linear.args[0], again, linear.args[2]), like=linear)
        rewriter.replace(linear, same)
    exported = to_exported_program(rewriter.finish())
    args, kwargs = net_inputs(3)
    assert_same(program(*args, **kwargs), quietly(exported, *args, **kwargs))


def test_torch_onnx_export_takes_it() -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 2)

        def forward(self, input: Tensor, bias: Tensor | None = None) -> dict[str, Tensor]:
            return {"y": self.linear(input), "x": input}

    program = capture(
        Small().eval(), (torch.randn(3, 4), None), dynamic_shapes=({0: Dim("batch")}, None)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        onnx_program = torch.onnx.export(to_exported_program(program), dynamo=True, verbose=False)
    assert onnx_program is not None
    inputs = onnx_program.model.graph.inputs
    assert len(inputs) == 1
    assert "linear.weight" in onnx_program.model.graph.initializers


def test_a_program_without_samples_has_no_example_inputs() -> None:
    _, program = net_program()
    program.samples = ()
    assert to_exported_program(program).example_inputs is None


def test_the_bodies_of_branches_are_left_alone() -> None:
    program = branch_program()
    bodies = [c for c in program.constants.values() if isinstance(c, GraphModule)]
    assert bodies

    def state() -> list[Any]:
        return [(n.name, str(n.args), sorted(n.meta)) for b in bodies for n in b.graph.nodes]

    before = state()
    exported = to_exported_program(program)
    assert state() == before
    held = [m for m in exported.graph_module.children() if isinstance(m, GraphModule)]
    assert held
    assert not {id(b.graph) for b in bodies} & {id(h.graph) for h in held}


def test_it_is_what_torch_export_gives() -> None:
    _, program = net_program()
    assert to_exported_program(program).dialect == "TRAINING"


def test_a_constant_without_a_type_gets_one() -> None:
    model, program = net_program()
    for node in program.graph.find_nodes(op="get_attr"):
        del node.meta["val"]
    exported = to_exported_program(program)
    lifted = [n for n in exported.graph.nodes if n.name.startswith("b_")]
    assert len(lifted) == len(program.constants)
    for spec, node in zip(exported.graph_signature.input_specs, lifted, strict=False):
        constant = program.constants[str(spec.target)]
        assert node.meta["val"].shape == constant.shape
    args, kwargs = net_inputs(3)
    assert_same(model(*args, **kwargs), quietly(exported, *args, **kwargs))


def test_a_size_that_the_data_decides_keeps_its_range() -> None:
    class Counts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.nonzero() * 2

    program = capture(Counts().eval(), (torch.tensor([0.0, 1.0, 2.0]),))
    exported = to_exported_program(program)
    (symbol,) = exported.range_constraints
    table = program.fake_mode.shape_env
    assert table is not None
    assert exported.range_constraints[symbol] == table.var_to_range[symbol]
    assert quietly(exported, torch.tensor([0.0, 1.0, 0.0])).shape == (1, 1)


def test_symbolic_numbers_of_every_kind_are_outputs() -> None:
    class Numbers(nn.Module):
        def forward(self, x: Tensor) -> Any:
            n = x.shape[0]
            return n * 2, n / 4, n > 5, 7, x + n

    batch = Dim("batch", min=2, max=99)
    program = capture(Numbers().eval(), (torch.ones(3, 2),), dynamic_shapes=({0: batch},))
    exported = to_exported_program(program)
    kinds = [type(spec.arg).__name__ for spec in exported.graph_signature.output_specs]
    assert [k.removesuffix("Argument") for k in kinds] == [
        "SymInt",
        "SymFloat",
        "SymBool",
        "Constant",
        "Tensor",
    ]
    for size in (3, 9):
        x = torch.ones(size, 2)
        *numbers, moved = quietly(exported, x)
        assert numbers == [size * 2, size / 4, size > 5, 7]
        torch.testing.assert_close(moved, x + size)
