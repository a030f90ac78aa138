"""Programs: what a clone takes along, and what calls and lookups answer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph

from planish.ir import capture
from planish.ir.errors import UsageError
from planish.ir.program import Program
from planish.ir.tensortype import SparseLayout


def linear() -> Program:
    return capture(nn.Linear(4, 4).eval(), (torch.randn(2, 4),))


def test_a_clone_takes_layouts_and_types_along_and_has_its_own() -> None:
    program = linear()
    program.layouts["weight"] = SparseLayout(2, 4, 1)
    program.output.meta["note"] = "kept"
    clone = program.clone()
    assert clone.layouts == {"weight": SparseLayout(2, 4, 1)}
    assert clone.output.meta["note"] == "kept"
    for old, new in zip(program.nodes, clone.nodes, strict=True):
        assert old.meta.keys() == new.meta.keys()
        new.meta["mine"] = True
        assert "mine" not in old.meta
    clone.layouts.clear()
    assert program.layouts


def test_a_constant_is_found_by_the_node_that_reads_it_only() -> None:
    program = linear()
    program.constants["input"] = torch.ones(1)
    assert program.constant(program.placeholders[0]) is None
    assert program.constant("weight") is None
    names = {str(n.target): program.constant(n) for n in program.graph.find_nodes(op="get_attr")}
    assert names == {"weight": program.constants["weight"], "bias": program.constants["bias"]}


def test_its_module_holds_what_is_read_only() -> None:
    program = linear()
    program.constants["unread"] = torch.ones(1)
    assert sorted(program.graph_module.state_dict()) == ["bias", "weight"]


def test_a_graph_without_types_has_a_mode_of_its_own() -> None:
    bare = Program(Graph(), {}, linear().signature)
    assert bare.fake_mode is not None
    assert bare.layouts == {}


class Many(nn.Module):
    def forward(self, x: Tensor, n: int = 3, word: str = "a", flag: bool = False) -> Tensor:
        return x * n


def test_defaults_may_be_given_in_any_number_and_nothing_else() -> None:
    program = capture(Many().eval(), (torch.ones(2),))
    expected = torch.full((2,), 3.0)
    assert torch.equal(program(torch.ones(2), n=3, word="a", flag=False), expected)
    with pytest.raises(UsageError, match="unknown input 'flag'"):
        program(torch.ones(2), n=3, flag=True)
    with pytest.raises(UsageError, match="unknown input 'other'"):
        program(torch.ones(2), n=3, other=1)
