"""Random networks: what is cut equals zeroes at all reads, and what cannot be cut is said."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from planish.ir.capture import capture
from planish.ir.errors import PassError
from planish.ir.execute import run
from planish.ir.verify import verify
from planish.passes.prune.coupling import find_groups
from planish.tools.bench.structure.masking import masked, share_kept, without
from tests.passes.prune.random_nets import RandomNet

SEEDS = (*range(50), 92, 96, 131)  # the last: readings of a reshape, dead code
DYNAMIC = ({0: torch.export.Dim("b", min=2, max=64)},)


def problem_of(seed: int) -> str | None:
    """What is wrong with a cut of random groups of a random network; None if nothing is."""
    net = RandomNet(seed)
    x = net.example
    program = capture(net, (x,), dynamic_shapes=DYNAMIC if net.dynamic else None)
    groups, refusals = find_groups(program)
    if any(not refusal.reason or not refusal.node for refusal in refusals):
        return "a refusal says nothing"
    drawn = random.Random(seed)
    inputs = [(x,), (torch.cat([x, x.flip(0)]),)] if net.dynamic else [(x,)]
    chosen = [[g] for g in drawn.sample(groups, min(3, len(groups)))]
    if len(groups) > 1:
        chosen.append(drawn.sample(groups, drawn.randint(2, len(groups))))
    for some in chosen:
        kept = {g: share_kept(g, drawn.choice([0.01, 0.3, 0.7]), seed) for g in some}
        names = ", ".join(f"{g.name} to {len(k)}" for g, k in kept.items())
        try:
            cut = without(program, kept)
        except PassError as refusal:
            # So few units may leave nothing of a part that is read alone: said, with a node.
            if refusal.where is None or "nothing would be left" not in str(refusal):
                return f"{names}: {refusal}"
            continue
        verify(cut, since=program)
        zeroed = masked(program, kept)
        for each in inputs:
            mine, wanted, was = (run(p, each)[0] for p in (cut, zeroed, program))
            assert isinstance(mine, Tensor)
            if mine.shape != was.shape:
                return f"{names}: shape {list(mine.shape)}, not {list(was.shape)}"
            scale = max(1.0, float(wanted.abs().max()))
            if not float((mine - wanted).abs().max()) <= 1e-4 * scale:
                return f"{names}: differs by {float((mine - wanted).abs().max())}"
    return None


@pytest.mark.parametrize("seed", SEEDS)
def test_a_random_network(seed: int) -> None:
    assert problem_of(seed) is None
