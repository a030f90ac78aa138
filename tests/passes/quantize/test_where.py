"""``Where``: patterns of names, operators and module paths."""

from pathlib import Path

import pytest
from torch import Tensor, nn
from torch.fx import Node

import planish
from planish.ir.capture import capture
from planish.ir.errors import PassError
from planish.ir.program import Program
from planish.passes.quantize.where import EVERYWHERE, Where, names_of
from tests.passes.quantize.nets import normal


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in "ab"])
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def program() -> Program:
    return capture(Nested().eval(), (normal(3, 4),))


def chosen(where: Where) -> list[str]:
    return [node.name for node in program().operators if where.takes(node)]


ALL = ["linear", "relu", "linear_1", "relu_1", "linear_2"]


@pytest.mark.parametrize(
    ("where", "names"),
    [
        (EVERYWHERE, ALL),
        (Where(include=("linear",)), ["linear"]),
        (Where(include=("linear*",)), ["linear", "linear_1", "linear_2"]),
        (Where(include=("aten.relu",)), ["relu", "relu_1"]),
        (Where(include=("blocks.1",)), ["linear_1", "relu_1"]),  # all that is inside of it
        (Where(include=("blocks.1.0",)), ["linear_1"]),
        (Where(include=("blocks.?",), exclude=("aten.relu",)), ["linear", "linear_1"]),
        (Where(exclude=("head", "blocks.0")), ["linear_1", "relu_1"]),
        (Where(include=("block",)), []),  # a part of a name is none
    ],
)
def test_patterns(where: Where, names: list[str]) -> None:
    assert chosen(where) == names


def test_names_of_an_operator() -> None:
    node: Node = program().operators[2]
    assert names_of(node) == ("linear_1", "aten.linear", "blocks.1", "blocks.1.0")


def test_a_pattern_without_a_match_names_the_nearest() -> None:
    EVERYWHERE.check(program())
    Where(include=("blocks.*",), exclude=("head",)).check(program())
    with pytest.raises(PassError, match=r"where.include holds 'haed'") as error:
        Where(include=("haed",)).check(program())
    assert error.value.hint == "did you mean 'head'?"
    with pytest.raises(PassError, match=r"where.exclude holds 'blocks.7.\*'"):
        Where(exclude=("blocks.7.*",)).check(program())


@pytest.mark.parametrize("pattern", ["haed", "[a", "head.(", "*.weight.*"])
@pytest.mark.parametrize(
    "recipe",
    [
        "quantize{mode=dynamic,where={include=[PATTERN]}}",
        "hqq{where={exclude=[PATTERN]}}",
        "quantize{mode=dynamic},keep-float{operators=[PATTERN]}",
    ],
)
def test_a_wrong_pattern_is_a_call_to_mend_and_leaves_no_bundle(
    recipe: str, pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLANISH_REPRO_DIR", str(tmp_path))
    with pytest.raises(PassError, match="operator answers to") as caught:
        planish.optimize(program(), recipe=recipe.replace("PATTERN", f'"{pattern}"'))
    assert caught.value.exit_code == 2
    assert caught.value.replay is None
    assert not list(tmp_path.iterdir())
