"""Batches of inputs in a file: every kind of value comes back, as often as one likes."""

from pathlib import Path

import torch
from torch import Tensor

from planish.passes.debug.bundle_inputs import Inputs, write_inputs


def test_inputs_of_every_kind_read_back(tmp_path: Path) -> None:
    first = (
        torch.randn(4, 3).t(),
        torch.zeros(0, 2),
        torch.tensor(3, dtype=torch.int64),
        torch.randn(3).to(torch.bfloat16),
        7,
    )
    shared = torch.ones(2, dtype=torch.bool)
    second = (shared, shared, torch.tensor(float("nan")), torch.tensor([1 + 2j]), None)
    write_inputs(tmp_path / "x.zip", tuple("abcde"), [first, second])
    found = Inputs(tmp_path / "x.zip")
    assert found.names == tuple("abcde")
    assert len(found) == 2
    for _ in range(2):  # as often as one likes
        for kept, given in zip(found, (first, second), strict=True):
            for a, b in zip(kept, given, strict=True):
                assert type(a) is type(b)
                if isinstance(a, Tensor) and isinstance(b, Tensor):
                    assert a.dtype == b.dtype
                    assert torch.equal(a.nan_to_num(9.0), b.nan_to_num(9.0))
                else:
                    assert a == b
