"""Traced models carry dead values along; rules leave them to ``eliminate-dead-code``."""

import torch
from torch import Tensor, nn

import planish
from planish.ir.capture import capture


class UnusedMask(nn.Module):
    """Makes an index with a chain of unsqueezes that nothing reads, as transformers does."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        torch.arange(x.shape[0]).unsqueeze(1).unsqueeze(2).unsqueeze(3)
        y: Tensor = self.linear(x)
        return y


def test_dead_chain_is_not_rewritten_but_removed() -> None:
    batch = {0: torch.export.Dim("batch", min=1, max=8)}
    program = capture(UnusedMask().eval(), (torch.ones(2, 4),), dynamic_shapes=(batch,))
    assert any(not node.users for node in program.operators), "the trace has no dead values"
    result = planish.optimize(program, recipe="exact", target="onnx")
    assert [str(node.target) for node in result.program.operators] == ["aten.linear.default"]
