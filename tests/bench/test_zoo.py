"""The zoo holds what the sweep promises, and builds the same thing every time."""

from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from planish.tools.bench.zoo import ZooEntry, padding_mask, zoo

ENTRIES = zoo()
SMALL = [entry for entry in ENTRIES if entry.family == "small"]


def test_size_of_the_zoo() -> None:
    families = Counter(entry.family for entry in ENTRIES)
    assert len(ENTRIES) >= 90
    assert families["small"] >= 15
    assert min(families[f] for f in ("torchvision", "timm", "transformers")) >= 25
    assert len({entry.name for entry in ENTRIES}) == len(ENTRIES)
    dynamic = sum(entry.dynamic_shapes is not None for entry in ENTRIES)
    assert dynamic >= len(ENTRIES) / 3


@pytest.mark.parametrize("entry", SMALL, ids=lambda entry: entry.name)
def test_small_entries_are_reproducible(entry: ZooEntry) -> None:
    first, second = entry.build(), entry.build()
    assert not first.training
    weights = second.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in first.state_dict().items())
    (args, kwargs), (again, keywords) = entry.inputs(), entry.inputs()
    with torch.no_grad():
        outputs = pytree.tree_leaves(first(*args, **kwargs))
        repeated = pytree.tree_leaves(second(*again, **keywords))
    assert outputs
    for output, other in zip(outputs, repeated, strict=True):
        if isinstance(output, Tensor):
            assert torch.equal(output, other)
            assert bool(output.double().isfinite().all())
        else:
            assert output == other


def test_building_leaves_the_generator_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    SMALL[0].build()
    assert torch.equal(torch.rand(1), expected)


def test_constant_parameters_are_perturbed() -> None:
    (entry,) = (e for e in SMALL if e.name == "small/norms")
    for name, parameter in entry.build().named_parameters():
        assert parameter.min() != parameter.max(), f"{name} is constant"


def test_padding_mask_keeps_the_first_row_and_position() -> None:
    mask = padding_mask(3, 8)
    assert mask[0].all()
    assert mask[:, 0].all()
    assert mask.sum(dim=1).tolist() == [8, 5, 2]
