"""Reports to be shown: a real run of a small model, and what hostile names would make of it."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import planish
from planish.report import Report


class Block(nn.Module):
    """A residual block whose parts lie in modules of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.drop(self.bn(self.conv(x))) + x)


class Net(nn.Module):
    """Two stages of blocks, and a batch norm that nothing can take in."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(*(Block() for _ in range(8)))
        self.second = nn.Sequential(*(Block() for _ in range(8)))
        self.bn = nn.BatchNorm2d(4)

    def forward(self, image: Tensor) -> Tensor:
        x = self.second(self.first(image))
        return self.bn(x) * x


RECIPE = "fold-batch-norm,remove-identities,tests.support.example_passes:RoundWeights,fold-scalar"


@cache
def small_report() -> Report:
    """Of a run with an exact, a lossy and an idle pass, exported."""
    torch.manual_seed(0)
    net = Net().eval()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]
    return planish.optimize(net, torch.randn(1, 4, 8, 8), recipe=RECIPE, target="onnx").report


def as_json(report: Report) -> dict[str, Any]:
    """The report as whoever reads its JSON gets it."""
    data: dict[str, Any] = json.loads(report.to_json(graphs=True))
    return data


def long_chain(length: int) -> dict[str, Any]:
    """A report on a model of very many operators in one module."""
    data = as_json(small_report())
    node = {
        "kind": "operator",
        "operator": "aten.relu",
        "type": "f32[2]",
        "modules": ["body"],
        "source": None,
        "status": "kept",
        "change": None,
        "edits": [],
    }
    nodes = [
        {
            **node,
            "name": f"relu_{i}",
            "id": f"%{i}",
            "call": f"aten.relu(relu_{i - 1})",
            "inputs": [f"relu_{i - 1}"] if i else [],
            "partners": [f"relu_{i}"],
        }
        for i in range(length)
    ]
    graph = {"nodes": nodes, "modules": {"": "Chain", "body": "Body"}}
    data["graphs"] = {"before": graph, "after": graph}
    return data
