"""Modules made of functions, for tests that need many small ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from planish.ir import Program, capture
from planish.ir.ops import written_argument
from tests.support.nets import assert_same


class Lambda(nn.Module):
    """A function of tensors as a module in evaluation mode."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.eval()

    def forward(self, *args: Any) -> Any:
        """Call the function."""
        return self.function(*args)


def copies(value: Any) -> Any:
    """The same structure over copies of its tensors."""
    return pytree.tree_map_only(Tensor, torch.clone, value)


def assert_captured(
    model: nn.Module, *calls: tuple[Any, ...], dynamic_shapes: Any = None
) -> Program:
    """Capture on the first call and compare with the model on all; no in-place operator is left."""
    program = capture(model, copies(calls[0]), dynamic_shapes=dynamic_shapes)
    for args in calls:
        with torch.no_grad():
            expected = model(*copies(args))
        assert_same(expected, program(*copies(args)))
    assert [n.name for n in program.operators if written_argument(n.target) is not None] == []
    return program
